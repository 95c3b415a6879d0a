"""Labelled things of a scanned room: their boxes, the pixels that show them, the room's size.

The sources of scans (ScanNet, ScanNet++, ARKitScenes) share what is here. A thing's box comes from
the vertices of its segments of the mesh, or from an oriented box in the annotation.
"""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.spatial import KDTree

from geode_jax.errors import UserError
from geode_jax.geometry.upright_boxes import box_gaps
from geode_jax.sources.datasets.ply import read_vertices
from geode_jax.sources.datasets.scene_export import Scene
from geode_jax.sources.questions.margins import MAX_APART, MAX_SURFACE_GAP, MIN_SEPARATION
from geode_jax.sources.questions.measured import box_contacts
from geode_jax.sources.questions.seen_room import SeenRoom
from geode_jax.sources.rgbd.frame import Frame
from geode_jax.sources.rgbd.sequence import Dropped
from geode_jax.sources.rooms.scene import GRID, MIN_VISIBLE_PIXELS, PATCH_SIDE

EXCLUDED_LABELS = frozenset({"wall", "floor", "ceiling", "remove", "split", "object", "unknown"})
"""Labels that are not objects for questions."""
FLOOR_CELL = 0.1
"""Edge of the cells in which the floor's area is measured, metres."""
VOXEL_EDGE = 0.08
"""Edge of the voxels by which a measured point is assigned to an instance, metres."""
MAX_TILT = np.radians(5)
"""Largest angle between an axis of an annotated box and the vertical; the contract's boxes turn
about z only."""
FLOOR_SHARE = 0.02
"""Share of a mesh's vertices that are taken to be below the floor: noise and reflections."""
FLOOR_SLACK = 0.1
"""Height of the floor up to which a scan's own frame is kept, metres."""
MIN_HELD = 0.9
"""Least share of a thing's vertices that its annotated box must hold."""
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
        notes: what was corrected, a line an instance.
    """

    vertices: np.ndarray
    instance: np.ndarray
    names: tuple[str, ...]
    boxes: np.ndarray
    lost: tuple[str, ...]
    notes: tuple[str, ...] = ()


class Group(NamedTuple):
    """A thing of an annotation.

    Attributes:
        label: its label, as `label_of` returns it.
        segments: numbers of its segments of the mesh.
        obb: its annotated oriented box as in the file, see `upright_box`; None without one.
    """

    label: str
    segments: list
    obb: Any = None


def label_of(text: str) -> str:
    """Returns a label in lower case with single spaces; "unknown" if it has no letters."""
    return " ".join(text.lower().replace("_", " ").split()) or "unknown"


def read_mesh(path: Path, world: np.ndarray) -> np.ndarray:
    """Returns the vertices [n, 3] of a room's mesh in metres, moved by `world` [4, 4].

    Raises:
        UserError: the file is missing or damaged, or no room has its extent.
    """
    vertices = read_vertices(path) @ world[:3, :3].T + world[:3, 3]
    extent = np.ptp(vertices, axis=0).max() if len(vertices) else 0.0
    if not 0 < extent <= MAX_MESH_EXTENT:
        raise UserError(
            f"{path}: a mesh of {extent:.3g} m; must be more than 0, at most {MAX_MESH_EXTENT}"
        )
    return vertices


def floor_to_zero(vertices: np.ndarray) -> np.ndarray:
    """Returns the motion [4, 4] along z that brings the floor of a mesh [n, 3] to height 0.

    Answers name heights above the floor. A floor within FLOOR_SLACK of 0 stays where it is.
    """
    height, world = np.quantile(vertices[:, 2], FLOOR_SHARE), np.eye(4)
    if abs(height) > FLOOR_SLACK:
        world[2, 3] = -height
    return world


def labels_of_segments(
    groups: Sequence[Group], vertices: np.ndarray, segments: Any, path: Path
) -> Labels:
    """Returns the labelled instances of a mesh.

    Instances are the groups whose label is not in `EXCLUDED_LABELS`, and that have a vertex and an
    extent along every axis. Their boxes are the annotated ones where these hold the vertices and
    turn about z only, else the axis-aligned boxes of the vertices.

    Args:
        groups: the annotation.
        vertices: [n, 3] of the mesh, world frame.
        segments: segment of each vertex, a list from JSON.
        path: file of the segments, named in messages.

    Raises:
        UserError: the segments are damaged, or are not those of the mesh.
    """
    segments = _whole_numbers(path, "segIndices", segments)
    if len(segments) != len(vertices):
        rule = f"{len(segments)} segIndices for {len(vertices)} vertices of the mesh"
        raise UserError(f"{path}: {rule}")
    ids, segments = np.unique(segments, return_inverse=True)
    instance = np.full(len(vertices), -1)
    names, boxes, lost, notes = [], [], [], []
    for label, own, obb in groups:
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
        box = np.array([*(points.min(0) + size / 2), *size, 0.0])
        if obb is not None:
            try:
                box = _holding(upright_box(obb), points)
            except Dropped as reason:
                notes.append(f"an annotated box is {reason}: that of the vertices is used")
        boxes.append(box)
    found = np.array(boxes).reshape(-1, 7)
    return Labels(vertices, instance, tuple(names), found, tuple(lost), tuple(notes))


def _holding(box: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Returns a box (7,); raises Dropped if it does not hold the points [n, 3] of its thing."""
    if _inside(points, box).mean() < MIN_HELD:
        raise Dropped("not around its vertices")
    return box


def upright_box(annotated: Any) -> np.ndarray:
    """Returns an annotated oriented box as (7,), in the annotation's frame.

    Args:
        annotated: {"centroid": 3 numbers, "axesLengths": 3, "normalizedAxes": 9}. The axes are the
            rows of a 3 x 3 matrix: a corner is the centre plus or minus half of each length times
            its axis (ARKitScenes, `box_utils.compute_box_3d`).

    Raises:
        Dropped: numbers are missing or impossible, or no axis is vertical.
    """
    found = annotated if isinstance(annotated, dict) else {}
    numbers = [_finite(found.get(k), n) for k, n in _BOX_FIELDS.items()]
    if any(n is None for n in numbers):
        raise Dropped("without a centre, three lengths and three axes")
    centre, lengths, axes = (np.asarray(n) for n in numbers)
    axes = axes.reshape(3, 3)
    if np.abs(axes @ axes.T - np.eye(3)).max() > _AXES_TOLERANCE:
        raise Dropped("with axes that are not orthonormal")
    if not (lengths > 0).all():
        raise Dropped("without an extent")
    upright = int(np.argmax(np.abs(axes[:, 2])))
    if np.abs(axes[upright, 2]) < np.cos(MAX_TILT):
        raise Dropped("leaning")
    one, other = (n for n in range(3) if n != upright)
    # Half a turn does not change a box, so yaw is in [-pi / 2, pi / 2).
    yaw = (np.arctan2(axes[one, 1], axes[one, 0]) + np.pi / 2) % np.pi - np.pi / 2
    return np.array([*centre, lengths[one], lengths[other], lengths[upright], yaw])


_BOX_FIELDS = {"centroid": 3, "axesLengths": 3, "normalizedAxes": 9}
_AXES_TOLERANCE = 0.01
"""Largest entry of |A A^T - I| of annotated axes, which have a few decimals."""


def _finite(values: Any, count: int) -> np.ndarray | None:
    """Returns a list of `count` finite numbers from JSON as float64, None if it is none."""
    good = isinstance(values, list) and len(values) == count
    if not good or any(type(v) not in (int, float) for v in values):
        return None
    array = np.array(values, np.float64)
    return array if np.abs(array).max() < 1e6 else None


def _whole_numbers(path: Path, what: str, values) -> np.ndarray:
    """Returns a list of non-negative whole numbers from JSON as [n] int64."""
    try:
        array = np.array(values)
    except (ValueError, OverflowError):
        array = np.array(None)
    if array.ndim != 1 or (array.size and array.dtype.kind != "i") or (array < 0).any():
        raise UserError(f"{path}: {what} must be a list of whole numbers")
    return array.astype(np.int64)


def pixels_on_mesh(labels: Labels, frames: list[Frame]) -> np.ndarray:
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


def pixels_of_vertices(
    labels: Labels, extrinsic: np.ndarray, intrinsic: np.ndarray, size: tuple[int, int]
) -> np.ndarray:
    """Returns the pixels [V, N] that show every instance, scaled as `pixels_on_mesh`.

    For views without depth: of the vertices that fall into a pixel, the nearest one hides the
    others.

    Args:
        labels: the instances of a mesh, with vertices much closer to each other than pixels.
        extrinsic: [V, 3, 4] camera-from-world.
        intrinsic: [V, 3, 3] in pixels of pictures of `size`.
        size: (width, height) in which pixels are counted, small.
    """
    width, height = size
    rays = np.zeros((len(extrinsic), len(labels.names)), np.int64)
    for view, (motion, matrix) in enumerate(zip(extrinsic, intrinsic, strict=True)):
        seen = labels.vertices @ motion[:, :3].T + motion[:, 3]
        rows = np.flatnonzero(seen[:, 2] > _NEAREST)
        pixel = seen[rows] @ matrix.T
        across, down = np.round(pixel[:, :2] / pixel[:, 2:]).T
        shown = (across >= 0) & (across < width) & (down >= 0) & (down < height)
        rows, place = rows[shown], (down * width + across)[shown].astype(np.int64)
        order = np.lexsort([seen[rows, 2], place])
        place, rows = place[order], rows[order]
        nearest = rows[np.diff(place, prepend=-1) > 0]
        owner = labels.instance[nearest]
        counts = np.bincount(owner[owner >= 0], minlength=len(labels.names))
        rays[view] = np.round(counts * (GRID * PATCH_SIDE) ** 2 / (width * height))
    return rays


_NEAREST = 0.1
"""Least distance of a vertex that a camera shows, metres."""


def pixels_in_boxes(boxes: np.ndarray, frames: Sequence[Frame]) -> np.ndarray:
    """Returns the pixels [V, N] that show the things in boxes [N, 7], scaled as `pixels_on_mesh`.

    A measured point belongs to the smallest box that it is in, within half of `VOXEL_EDGE`.
    """
    rays = np.zeros((len(frames), len(boxes)), np.int64)
    order = np.argsort(boxes[:, 3:6].prod(-1))
    for view, frame in enumerate(frames):
        points = frame.view.surface
        free = np.ones(len(points), bool)
        for n in order:
            inside = free & _inside(points, boxes[n])
            free &= ~inside
            share = inside.sum() * (GRID * PATCH_SIDE) ** 2 / max(1, len(points))
            rays[view, n] = np.round(share)
    return rays


def _inside(points: np.ndarray, box: np.ndarray) -> np.ndarray:
    """Returns whether points [n, 3] are in a box (7,), within half of `VOXEL_EDGE`."""
    cos, sin = np.cos(box[6]), np.sin(box[6])
    x, y, z = (points - box[:3]).T
    own = np.stack([cos * x + sin * y, cos * y - sin * x, z], axis=-1)
    return np.all(np.abs(own) <= box[3:6] / 2 + VOXEL_EDGE / 2, axis=-1)


@dataclasses.dataclass(frozen=True)
class Things:
    """The labelled things of a scene, before it is known which of them the views show.

    Attributes:
        names: of the N things.
        boxes: [N, 7].
        rays: [V, N] pixels of each view that show each thing.
        lost: labels of further things, which have no box.
        labels: the things' surfaces, by which questions about contact are answered; None: by boxes.
    """

    names: tuple[str, ...]
    boxes: np.ndarray
    rays: np.ndarray
    lost: tuple[str, ...]
    labels: Labels | None = None


def labelled_scene(
    scene_id: str,
    arrays: dict[str, np.ndarray],
    things: Things,
    mesh: np.ndarray | None,
    categories: Sequence[str],
    dropped: Counter[str],
    corrected: tuple[str, ...] = (),
) -> Scene:
    """Returns a scene with the boxes that its views show.

    Boxes that no view shows are dropped and counted, and no question names their categories.

    Args:
        scene_id: id of the scene.
        arrays: tensors of its views; gets `target/boxes` and `target/labels`.
        things: what is labelled.
        mesh: [n, 3] vertices of the room, from which its size is measured. Without it nothing is
            asked about the scene.
        categories: the export's categories.
        dropped: what is missing so far.
        corrected: see `Scene`.
    """
    shown = np.flatnonzero(things.rays.sum(0) >= MIN_VISIBLE_PIXELS)
    hidden = set(range(len(things.names))) - set(shown.tolist())
    dropped["box: shown by no view"] += len(hidden)
    names, boxes = tuple(things.names[n] for n in shown), things.boxes[shown]
    arrays["target/boxes"] = boxes.astype(np.float32)
    arrays["target/labels"] = np.array([categories.index(n) for n in names], np.int32)
    if mesh is None or not names:
        return Scene(arrays, None, +dropped, corrected)
    room, floor = measure_room(mesh)
    seen = SeenRoom(
        scene_id=scene_id,
        room=room,
        floor=floor,
        names=names,
        boxes=boxes,
        rays=things.rays[:, shown],
        vague=frozenset(things.lost) | {things.names[n] for n in hidden},
        contacts=(
            box_contacts(boxes) if things.labels is None else surface_contacts(things.labels, shown)
        ),
        extrinsic=arrays["camera/extrinsic"],
        larger={},
        typical={},
    )
    return Scene(arrays, seen, +dropped, corrected)


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
