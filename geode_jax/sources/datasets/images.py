"""Folders of pictures, or single pictures and videos, as an export.

A scene is a folder, or, with the part `files`, one picture or video (of which evenly spaced frames
are taken) anywhere below the root; its id is its path with `_` between the folders.

    <scene>/*.jpg|png|...       or in <scene>/images/; in natural order, 2.jpg before 10.jpg
    <scene>/transforms.json     optional: cameras, in the format of nerfstudio and instant-ngp

`transforms.json` has `frames`, of which each has `file_path` and `transform_matrix` (4 x 4,
world-from-camera, OpenGL axes: x right, y up, z back), and, for all frames or for each, `fl_x`,
`fl_y`, `cx`, `cy`, `w`, `h` in pixels (the middle of the first pixel is at 0.5). Pictures must be
without distortion. A scene of which a picture has a camera keeps only the pictures that have one.

There is no depth, no box, no token and no question. The export is what VGGT's exporter, `internvit`
and `prepare --source jsonl` go on from. Its scale is `scene`; with `--metric`, which says that the
cameras' world is in metres with z up, it is `metric`. Pictures are squeezed into squares, and
intrinsics are those of maps of 2 x 2 cells a patch, as for other sources.
"""

import dataclasses
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from geode_jax.errors import UserError
from geode_jax.exports import files, pictures, videos
from geode_jax.sources.datasets import Report, Request
from geode_jax.sources.datasets.scene_export import (
    Scene,
    draw_splits,
    exclude_from_training,
    write_scenes,
)
from geode_jax.sources.rgbd.intrinsics import camera, resized, same_shape
from geode_jax.sources.rgbd.sequence import Dropped, rigid

VERSION = 1
"""Version of an export's content; goes up with every change of this converter."""
IMAGE_SIDE = 448
"""Side of the pictures, pixels."""
UNREAD = (".avif", ".dng", ".heic", ".heif", ".jp2", ".tif", ".tiff")
"""Endings of pictures that are not read; they are counted."""
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")
_OPENGL = np.diag([1.0, -1.0, -1.0, 1.0])
"""OpenGL's camera axes (x right, y up, z back) in OpenCV's (x right, y down, z ahead)."""


class Camera(NamedTuple):
    """A picture's camera.

    Attributes:
        size: (width, height) of the picture that the intrinsic is for.
        intrinsic: [3, 3], pixel centres at integers.
        pose: [4, 4] world-from-camera, OpenCV axes.
    """

    size: tuple[int, int]
    intrinsic: np.ndarray
    pose: np.ndarray


def prepare(request: Request) -> Report:
    """Writes the export, see the module.

    Raises:
        UserError: the folder is not in the layout, or no scene can be used.
        ExportError: the export cannot be written.
    """
    if request.parts not in ((), ("folders",), ("files",)):
        raise UserError(f"--part: {' '.join(request.parts)} is not one of folders, files")
    dataclasses.replace(request, parts=()).refuse_question_options("a folder of pictures")
    report = Report()
    if request.parts == ("files",):
        scenes = _single_files(request.root, report)
    else:
        scenes = {path.name: path for path in sorted(request.root.glob("*")) if path.is_dir()}
        scenes = {name: path for name, path in scenes.items() if picture_files(path)}
    if not scenes:
        wanted = "a .jpg, .png or .mp4" if request.parts == ("files",) else "<scene>/*.jpg or .png"
        raise UserError(f"{request.root}: no scene: {wanted} is looked for")
    for name, path in scenes.items():
        if not _NAME.fullmatch(name):
            raise UserError(f"{path}: the name of a scene may have letters, digits, '.', '_', '-'")
        if request.metric and not os.path.lexists(path / "transforms.json"):
            raise UserError(f"--metric: {path} has no transforms.json, so its scale is unknown")
    places = {name: name for name in scenes}
    splits = exclude_from_training(draw_splits(places, request), places, request, report)
    return write_scenes(
        request,
        {name: splits[name] for name in scenes if name in splits},
        lambda name: make_scene(scenes[name], request),
        report,
        source=lambda name: scenes[name],
        producer={
            "project": "geode_jax pictures",
            "commit": f"images version {VERSION}",
            "weights": "none: there are no tokens",
            "licence": f"that of the pictures in {request.root.resolve().name}",
        },
        categories=[],
        tokens_contain_depth=False,
        scale="metric" if request.metric else "scene",
        notes="Folders of pictures, squeezed into squares. No depth, boxes, tokens or questions.",
    )


def _single_files(root: Path, report: Report) -> dict[str, Path]:
    """Returns the pictures and videos below a folder by the ids of their scenes.

    Files whose names have characters that an id cannot have are counted.

    Raises:
        UserError: two files would have the same id.
    """
    scenes: dict[str, Path] = {}
    for path in sorted(root.rglob("*"), key=lambda path: path.parts):
        ending = path.suffix.lower()
        if ending in UNREAD:
            report.dropped[f"picture: {ending} is not read"] += 1
        if ending not in (*pictures.ENDINGS, *videos.ENDINGS) or not path.is_file():
            continue
        name = "_".join(path.relative_to(root).with_suffix("").parts)
        if not _NAME.fullmatch(name):
            report.dropped["file: its name has other characters than letters, digits, . _ -"] += 1
        elif name in scenes:
            raise UserError(f"{path}: would be the scene {name}, as {scenes[name]}")
        else:
            scenes[name] = path
    return scenes


def picture_files(folder: Path) -> list[Path]:
    """Returns the pictures in a folder, else those in its `images`, in natural order."""
    known = (*pictures.ENDINGS, *UNREAD)
    for place in (folder, folder / "images"):
        found = [p for p in place.glob("*") if p.suffix.lower() in known]
        if found:
            return sorted(found, key=natural_order)
    return []


def natural_order(path: Path) -> list:
    """Returns a sort key that puts 2.jpg before 10.jpg."""
    parts = re.split(r"(\d+)", path.name)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]


def make_scene(folder: Path, request: Request) -> Scene:
    """Returns one folder, picture or video as a scene.

    Raises:
        UserError: the cameras are damaged, or no picture is usable.
    """
    dropped: Counter[str] = Counter()
    if folder.suffix.lower() in videos.ENDINGS and folder.is_file():
        return Scene(video_arrays(folder, request.views), None, dropped)
    if folder.is_file():
        return Scene(picture_arrays([folder], None, request, dropped), None, +dropped)
    found = []
    for path in picture_files(folder):
        if path.suffix.lower() in UNREAD:
            dropped[f"picture: {path.suffix.lower()} is not read"] += 1
        else:
            found.append(path)
    cameras = None
    if os.path.lexists(folder / "transforms.json"):
        cameras = read_transforms(folder / "transforms.json", dropped)
        names = {path.name for path in found}
        absent = sum(name not in names for name in cameras)
        if absent:
            dropped["camera: its picture does not exist"] += absent
        without = [path for path in found if path.name not in cameras]
        if without:
            dropped["picture: has no camera in transforms.json"] += len(without)
        found = [path for path in found if path.name in cameras]
    return Scene(picture_arrays(found, cameras, request, dropped), None, +dropped)


def video_arrays(path: Path, views: int) -> dict[str, np.ndarray]:
    """Returns `images` and `frame_index` of evenly spaced frames of a video, as squares.

    Raises:
        UserError: the video cannot be read, or is cut off.
    """
    frames, indices = videos.read_frames(path, views)
    squares = [Image.fromarray(np.ascontiguousarray(frame)) for frame in frames]
    size = (IMAGE_SIDE, IMAGE_SIDE)
    images = [np.asarray(square.resize(size, Image.Resampling.BILINEAR)) for square in squares]
    return {"images": np.array(images), "frame_index": indices.astype(np.int32)}


def picture_arrays(
    found: Sequence[Path],
    cameras: dict[str, Camera] | None,
    request: Request,
    dropped: Counter[str],
) -> dict[str, np.ndarray]:
    """Returns `images` and, if known, `camera/*` of views spread evenly over pictures.

    A neighbour replaces a picture that cannot be used.

    Args:
        found: the pictures, in order.
        cameras: name of a picture -> its camera; None if they are unknown.
        request: gives the number of views and their grid.
        dropped: gets the counts of pictures that are not among the views, by reason.

    Raises:
        UserError: no picture is usable.
    """
    images, used = [], []
    for part in np.array_split(np.arange(len(found)), min(request.views, len(found)) or 1):
        middle = len(part) // 2
        for n in sorted(range(len(part)), key=lambda n: abs(n - middle)):
            path = found[part[n]]
            try:
                image = pictures.read_picture(path)
            except UserError:
                dropped["picture: cannot be read"] += 1
                continue
            if cameras is not None and not same_shape(image.size, cameras[path.name].size):
                dropped["picture: of another shape than its camera's"] += 1
                continue
            square = image.resize((IMAGE_SIDE, IMAGE_SIDE), Image.Resampling.BILINEAR)
            images.append(np.asarray(square))
            used.append(path.name)
            break
    if not images:
        why = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
        raise UserError(f"no usable picture ({why})" if why else "no usable picture")
    bad = dropped["picture: cannot be read"]
    bad += dropped["picture: of another shape than its camera's"]
    if len(found) > len(used) + bad:
        dropped[f"picture: not among the {request.views} views"] += len(found) - len(used) - bad
    arrays = {"images": np.array(images)}
    if cameras is not None:
        rows, columns = (2 * n for n in request.patch_grid)
        views = [cameras[name] for name in used]
        from_world = np.linalg.inv([view.pose for view in views])
        arrays["camera/extrinsic"] = from_world[:, :3].astype(np.float32)
        arrays["camera/intrinsic"] = np.array(
            [resized(view.intrinsic, view.size, (columns, rows)) for view in views], np.float32
        )
    return arrays


# -------------------------------------------------------------------------------------- cameras

_NUMBERS = ("fl_x", "fl_y", "cx", "cy", "w", "h")
_DISTORTION = ("k1", "k2", "k3", "k4", "p1", "p2")


def read_transforms(path: Path, dropped: Counter[str]) -> dict[str, Camera]:
    """Returns name of a picture -> its camera, from a `transforms.json`.

    Args:
        path: the file.
        dropped: gets the counts of the frames whose poses are no rigid motions.

    Raises:
        UserError: the file is damaged, has no frame, has two of one name, or a camera is
            impossible or has a distortion.
    """
    everywhere = files.read_json_object(path)
    frames = everywhere.get("frames")
    if not isinstance(frames, list) or not frames:
        raise UserError(f"{path}: no frames")
    cameras: dict[str, Camera] = {}
    names = set()
    for number, frame in enumerate(frames, 1):
        where = f"{path}: frame {number}"
        if not isinstance(frame, dict) or not isinstance(frame.get("file_path"), str):
            raise UserError(f"{where}: must have a file_path")
        name = PurePosixPath(frame["file_path"].replace("\\", "/")).name
        if name in names:
            raise UserError(f"{where}: {files.one_line(name, 80)!r} is the picture of another too")
        names.add(name)
        size, intrinsic = read_intrinsic(everywhere | frame, where)
        try:
            pose = rigid(_matrix(frame.get("transform_matrix"), f"{where}: transform_matrix"))
        except Dropped as reason:
            dropped[f"camera: {reason}"] += 1
            continue
        cameras[name] = Camera(size, intrinsic, pose @ _OPENGL)
    return cameras


def read_intrinsic(record: dict, where: str) -> tuple[tuple[int, int], np.ndarray]:
    """Returns (width, height) and the intrinsic [3, 3] of a record of a `transforms.json`.

    Raises:
        UserError: numbers are missing or impossible, or there is a distortion.
    """
    for name in (*_NUMBERS, *(k for k in _DISTORTION if k in record)):
        if type(record.get(name)) not in (int, float):
            raise UserError(f"{where}: must have a number {name}")
    if any(record.get(name) for name in _DISTORTION):
        raise UserError(f"{where}: the pictures are distorted; undistort them first")
    fx, fy, cx, cy, *sides = (float(record[name]) for name in _NUMBERS)
    if not all(side.is_integer() and 0 < side < 1 << 16 for side in sides):
        raise UserError(f"{where}: w and h must be numbers of pixels")
    size = (int(sides[0]), int(sides[1]))
    return size, camera(where, fx, fy, cx - 0.5, cy - 0.5, size)


def _matrix(value: Any, where: str) -> np.ndarray:
    """Returns 4 x 4 numbers from JSON; raises UserError if they are none."""
    try:
        matrix = np.array(value, np.float64)
    except (TypeError, ValueError, OverflowError):
        matrix = np.zeros(0)
    if matrix.shape != (4, 4):
        raise UserError(f"{where}: must be 4 x 4 numbers")
    return matrix
