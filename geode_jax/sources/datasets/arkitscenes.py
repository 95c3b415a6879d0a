"""ARKitScenes as an export; a scene is a video.

The layout is that of the data set's own download script, of `raw` or `3dod`:

    [raw/|3dod/][Training/|Validation/]<id>/    frames as `rgbd.arkit` reads them
    .../<id>/<id>_3dod_annotation.json          oriented boxes; absent for a video without labels
    .../<id>/<id>_3dod_mesh.ply                 ARKit's mesh, from which the room is measured
    metadata.csv or *_train_val_splits.csv      video_id, visit_id, fold; also in raw/ or 3dod/

The world frame is ARKit's: metres, z up. It is moved along z so that the floor, measured on the
mesh, is at 0; without a mesh it is not moved, and nothing is asked about the scene. Boxes turn
about z. The fold Training is the split train and Validation is val. If one video of a visit is
excluded from training, all videos of the visit are, where a table names the visits. Stand-ins for
`vggt/tokens` are made from the measured depth and the colour, as for ScanNet: the tokens contain
depth.
"""

import csv
import io
import os
from collections import Counter
from pathlib import Path

import numpy as np

from geode_jax.errors import UserError
from geode_jax.exports import files
from geode_jax.sources.datasets import Report, Request
from geode_jax.sources.datasets.instances import (
    EXCLUDED_LABELS,
    Things,
    floor_to_zero,
    label_of,
    labelled_scene,
    pixels_in_boxes,
    read_mesh,
    upright_box,
)
from geode_jax.sources.datasets.scene_export import (
    Scene,
    draw_splits,
    exclude_from_training,
    write_scenes,
)
from geode_jax.sources.rgbd.arkit import open_arkit
from geode_jax.sources.rgbd.frame import frame_arrays, spread_frames
from geode_jax.sources.rgbd.sequence import Dropped

VERSION = 1
"""Version of an export's content; goes up with every change of this converter."""
IMAGE_SIDE = 256
"""Side of the pictures, pixels; those of lowres_wide have 256 x 192."""
FOLDS = {"Training": "train", "Validation": "val"}
"""Fold of the data set -> split of the export."""
_PARTS = ("", "raw", "3dod")
_TABLES = ("metadata.csv", "raw_train_val_splits.csv", "3dod_train_val_splits.csv")


def prepare(request: Request) -> Report:
    """Writes the export, see the module.

    Raises:
        UserError: the folder is not in the layout, or no video can be used.
        ExportError: the export cannot be written.
    """
    request.refuse_question_options("ARKitScenes")
    report = Report()
    videos = _find_videos(request.root)
    table = _read_tables(request.root)
    visits = {video: table.get(video, ("", ""))[0] or video for video in videos}
    if request.exclude and not all(video in table for video in videos):
        report.warnings.append(
            "no table names the visits of all videos (metadata.csv): of an excluded video's room "
            "other videos may be trained on"
        )
    splits = _splits(request, videos, table, visits)
    splits = exclude_from_training(splits, visits, request, report)
    labels: set[str] = set()
    for video in splits:
        try:
            labels.update(label for label, _ in read_annotation(videos[video]) or ())
        except UserError:
            continue  # the same error drops the video when it is made
    categories = sorted(labels - EXCLUDED_LABELS)
    return write_scenes(
        request,
        splits,
        lambda video: make_scene(videos[video], request, categories),
        report,
        source=lambda video: videos[video],
        producer={
            "project": "geode_jax ARKitScenes",
            "commit": f"arkitscenes version {VERSION}",
            "weights": "none: tokens are a fixed function of the measured depth and the colour",
            "licence": "ARKitScenes terms of use: non-commercial",
        },
        categories=categories,
        tokens_contain_depth=True,
        notes="ARKitScenes videos, z up, floor at 0, pictures turned upright. No VGGT: the tokens "
        "are a fixed function of the measured depth and the colour, so they CONTAIN THE DEPTH that "
        "depth metrics score. Boxes turn about z and are those that the views show.",
    )


def _find_videos(root: Path) -> dict[str, Path]:
    """Returns id -> folder of the videos on disk, in the order of the ids.

    Raises:
        UserError: there is none, or one is in two places.
    """
    found: dict[str, Path] = {}
    for part in _PARTS:
        for fold in ("", *FOLDS):
            for path in sorted((root / part / fold).glob("*")):
                if not path.name.isdecimal() or not path.is_dir():
                    continue
                if path.name in found:
                    where = f"{found[path.name]} and {path}"
                    raise UserError(f"{root}: video {path.name} is in two places: {where}")
                found[path.name] = path
    if not found:
        raise UserError(
            f"{root}: no video: [raw/|3dod/][Training/|Validation/]<id>/lowres_wide is looked for"
        )
    return dict(sorted(found.items()))


def _read_tables(root: Path) -> dict[str, tuple[str, str]]:
    """Returns video -> (visit or "", fold or "") of the tables on disk.

    Raises:
        UserError: a table is damaged, or two of its rows, or two tables, contradict each other.
    """
    found: dict[str, tuple[str, str]] = {}
    for path in (root / part / name for part in _PARTS for name in _TABLES):
        if not os.path.lexists(path):
            continue
        try:
            rows = list(csv.DictReader(io.StringIO(files.read_text(path)), strict=True))
        except csv.Error as error:
            raise UserError(f"{path}: no CSV: {error}") from None
        names = ("video_id", "visit_id", "fold")
        if not rows or not all(name in rows[0] for name in names):
            raise UserError(f"{path}: must have the columns {', '.join(names)}")
        for number, row in enumerate(rows, 2):
            video, visit, fold = ((row[name] or "").strip() for name in names)
            visit = "" if visit.lower() in ("na", "nan") else visit.removesuffix(".0")
            if fold not in ("", *FOLDS):
                raise UserError(f"{path}: line {number}: fold {fold!r} is none of {[*FOLDS]}")
            before = found.setdefault(video, (visit, fold))
            if any(a and b and a != b for a, b in zip(before, (visit, fold), strict=True)):
                raise UserError(f"{path}: line {number}: video {video} has another visit or fold")
    return found


def _splits(
    request: Request,
    videos: dict[str, Path],
    table: dict[str, tuple[str, str]],
    visits: dict[str, str],
) -> dict[str, str]:
    """Returns video -> split: the data set's folds if folders or tables name them, else drawn.

    Raises:
        UserError: a folder and a table name different folds, or only some videos have one.
    """
    folds = {}
    for video, path in videos.items():
        by_folder = path.parent.name if path.parent.name in FOLDS else ""
        by_table = table.get(video, ("", ""))[1]
        if by_folder and by_table and by_folder != by_table:
            raise UserError(f"{path}: is of the fold {by_table} by the data set's table")
        folds[video] = by_folder or by_table
    if request.split or not any(folds.values()):
        return draw_splits(visits, request)
    unknown = [video for video, fold in folds.items() if not fold]
    if unknown:
        raise UserError(
            f"{videos[unknown[0]]}: no folder or table names its fold, Training or Validation, as "
            f"those of other videos ({len(unknown)} of {len(videos)})"
        )
    return {video: FOLDS[fold] for video, fold in folds.items()}


def make_scene(folder: Path, request: Request, categories: list[str]) -> Scene:
    """Returns one video as a scene.

    Args:
        folder: the folder `<id>`.
        request: gives the number of views and their grid.
        categories: the export's categories.

    Raises:
        UserError: a file is damaged, or no frame is usable.
    """
    video, dropped = folder.name, Counter[str]()
    frames_folder = folder / f"{video}_frames"
    sequence = open_arkit(frames_folder if frames_folder.is_dir() else folder, video)
    mesh_file, world, mesh = folder / f"{video}_3dod_mesh.ply", np.eye(4), None
    if os.path.lexists(mesh_file):
        mesh = read_mesh(mesh_file, world)
        world = floor_to_zero(mesh)
        mesh = mesh + world[:3, 3]
    else:
        dropped["mesh: a video has none, so nothing is asked about it"] += 1
    frames = spread_frames(sequence, request.views, request.patch_grid, IMAGE_SIDE, world, dropped)
    if not frames:
        why = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
        raise UserError(f"no usable frame ({why})")
    arrays = frame_arrays(frames)
    annotated = read_annotation(folder)
    if annotated is None:
        dropped["annotation: a video has none"] += 1
        return Scene(arrays, None, +dropped)
    names, boxes, lost = [], [], []
    for label, obb in annotated:
        if label in EXCLUDED_LABELS:
            continue
        try:
            box = upright_box(obb)
        except Dropped as reason:
            dropped[f"box: {reason}"] += 1
            lost.append(label)
            continue
        box[:3] += world[:3, 3]
        names.append(label)
        boxes.append(box)
    found = np.array(boxes).reshape(-1, 7)
    things = Things(tuple(names), found, pixels_in_boxes(found, frames), tuple(lost))
    return labelled_scene(video, arrays, things, mesh, categories, dropped)


def read_annotation(folder: Path) -> list[tuple[str, object]] | None:
    """Returns (label, oriented box as in the file) of a video's things, None if there are none.

    Raises:
        UserError: the file is damaged.
    """
    path = folder / f"{folder.name}_3dod_annotation.json"
    if not os.path.lexists(path):
        return None
    annotation = files.read_json_object(path)
    if annotation.get("skipped") is True:
        return None
    records = annotation.get("data")
    if not isinstance(records, list):
        raise UserError(f"{path}: no data")
    found = []
    for record in records:
        label = record.get("label") if isinstance(record, dict) else None
        segments = record.get("segments") if isinstance(record, dict) else None
        if not isinstance(label, str) or not isinstance(segments, dict):
            raise UserError(f"{path}: a thing must have a label and segments")
        found.append((label_of(label), segments.get("obbAligned")))
    return found
