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

import os
import re
from collections import Counter
from pathlib import Path

import numpy as np

from geode_jax.errors import UserError
from geode_jax.exports import SPLITS, files
from geode_jax.exports.scene_names import room_of
from geode_jax.sources.datasets import Report, Request
from geode_jax.sources.datasets.instances import (
    EXCLUDED_LABELS,
    Group,
    Labels,
    Things,
    label_of,
    labelled_scene,
    labels_of_segments,
    pixels_on_mesh,
    read_mesh,
)
from geode_jax.sources.datasets.scene_export import (
    Scene,
    exclude_from_training,
    listed_splits,
    write_scenes,
)
from geode_jax.sources.rgbd.folder import open_folder
from geode_jax.sources.rgbd.frame import frame_arrays, spread_frames
from geode_jax.sources.rgbd.sens import open_sens
from geode_jax.sources.rgbd.sequence import Dropped, RgbdSequence, rigid

VERSION = 2
"""Version of an export's content; goes up with every change of this converter."""
IMAGE_SIDE = 448
"""Side of the pictures, pixels."""


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
    rooms = {scan: room_of(scan) for scan in found}
    lists = {request.root / f"scannetv2_{split}.txt": split for split in SPLITS}
    splits = listed_splits(request, lists, rooms, scans, report)
    splits = exclude_from_training(splits, rooms, request, report)
    labels: set[str] = set()
    for scan in splits:
        try:
            labels.update(
                group.label for group in _groups(scans / scan) if group.label not in EXCLUDED_LABELS
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
    frames = spread_frames(sequence, request.views, request.patch_grid, IMAGE_SIDE, world, dropped)
    if not frames:
        why = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
        raise UserError(f"no usable frame ({why})")
    arrays = frame_arrays(frames)
    # The scan's name is removed, so that notes that many scans share are counted together.
    notes = (note.replace(f"{folder}/", "") for note in sequence.notes)
    corrected = tuple(note.replace(folder.name, "<id>") for note in notes)
    labels = read_labels(folder, world)
    if labels is None:
        return Scene(arrays, None, dropped, corrected)
    dropped["box: no vertex, or flat"] += len(labels.lost)
    rays = pixels_on_mesh(labels, frames)
    things = Things(labels.names, labels.boxes, rays, labels.lost, labels)
    return labelled_scene(
        folder.name, arrays, things, labels.vertices, categories, dropped, corrected
    )


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


# --------------------------------------------------------------------------------------- labels


def _groups(folder: Path) -> list[Group]:
    """Returns a scan's labelled instances; empty if it has no aggregation file."""
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
        found.append(Group(label_of(label), segments))
    return found


def read_labels(folder: Path, world: np.ndarray) -> Labels | None:
    """Returns a scan's instances in the aligned frame, None if it has no labels.

    Args:
        folder: `scans/<id>`.
        world: [4, 4], see `read_alignment`.

    Raises:
        UserError: one of the three files is missing or damaged, or they do not belong together.
    """
    groups = _groups(folder)
    if not groups:
        return None
    vertices = read_mesh(folder / f"{folder.name}_vh_clean_2.ply", world)
    path = folder / f"{folder.name}_vh_clean_2.0.010000.segs.json"
    segments = files.read_json_object(path).get("segIndices")
    return labels_of_segments(groups, vertices, segments, path)
