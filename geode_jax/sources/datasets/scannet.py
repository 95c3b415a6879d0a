"""ScanNet as an export; a scene is a scan.

The layout is ScanNet's own:

    scans/<id>/<id>.sens                    or color/ depth/ pose/ intrinsic/ in or below the folder
    scans/<id>/<id>.txt                     axisAlignment, 16 numbers; the default is the identity
    scans/<id>/<id>_vh_clean_2.ply          these three together, or none (a test scan)
    scans/<id>/<id>_vh_clean_2.0.010000.segs.json
    scans/<id>/<id>.aggregation.json
    scannetv2_train.txt, scannetv2_val.txt, scannetv2_test.txt    the splits, if one exists

The world frame is that of the axis alignment: metres, z up, walls along x and y. A box is the
axis-aligned box of an instance's vertices, yaw 0. Views are spread evenly over the frames that have
a pose. Boxes that no view shows are dropped and counted, and no question names their categories. If
one scan of a room is excluded from training, all scans of the room are. Stand-ins for `vggt/tokens`
are made from the measured depth and the colour, as for RGB-D folders (`rgbd.export`): the tokens
contain depth. Pictures are square.
"""

import dataclasses
import itertools
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy.spatial import KDTree

from geode_jax.errors import UserError
from geode_jax.exports import SPLITS, files
from geode_jax.geometry.upright_boxes import box_gaps
from geode_jax.sources.datasets import Report, Request
from geode_jax.sources.datasets.ply import read_vertices
from geode_jax.sources.datasets.scene_export import (
    Scene,
    draw_splits,
    exclude_from_training,
    write_scenes,
)
from geode_jax.sources.questions.margins import MAX_APART, MAX_SURFACE_GAP, MIN_SEPARATION
from geode_jax.sources.questions.seen_room import SeenRoom
from geode_jax.sources.rgbd.folder import open_folder
from geode_jax.sources.rgbd.frame import Frame, frame_arrays, read_frame
from geode_jax.sources.rgbd.sens import open_sens
from geode_jax.sources.rgbd.sequence import Dropped, RgbdSequence, rigid
from geode_jax.sources.rooms.scene import GRID, MIN_VISIBLE_PIXELS, PATCH_SIDE

VERSION = 2
"""Version of an export's content; goes up with every change of this converter."""
EXCLUDED_LABELS = frozenset({"wall", "floor", "ceiling", "remove", "object", "unknown"})
"""Labels that are not objects for questions."""
IMAGE_SIDE = 448
"""Side of the pictures, pixels."""
FLOOR_CELL = 0.1
"""Edge of the cells in which the floor's area is measured, metres."""
VOXEL_EDGE = 0.08
"""Edge of the voxels by which a measured point is assigned to an instance, metres."""
MAX_MESH_EXTENT = 400.0
"""Largest extent of a scan's mesh, metres; a larger one is damaged."""


@dataclasses.dataclass(frozen=True)
class Labels:
    """Labelled instances of a scan, world frame.

    Attributes:
        vertices: [n, 3] of the mesh.
        instance: [n] row of `boxes` of each vertex, -1 = none.
        names: labels of the N instances.
        boxes: [N, 7].
        lost: labels of further instances, which have no vertex or are flat.
    """

    vertices: np.ndarray
    instance: np.ndarray
    names: tuple[str, ...]
    boxes: np.ndarray
    lost: tuple[str, ...]


def prepare(request: Request) -> Report:
    """Writes the export, see the module.

    Raises:
        UserError: the folder is not in the layout, or no scan can be used.
        ExportError: the export cannot be written.
    """
    request.refuse_question_options("ScanNet")
    scans = request.root / "scans"
    found = sorted(p.name for p in scans.glob("*") if p.is_dir())
    if not found:
        raise UserError(f"{scans}: no scan: <id>/<id>.sens and its neighbours are looked for")
    report = Report()
    rooms = {scan: _room(scan) for scan in found}
    splits = exclude_from_training(_splits(request, rooms, report), rooms, request, report)
    labels: set[str] = set()
    for scan in splits:
        try:
            labels.update(
                label for label, _ in _groups(scans / scan) if label not in EXCLUDED_LABELS
            )
        except UserError:
            continue  # the same error drops the scan when it is made
    categories = sorted(labels)
    return write_scenes(
        request,
        splits,
        lambda scan: make_scene(scans / scan, request, categories),
        report,
        source=lambda scan: scans / scan,
        producer={
            "project": "geode_jax ScanNet",
            "commit": f"scannet version {VERSION}",
            "weights": "none: tokens are a fixed function of the measured depth and the colour",
            "licence": "ScanNet Terms of Use: not to be passed on",
        },
        categories=categories,
        tokens_contain_depth=True,
        notes="ScanNet scans, axis-aligned. No VGGT: the tokens are a fixed function of the "
        "measured depth and the colour, so they CONTAIN THE DEPTH that depth metrics score. Boxes "
        "are axis-aligned, of the instances that the views show.",
    )


def _splits(request: Request, rooms: dict[str, str], report: Report) -> dict[str, str]:
    """Returns scan -> split: ScanNet's own if there is a list, else drawn, by rooms.

    Splits that the request asks for are drawn instead.

    Entries of the lists without a scan on disk are counted.

    Args:
        request: its root has the lists.
        rooms: scan -> room of the scans on disk.
        report: gets the counts of what is dropped.

    Raises:
        UserError: a scan, or two scans of a room, are in different lists, or no list names a scan
            on disk.
    """
    lists = {s: request.root / f"scannetv2_{s}.txt" for s in SPLITS}
    lists = {split: path for split, path in lists.items() if path.is_file()}
    if request.split or not lists:
        return draw_splits(rooms, request)
    listed: dict[str, tuple[str, str]] = {}  # room -> split, first scan
    splits: dict[str, str] = {}
    for split, path in lists.items():
        entries = files.read_list(path)
        for where, (scan,) in entries:
            other, before = listed.setdefault(_room(scan), (split, scan))
            if other != split:
                same = "" if scan == before else f", as {before}, of the same room"
                raise UserError(f"{where}: {scan} is in the list of {other} too{same}")
            splits[scan] = split
        absent = sum(scan not in rooms for _, (scan,) in entries)
        if absent:
            which = "every entry" if absent == len(entries) else "entry"
            report.dropped[f"{which} of {path.name}: no such scan in scans/"] += absent
    kept = {scan: splits[scan] for scan in rooms if scan in splits}
    if not kept:
        names = ", ".join(path.name for path in lists.values())
        raise UserError(f"{request.root}: {names}: none of the scans in scans/ is listed")
    if len(kept) < len(rooms):
        report.dropped["scene: in no scannetv2_*.txt"] += len(rooms) - len(kept)
    return kept


def _room(scan: str) -> str:
    """Returns the room of a scan: scene0000 for scene0000_00 and scene0000_01."""
    return scan.partition("_")[0]


def make_scene(folder: Path, request: Request, categories: list[str]) -> Scene:
    """Returns one scan as a scene.

    Args:
        folder: `scans/<id>`.
        request: gives the number of views and their grid.
        categories: the export's categories.

    Raises:
        UserError: a file is damaged, or no frame is usable.
    """
    world, sequence, dropped = read_alignment(folder), open_frames(folder), Counter()
    if world is None:
        world = np.eye(4)
        dropped["alignment: a scan has none, its own frame is used"] += 1
    frames = _chosen_frames(sequence, request, world, dropped)
    if not frames:
        why = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
        raise UserError(f"no usable frame ({why})")
    arrays = frame_arrays(sequence, frames)
    # The scan's name is removed, so that notes that many scans share are counted together.
    notes = (note.replace(f"{folder}/", "") for note in sequence.notes)
    corrected = tuple(note.replace(folder.name, "<id>") for note in notes)
    labels = read_labels(folder, world)
    if labels is None:
        return Scene(arrays, None, dropped, corrected)
    rays = _pixels_shown(labels, frames)
    shown = np.flatnonzero(rays.sum(0) >= MIN_VISIBLE_PIXELS)
    hidden = set(range(len(labels.names))) - set(shown.tolist())
    dropped["box: shown by no view"] += len(hidden)
    dropped["box: no vertex, or flat"] += len(labels.lost)
    names = tuple(labels.names[n] for n in shown)
    arrays["target/boxes"] = labels.boxes[shown].astype(np.float32)
    arrays["target/labels"] = np.array([categories.index(n) for n in names], np.int32)
    room, floor = measure_room(labels.vertices)
    seen = SeenRoom(
        scene_id=folder.name,
        room=room,
        floor=floor,
        names=names,
        boxes=labels.boxes[shown],
        rays=rays[:, shown],
        vague=frozenset(labels.lost) | {labels.names[n] for n in hidden},
        contacts=surface_contacts(labels, shown),
        extrinsic=arrays["camera/extrinsic"],
        larger={},
        typical={},
    )
    return Scene(arrays, seen if names else None, +dropped, corrected)


# --------------------------------------------------------------------------------------- frames


def open_frames(folder: Path) -> RgbdSequence:
    """Returns the frames of a scan, from its `.sens` or from the folders extracted from it.

    Raises:
        UserError: there is neither, or it cannot be read.
    """
    sens = folder / f"{folder.name}.sens"
    return open_sens(sens) if os.path.lexists(sens) else open_folder(folder)


def read_alignment(folder: Path) -> np.ndarray | None:
    """Returns the rigid motion [4, 4] from a scan's frame to the axis-aligned one, None if unknown.

    Raises:
        UserError: the axisAlignment in `<id>.txt` is not a rigid motion.
    """
    path = folder / f"{folder.name}.txt"
    if not os.path.lexists(path):
        return None
    text = files.read_text(path)
    found = re.search(r"^\s*axisAlignment\s*=(.*)$", text, re.MULTILINE)
    if not found:
        return None
    try:
        return rigid(np.array([float(word) for word in found[1].split()]).reshape(4, 4))
    except (ValueError, Dropped):
        raise UserError(f"{path}: axisAlignment must be the 16 numbers of a rigid motion") from None


def _chosen_frames(
    sequence: RgbdSequence, request: Request, world: np.ndarray, dropped: Counter
) -> list[Frame]:
    """Returns frames spread evenly over those with a pose; a neighbour replaces a broken one."""
    tracked = []
    for name in sequence.names:
        try:
            sequence.read_pose(name)
            tracked.append(name)
        except Dropped as reason:
            dropped[f"frame: {reason}"] += 1
    frames = []
    for part in np.array_split(tracked, min(request.views, len(tracked)) or 1):
        middle = len(part) // 2
        for n in sorted(range(len(part)), key=lambda n: abs(n - middle)):
            try:
                grid = request.patch_grid
                frame = read_frame(sequence, str(part[n]), grid, IMAGE_SIDE, world, square=True)
                frames.append(frame)
                break
            except Dropped as reason:
                dropped[f"frame: {reason}"] += 1
    return frames


# --------------------------------------------------------------------------------------- labels


def _groups(folder: Path) -> list[tuple[str, list]]:
    """Returns (label, segments) of a scan's instances; empty if it has no aggregation file."""
    path = folder / f"{folder.name}.aggregation.json"
    if not os.path.lexists(path):
        return []
    groups = files.read_json_object(path).get("segGroups")
    if not isinstance(groups, list):
        raise UserError(f"{path}: no segGroups")
    found = []
    for group in groups:
        label = group.get("label") if isinstance(group, dict) else None
        segments = group.get("segments") if isinstance(group, dict) else None
        if not isinstance(label, str) or not isinstance(segments, list):
            raise UserError(f"{path}: a group must have a label and segments")
        found.append((" ".join(label.lower().split()) or "unknown", segments))
    return found


def read_labels(folder: Path, world: np.ndarray) -> Labels | None:
    """Returns a scan's instances in the aligned frame, None if it has no labels.

    Instances are the groups whose label is not in `EXCLUDED_LABELS`, and that have a vertex and an
    extent along every axis.

    Args:
        folder: `scans/<id>`.
        world: [4, 4], see `read_alignment`.

    Raises:
        UserError: one of the three files is missing or damaged, or they do not belong together.
    """
    groups = _groups(folder)
    if not groups:
        return None
    mesh = folder / f"{folder.name}_vh_clean_2.ply"
    vertices = read_vertices(mesh) @ world[:3, :3].T + world[:3, 3]
    extent = np.ptp(vertices, axis=0).max() if len(vertices) else 0.0
    if not 0 < extent <= MAX_MESH_EXTENT:
        raise UserError(
            f"{mesh}: a mesh of {extent:.3g} m; must be more than 0, at most {MAX_MESH_EXTENT}"
        )
    path = folder / f"{folder.name}_vh_clean_2.0.010000.segs.json"
    segments = _whole_numbers(path, "segIndices", files.read_json_object(path).get("segIndices"))
    if len(segments) != len(vertices):
        rule = f"{len(segments)} segIndices for {len(vertices)} vertices of the mesh"
        raise UserError(f"{path}: {rule}")
    ids, segments = np.unique(segments, return_inverse=True)
    instance = np.full(len(vertices), -1)
    names, boxes, lost = [], [], []
    for label, own in groups:
        if label in EXCLUDED_LABELS:
            continue
        own = np.isin(ids, _whole_numbers(path, f"segments of {label}", own))[segments]
        points = vertices[own]
        size = np.ptp(points, axis=0) if len(points) else np.zeros(3)
        if (size <= 0).any():
            lost.append(label)
            continue
        instance[own] = len(names)
        names.append(label)
        boxes.append([*(points.min(0) + size / 2), *size, 0.0])
    return Labels(vertices, instance, tuple(names), np.array(boxes).reshape(-1, 7), tuple(lost))


def _whole_numbers(path: Path, what: str, values) -> np.ndarray:
    """Returns a list of non-negative whole numbers from JSON as [n] int64."""
    try:
        array = np.array(values)
    except (ValueError, OverflowError):
        array = np.array(None)
    if array.ndim != 1 or (array.size and array.dtype.kind != "i") or (array < 0).any():
        raise UserError(f"{path}: {what} must be a list of whole numbers")
    return array.astype(np.int64)


def _pixels_shown(labels: Labels, frames: list[Frame]) -> np.ndarray:
    """Returns the pixels [V, N] that show every instance, scaled to the size of rooms' pictures.

    A measured point belongs to the instance with most vertices in its voxel.
    """
    count = len(labels.names)
    low = labels.vertices.min(0)
    keys, owner = _voxel_owners(labels, low)
    rays = np.zeros((len(frames), count), np.int64)
    for view, frame in enumerate(frames):
        points = frame.view.surface
        points = points[(points >= low).all(-1)]
        key = _voxel_keys(points, low)
        place = np.minimum(np.searchsorted(keys, key), len(keys) - 1)
        hit = owner[place[keys[place] == key]]
        shown = np.bincount(hit[hit >= 0], minlength=count)
        rays[view] = np.round(shown * (GRID * PATCH_SIDE) ** 2 / max(1, len(frame.view.surface)))
    return rays


def surface_contacts(
    labels: Labels, shown: Sequence[int] | np.ndarray
) -> dict[tuple[int, int], float]:
    """Returns the gaps between the surfaces of instances, for questions about contact.

    Args:
        labels: instances of the scan with their vertices.
        shown: rows of the instances that count as visible.

    Returns:
        {(i, j): gap in metres} over positions in `shown`, i < j: 0 where the nearest vertices are
        at most `MAX_SURFACE_GAP` apart, and the gap of the boxes where that is from
        `MIN_SEPARATION` to `MAX_APART`. All other pairs are left out.
    """
    boxes = labels.boxes[list(shown)]
    if not len(boxes):
        return {}
    gaps = box_gaps(boxes, boxes)
    trees: dict[int, KDTree] = {}

    def tree(position: int) -> KDTree:
        if position not in trees:
            vertices = labels.vertices[labels.instance == shown[position]]
            trees[position] = KDTree(vertices)
        return trees[position]

    found = {}
    for i, j in itertools.combinations(range(len(boxes)), 2):
        if MIN_SEPARATION <= gaps[i, j] <= MAX_APART:
            found[i, j] = float(gaps[i, j])
        elif gaps[i, j] <= MAX_SURFACE_GAP:
            nearest, _ = tree(i).query(tree(j).data, distance_upper_bound=MAX_SURFACE_GAP)
            if np.isfinite(nearest).any():
                found[i, j] = 0.0
    return found


def _voxel_keys(points: np.ndarray, low: np.ndarray) -> np.ndarray:
    """Returns one number [n] for the voxel of each point [n, 3], unique within 2 km."""
    x, y, z = np.clip((points - low) / VOXEL_EDGE, 0, (1 << 15) - 1).astype(np.int64).T
    return x << 30 | y << 15 | z


def _voxel_owners(labels: Labels, low: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns sorted keys [k] of the mesh's voxels, and the instance [k] with most vertices."""
    rows = len(labels.names) + 1  # one more for no instance
    pairs = _voxel_keys(labels.vertices, low) * rows + labels.instance + 1
    pairs, votes = np.unique(pairs, return_counts=True)
    pairs = pairs[np.lexsort([votes, pairs // rows])]
    keys, owner = pairs // rows, pairs % rows - 1
    last = np.append(keys[1:] != keys[:-1], True)  # the instance with most votes in a voxel
    return keys[last], owner[last]


def measure_room(vertices: np.ndarray) -> tuple[np.ndarray, float]:
    """Returns the extent x, y, z of a mesh [n, 3] in metres, and its floor's area in square metres.

    The floor is the area between vertices both along x and along y. Missing corners do not count,
    the space under furniture does.
    """
    cells = np.round((vertices[:, :2] - vertices[:, :2].min(0)) / FLOOR_CELL).astype(np.int64)
    covered = np.zeros(cells.max(0) + 1, bool)
    covered[tuple(cells.T)] = True
    between = np.ones_like(covered)
    for axis in (0, 1):
        behind = np.logical_or.accumulate(covered, axis)
        ahead = np.flip(np.logical_or.accumulate(np.flip(covered, axis), axis), axis)
        between &= behind & ahead
    squares = between[1:, 1:] & between[1:, :-1] & between[:-1, 1:] & between[:-1, :-1]
    return np.ptp(vertices, axis=0), float(squares.sum() * FLOOR_CELL**2)
