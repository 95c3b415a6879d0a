"""ScanNet++ as an export; a scene is a laser scan with the pictures of one of its cameras.

The layout is the data set's own, with what its toolbox makes from the downloads:

    data/<id>/scans/mesh_aligned_0.05.ply               these three together, or none
    data/<id>/scans/segments.json, segments_anno.json
    data/<id>/iphone/                                   frames as `rgbd.iphone` reads them
    data/<id>/dslr/undistorted_images/ or resized_undistorted_images/    for --part dslr
    data/<id>/dslr/nerfstudio/transforms_undistorted.json       the intrinsic
    data/<id>/dslr/colmap/images.txt                            the poses
    splits/nvs_sem_train.txt, nvs_sem_val.txt, nvs_test.txt, sem_test.txt

The world frame is that of the mesh and of COLMAP's poses: metres, z up; if the floor of the mesh is
not at height 0, the scene is moved along z. (The poses in nerfstudio's file are of another world.)
`--part iphone`, the default, has the sensor's depth and stand-ins for `vggt/tokens`, as ScanNet:
the tokens contain depth. `--part dslr` has pictures, cameras and boxes; there is no depth and no
token. A box is the annotated one if it holds its thing's vertices and turns about z only, else the
axis-aligned box of the vertices.
"""

import dataclasses
import os
from collections import Counter
from pathlib import Path

import numpy as np

from geode_jax.errors import UserError
from geode_jax.exports import files
from geode_jax.sources.datasets import Report, Request
from geode_jax.sources.datasets.images import (
    Camera,
    natural_order,
    picture_arrays,
    read_intrinsic,
)
from geode_jax.sources.datasets.instances import (
    EXCLUDED_LABELS,
    Group,
    Labels,
    Things,
    floor_to_zero,
    label_of,
    labelled_scene,
    labels_of_segments,
    pixels_of_vertices,
    pixels_on_mesh,
    read_mesh,
)
from geode_jax.sources.datasets.scene_export import (
    Scene,
    exclude_from_training,
    listed_splits,
    write_scenes,
)
from geode_jax.sources.rgbd.frame import frame_arrays, spread_frames
from geode_jax.sources.rgbd.intrinsics import resized
from geode_jax.sources.rgbd.iphone import open_iphone
from geode_jax.sources.rgbd.sequence import Dropped, pose_of_row, rigid

VERSION = 1
"""Version of an export's content; goes up with every change of this converter."""
IMAGE_SIDE = 448
"""Side of the pictures, pixels."""
PARTS = ("iphone", "dslr")
"""The cameras, of which one is chosen; the first is the default."""
VERTEX_GRID = (64, 64)
"""(width, height) of the pictures in which vertices are counted for views without depth: a pixel is
several centimetres wide in a room, in which vertices are closer to each other than that."""
_LISTS = {
    "nvs_sem_train.txt": "train",
    "nvs_sem_val.txt": "val",
    "nvs_test.txt": "test",
    "sem_test.txt": "test",
}
_PICTURES = ("undistorted_images", "resized_undistorted_images")


def prepare(request: Request) -> Report:
    """Writes the export, see the module.

    Raises:
        UserError: the folder is not in the layout, or no scene can be used.
        ExportError: the export cannot be written.
    """
    part = _part(request)
    dataclasses.replace(request, parts=()).refuse_question_options("ScanNet++")
    folder = request.root / "data"
    found = sorted(p.name for p in folder.glob("*") if p.is_dir())
    if not found:
        raise UserError(f"{folder}: no scene: <id>/{part} and <id>/scans are looked for")
    report, places = Report(), {scene: scene for scene in found}
    lists = {request.root / "splits" / name: split for name, split in _LISTS.items()}
    splits = listed_splits(request, lists, places, folder, report)
    splits = exclude_from_training(splits, places, request, report)
    labels: set[str] = set()
    for scene in splits:
        try:
            labels.update(group.label for group in read_groups(folder / scene) or ())
        except UserError:
            continue  # the same error drops the scene when it is made
    categories = sorted(labels - EXCLUDED_LABELS)
    make = {"iphone": make_iphone_scene, "dslr": make_dslr_scene}[part]
    weights, contents = (
        ("a fixed function of the measured depth and the colour", "CONTAIN THE DEPTH")
        if part == "iphone"
        else ("absent", "are absent, as is depth")
    )
    return write_scenes(
        request,
        splits,
        lambda scene: make(folder / scene, request, categories),
        report,
        source=lambda scene: folder / scene,
        producer={
            "project": f"geode_jax ScanNet++ {part}",
            "commit": f"scannetpp version {VERSION}",
            "weights": f"none: tokens are {weights}",
            "licence": "ScanNet++ Terms of Use: not to be passed on",
        },
        categories=categories,
        tokens_contain_depth=part == "iphone",
        notes=f"ScanNet++ scenes, {part} pictures, the scan's aligned frame. No VGGT: the tokens "
        f"{contents}. Boxes turn about z and are of the instances that the views show.",
    )


def _part(request: Request) -> str:
    """Returns the chosen camera; raises UserError if none or several are chosen."""
    part, *more = request.parts or PARTS[:1]
    if more or part not in PARTS:
        raise UserError(f"--part: one of {', '.join(PARTS)}; an export has the pictures of one")
    return part


def make_iphone_scene(folder: Path, request: Request, categories: list[str]) -> Scene:
    """Returns one scene with the iPhone's pictures and depth.

    Raises:
        UserError: a file is damaged, or no frame is usable.
    """
    dropped = Counter[str]()
    sequence = open_iphone(folder / "iphone")
    labels, world = read_labels(folder)
    frames = spread_frames(sequence, request.views, request.patch_grid, IMAGE_SIDE, world, dropped)
    if not frames:
        why = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
        raise UserError(f"no usable frame ({why})")
    arrays = frame_arrays(frames)
    rays = None if labels is None else pixels_on_mesh(labels, frames)
    return _scene(folder.name, arrays, labels, rays, categories, dropped)


def make_dslr_scene(folder: Path, request: Request, categories: list[str]) -> Scene:
    """Returns one scene with the DSLR's pictures, without depth.

    Raises:
        UserError: a file is damaged, or no picture is usable.
    """
    dropped = Counter[str]()
    labels, world = read_labels(folder)
    cameras = {
        name: camera._replace(pose=world @ camera.pose)
        for name, camera in read_dslr_cameras(folder / "dslr", dropped).items()
    }
    places = [folder / "dslr" / name for name in _PICTURES]
    place = next((path for path in places if path.is_dir()), None)
    if place is None:
        raise UserError(
            f"{folder / 'dslr'}: no {' or '.join(_PICTURES)}: the toolbox of the data set makes "
            "them (dslr.undistort)"
        )
    found = [place / name for name in cameras if (place / name).is_file()]
    if len(found) < len(cameras):
        dropped["camera: its picture does not exist"] += len(cameras) - len(found)
    arrays = picture_arrays(sorted(found, key=natural_order), cameras, request, dropped)
    rays = None
    if labels is not None:
        rows, columns = (2 * n for n in request.patch_grid)
        intrinsic = np.array(
            [resized(k, (columns, rows), VERTEX_GRID) for k in arrays["camera/intrinsic"]]
        )
        rays = pixels_of_vertices(labels, arrays["camera/extrinsic"], intrinsic, VERTEX_GRID)
    return _scene(folder.name, arrays, labels, rays, categories, dropped)


def _scene(
    scene_id: str,
    arrays: dict[str, np.ndarray],
    labels: Labels | None,
    rays: np.ndarray | None,
    categories: list[str],
    dropped: Counter[str],
) -> Scene:
    """Returns a scene of these views and labels."""
    if labels is None or rays is None:
        dropped["annotation: a scene has none"] += 1
        return Scene(arrays, None, +dropped)
    dropped["box: no vertex, or flat"] += len(labels.lost)
    things = Things(labels.names, labels.boxes, rays, labels.lost, labels)
    return labelled_scene(
        scene_id, arrays, things, labels.vertices, categories, dropped, labels.notes
    )


# -------------------------------------------------------------------------------------- cameras


def read_dslr_cameras(folder: Path, dropped: Counter[str]) -> dict[str, Camera]:
    """Returns name of a picture -> its camera, of the pictures that are not blurred.

    Args:
        folder: `dslr` of a scene.
        dropped: gets the counts of pictures without a camera or a use, by reason.

    Raises:
        UserError: a file is missing or damaged.
    """
    path = folder / "nerfstudio" / "transforms_undistorted.json"
    everywhere = files.read_json_object(path)
    size, intrinsic = read_intrinsic(everywhere, str(path))
    poses = read_colmap_poses(folder / "colmap" / "images.txt")
    cameras: dict[str, Camera] = {}
    for kind in ("frames", "test_frames"):
        frames = everywhere.get(kind, [])
        if not isinstance(frames, list):
            raise UserError(f"{path}: {kind} must be a list")
        for number, frame in enumerate(frames, 1):
            name = frame.get("file_path") if isinstance(frame, dict) else None
            if not isinstance(name, str) or Path(name).name != name:
                raise UserError(f"{path}: {kind} {number}: file_path must be a file's name")
            if frame.get("is_bad"):
                dropped["picture: is_bad by the data set"] += 1
            elif name not in poses:
                dropped["picture: has no pose in colmap/images.txt"] += 1
            else:
                cameras[name] = Camera(size, intrinsic, poses[name])
    if not cameras:
        raise UserError(f"{path}: no picture that can be used has a pose")
    return cameras


def read_colmap_poses(path: Path) -> dict[str, np.ndarray]:
    """Returns name of a picture -> world-from-camera [4, 4] of COLMAP's `images.txt`.

    A picture has two lines: its number, qw qx qy qz, tx ty tz (camera-from-world), the camera's
    number and its name; and its points, which are not read.

    Raises:
        UserError: the file is missing or damaged.
    """
    poses: dict[str, np.ndarray] = {}
    lines = enumerate(files.read_text(path).splitlines(), 1)
    for number, line in lines:
        words = line.split(maxsplit=9)
        if not words or words[0].startswith("#"):
            continue
        next(lines, None)  # the points
        try:
            qw, qx, qy, qz, *place = (float(word) for word in words[1:8])
            motion = rigid(pose_of_row([*place, qx, qy, qz, qw]))
            name = words[9]
        except (ValueError, IndexError, Dropped):
            raise UserError(f"{path}: line {number}: is no pose of a picture") from None
        poses[Path(name).name] = np.linalg.inv(motion)
    if not poses:
        raise UserError(f"{path}: has no pose")
    return poses


# --------------------------------------------------------------------------------------- labels


def read_groups(folder: Path) -> list[Group] | None:
    """Returns the annotated instances of a scene, None without an annotation.

    Raises:
        UserError: the file is damaged.
    """
    path = folder / "scans" / "segments_anno.json"
    if not os.path.lexists(path):
        return None
    groups = files.read_json_object(path).get("segGroups")
    if not isinstance(groups, list):
        raise UserError(f"{path}: no segGroups")
    found = []
    for group in groups:
        label = group.get("label") if isinstance(group, dict) else None
        segments = group.get("segments") if isinstance(group, dict) else None
        if not isinstance(label, str) or not isinstance(segments, list):
            raise UserError(f"{path}: a group must have a label and segments")
        found.append(Group(label_of(label), segments, group.get("obb")))
    return found


def read_labels(folder: Path) -> tuple[Labels | None, np.ndarray]:
    """Returns a scene's instances, None if it has no annotation, and the motion to their frame.

    The motion [4, 4] from the scan's frame is the identity where the floor is at height 0.

    Raises:
        UserError: one of the three files is missing or damaged, or they do not belong together.
    """
    groups = read_groups(folder)
    if groups is None:
        return None, np.eye(4)
    vertices = read_mesh(folder / "scans" / "mesh_aligned_0.05.ply", np.eye(4))
    path = folder / "scans" / "segments.json"
    segments = files.read_json_object(path).get("segIndices")
    labels = labels_of_segments(groups, vertices, segments, path)
    world = floor_to_zero(vertices)
    boxes = labels.boxes.copy()
    boxes[:, :3] += world[:3, 3]
    return dataclasses.replace(labels, vertices=vertices + world[:3, 3], boxes=boxes), world
