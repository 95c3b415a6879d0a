"""RGB-D sequences on disk: which frames there are, their cameras, poses and images.

Layouts that are read (names are frame numbers, any number of digits):

    color/N.jpg|png   depth/N.png|pgm   16 bit, 0 = missing
    pose/N.txt                          4x4 camera-to-world, as ScanNet exports have it
    or pose.txt                         a row "tx ty tz qx qy qz qw" per frame, camera-to-world
    intrinsic/intrinsic_depth.txt, intrinsic/intrinsic_color.txt    3x3 or 4x4
"""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from geode_jax.data.rgbd_sequence import (
    Dropped,
    camera,
    pose_of_row,
    resized,
    rigid,
    to_metres,
)
from geode_jax.errors import UserError
from geode_jax.exports import files


@dataclasses.dataclass(frozen=True)
class RgbdFolder:
    """An RGB-D sequence on disk, not yet decoded.

    Attributes:
        folder: the one that holds `color` and `depth`.
        names: of all frames, in the order of the sequence.
        depth_size: (width, height) of the depth images.
        depth_intrinsic: [3, 3] at that size, pixel centres at integers.
        color_intrinsic: [3, 3] at the colour images' size; None = the depth camera's, scaled.
        mirrored: the folder's fy is negative, see `read_pose`.
        depth_scale: stored value of one metre.
        pose_rows: name -> row of pose.txt; None where poses have files of their own.
    """

    folder: Path
    names: tuple[str, ...]
    depth_size: tuple[int, int]
    depth_intrinsic: np.ndarray
    color_intrinsic: np.ndarray | None
    mirrored: bool
    depth_scale: float
    pose_rows: dict[str, list[float]] | None

    def read_pose(self, name: str) -> np.ndarray:
        """World-from-camera [4, 4], OpenCV axes, rotation exactly orthonormal.

        Raises:
            Dropped: missing, not finite, not a rigid motion.
        """
        if self.pose_rows is None:
            path = self.folder / "pose" / f"{name}.txt"
            if not path.is_file():
                raise Dropped("no pose")
            numbers = _numbers(path)
            if numbers is None or len(numbers) != 16:
                raise Dropped("unreadable pose")
            pose = np.array(numbers).reshape(4, 4)
        else:
            pose = pose_of_row(self.pose_rows[name])
        pose = rigid(pose)
        if self.mirrored:
            # Camera axes x right, y up, z forward (ICL-NUIM) see a mirrored world. Mirroring
            # camera and world along y gives OpenCV axes and the world as it was.
            pose = np.diag([1, -1, 1, 1]) @ pose @ np.diag([1, -1, 1, 1])
        return pose

    def read_depth(self, name: str) -> np.ndarray:
        """Depth [height, width] float32 metres, 0 = missing (the value 65535 too).

        Raises:
            Dropped: missing, unreadable, not 16 bit, of another size, without any depth.
        """
        image = _image(self.folder / "depth", name, _DEPTH, "depth")
        if not image.mode.startswith("I"):
            raise Dropped("depth image not 16 bit")
        if image.size != self.depth_size:
            raise Dropped("depth image of another size")
        return to_metres(np.asarray(image), self.depth_scale)

    def read_color(self, name: str) -> Image.Image:
        """The colour image, RGB.

        Raises:
            Dropped: missing or unreadable.
        """
        return _image(self.folder / "color", name, _COLOR, "colour").convert("RGB")


_COLOR, _DEPTH = (".jpg", ".jpeg", ".png"), (".png", ".pgm")


def open_folder(
    folder: str | Path,
    intrinsic: tuple[float, float, float, float] | None = None,
    depth_scale: float = 1000.0,
) -> RgbdFolder:
    """Finds out what a folder holds.

    Args:
        folder: one with `color` and `depth`, or with a single such folder up to two levels below.
        intrinsic: (fx, fy, cx, cy) in pixels of the depth image, instead of the folder's own.
        depth_scale: stored value of one metre.

    Raises:
        UserError: the folder is missing or has no such layout, or its camera is unknown.
    """
    root = _find_root(Path(folder))
    stems = {
        path.stem
        for kind, types in (("color", _COLOR), ("depth", _DEPTH), ("pose", (".txt",)))
        for path in (root / kind).glob("*")
        if path.suffix in types and path.stem.isdecimal()
    }
    names = tuple(sorted(stems, key=lambda name: (int(name), name)))
    if not names:
        raise UserError(f"{root}: no frame: names in color/ and depth/ must be numbers")
    if not (np.isfinite(depth_scale) and depth_scale > 0):
        raise UserError(f"{root}: depth_scale must be positive, is {depth_scale}")
    if (root / "pose").is_dir():
        rows = None
    else:
        rows = _read_pose_rows(root / "pose.txt", names)
    size, depth_k, color_k = _read_cameras(root, names, intrinsic)
    mirrored = bool(depth_k[1, 1] < 0)
    color_k = None if color_k is None else np.abs(color_k)
    return RgbdFolder(root, names, size, np.abs(depth_k), color_k, mirrored, depth_scale, rows)


def _find_root(folder: Path) -> Path:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    for level in ([folder], folder.glob("*"), folder.glob("*/*")):
        found = sorted(p for p in level if (p / "color").is_dir() and (p / "depth").is_dir())
        if len(found) > 1:
            raise UserError(f"{folder}: holds {len(found)} RGB-D folders; name one: {found[0]}")
        if found:
            return found[0]
    raise UserError(f"{folder}: no RGB-D folder: color/ and depth/ are needed")


def _numbers(path: Path) -> list[float] | None:
    """All numbers of a text file; None where it cannot be read as numbers."""
    try:
        return [float(word) for word in files.read_text(path).split()]
    except ValueError:
        return None


def _file(folder: Path, name: str, types: Sequence[str]) -> Path | None:
    return next((p for t in types if (p := folder / (name + t)).is_file()), None)


def _image(folder: Path, name: str, types: Sequence[str], what: str) -> Image.Image:
    path = _file(folder, name, types)
    if path is None:
        raise Dropped(f"no {what} image")
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except Exception:  # PIL's decoders raise whatever a damaged file makes them
        raise Dropped(f"unreadable {what} image") from None


def _size(folder: Path, names: Sequence[str], types: Sequence[str]) -> tuple[int, int] | None:
    """(width, height) that most of the images have, from their headers."""
    sizes: Counter = Counter()
    for name in names:
        path = _file(folder, name, types)
        if path is not None:
            try:
                with Image.open(path) as image:
                    sizes[image.size] += 1
            except Exception:  # as in `_image`; the frame's fate will tell
                continue
    return sizes.most_common(1)[0][0] if sizes else None


def _read_cameras(root: Path, names: Sequence[str], given) -> tuple:
    """(depth size, depth intrinsic, colour intrinsic or None); fy keeps its sign."""
    some = names[:: max(1, len(names) // 32)]
    size, color_size = _size(root / "depth", some, _DEPTH), _size(root / "color", some, _COLOR)
    for kind, found in (("depth", size), ("color", color_size)):
        if found is None:
            raise UserError(f"{root / kind}: no readable image")
    if given is not None:
        fx, fy, cx, cy = given
        return size, camera("intrinsic given", fx, fy, cx, cy, size), None
    depth, color = (
        _read_intrinsic(root / "intrinsic" / f"intrinsic_{kind}.txt", image_size)
        for kind, image_size in (("depth", size), ("color", color_size))
    )
    if depth is None and color is None:
        raise UserError(
            f"{root}: camera unknown: neither intrinsic/intrinsic_depth.txt is there nor was an "
            "intrinsic (fx, fy, cx, cy) given"
        )
    return size, resized(color, color_size, size) if depth is None else depth, color


def _read_intrinsic(path: Path, size: tuple[int, int]) -> np.ndarray | None:
    if not path.is_file():
        return None
    numbers = _numbers(path)
    if numbers is None or len(numbers) not in (9, 16):
        raise UserError(f"{path}: must be a 3x3 or 4x4 matrix")
    side = 3 if len(numbers) == 9 else 4
    matrix = np.array(numbers).reshape(side, side)
    return camera(str(path), matrix[0, 0], matrix[1, 1], matrix[0, 2], matrix[1, 2], size)


def _read_pose_rows(path: Path, names: Sequence[str]) -> dict[str, list[float]]:
    """Rows of pose.txt by frame; row k belongs to the k-th name."""
    if not path.is_file():
        raise UserError(f"{path.parent}: no poses: neither pose/ nor pose.txt")
    try:
        rows = [
            [float(word) for word in line.split()] for line in files.read_text(path).splitlines()
        ]
    except ValueError:
        raise UserError(f"{path}: not rows of numbers") from None
    rows = [row for row in rows if row]
    if any(len(row) != 7 for row in rows):
        raise UserError(f"{path}: rows must be tx ty tz qx qy qz qw")
    if len(rows) != len(names):
        raise UserError(f"{path}: {len(rows)} rows for {len(names)} frames")
    return dict(zip(names, rows, strict=True))
