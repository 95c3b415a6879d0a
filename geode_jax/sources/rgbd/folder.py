"""RGB-D folders: their frames, cameras, poses and images.

Layouts that are read (N is the frame's number, with any number of digits):

    color/N.jpg|png   depth/N.png|pgm   depth has 16 bits, 0 = missing; upper-case endings and
                                        other picture formats of colour are read too
    pose/N.txt                          4x4 camera-to-world, as ScanNet exports have it
    or pose.txt                         one row "tx ty tz qx qy qz qw" per frame, camera-to-world
    intrinsic/intrinsic_depth.txt, intrinsic/intrinsic_color.txt    3x3 or 4x4

Colour is rotated by its orientation flag (`exports.pictures`) if the sizes prove that depth belongs
to the rotated picture, as for depth in portrait and a stored colour picture in landscape. Other
flags are refused, because depth has no flag and may or may not have been rotated. An intrinsic for
pictures of another size is scaled to the pictures if that size is certain, and refused otherwise
(`intrinsics.of_one_view`).
"""

import contextlib
import dataclasses
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from geode_jax.errors import UserError
from geode_jax.exports import files, pictures
from geode_jax.sources.rgbd.intrinsics import Given, of_one_view, same_shape
from geode_jax.sources.rgbd.sequence import Dropped, pose_of_row, rigid, to_metres


@dataclasses.dataclass(frozen=True)
class RgbdFolder:
    """An RGB-D sequence on disk, not yet decoded.

    Attributes:
        folder: the folder with `color` and `depth`.
        names: all frames, in the order of the sequence.
        depth_size: (width, height) of the depth images.
        depth_intrinsic: [3, 3] at that size, pixel centres at integers.
        color_size: (width, height) of the colour images after rotation by their flags.
        color_intrinsic: [3, 3] at that size; None means the depth camera's, scaled.
        mirrored: whether the folder's fy is negative, see `read_pose`.
        depth_scale: stored value of one metre.
        pose_rows: name -> row of pose.txt; None if there is a file per pose.
        color, depth: name -> image.
        notes: what was corrected on reading, a line each.
    """

    folder: Path
    names: tuple[str, ...]
    depth_size: tuple[int, int]
    depth_intrinsic: np.ndarray
    color_size: tuple[int, int]
    color_intrinsic: np.ndarray | None
    mirrored: bool
    depth_scale: float
    pose_rows: dict[str, list[float]] | None
    color: dict[str, Path]
    depth: dict[str, Path]
    notes: tuple[str, ...] = ()

    def read_pose(self, name: str) -> np.ndarray:
        """Returns world-from-camera [4, 4], OpenCV axes, rotation exactly orthonormal.

        Raises:
            Dropped: the pose is missing, unreadable, not finite, or not a rigid motion.
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
            # With camera axes x right, y up, z forward (ICL-NUIM) the world is mirrored. Mirroring
            # camera and world along y gives OpenCV axes and the unmirrored world.
            pose = np.diag([1, -1, 1, 1]) @ pose @ np.diag([1, -1, 1, 1])
        return pose

    def read_cameras(self, name: str) -> tuple[np.ndarray, np.ndarray | None]:
        """Returns the intrinsics of depth and colour, which are those of all frames."""
        return self.depth_intrinsic, self.color_intrinsic

    def read_depth(self, name: str) -> np.ndarray:
        """Returns depth [height, width] float32 metres, 0 = missing (stored as 0 or 65535).

        Raises:
            Dropped: the image is missing, unreadable, not of 16 bits, of another size, or without
                any depth.
        """
        if name not in self.depth:
            raise Dropped("no depth image")
        try:
            stored = pictures.read_depth(self.depth[name])
        except UserError as error:
            raise _dropped("depth", error) from None
        if stored.shape != self.depth_size[::-1]:
            raise Dropped("depth image of another size")
        return to_metres(stored, self.depth_scale)

    def read_color(self, name: str) -> Image.Image:
        """Returns the colour image, RGB, rotated by its orientation flag.

        Raises:
            Dropped: the image is missing, unreadable, of another size, or has an orientation flag
                that depth does not confirm.
        """
        if name not in self.color:
            raise Dropped("no colour image")
        try:
            flag = pictures.orientation(self.color[name])
            image = pictures.read_picture(self.color[name])
        except UserError as error:
            raise _dropped("colour", error) from None
        if image.size != self.color_size:
            raise Dropped("colour image of another size")
        if not _oriented_as_depth(image.size, flag, self.depth_size):
            raise Dropped("colour image with an orientation flag that depth does not confirm")
        return image


_COLOR, _DEPTH = pictures.ENDINGS, (".png", ".pgm")


def _dropped(what: str, error: UserError) -> Dropped:
    """Returns the reason for dropping an image; without its path, so that reasons are countable."""
    rule = getattr(error, "rule", "")
    return Dropped(f"{what} image {rule}" if rule else f"unreadable {what} image")


def open_folder(
    folder: str | Path,
    intrinsic: tuple[float, float, float, float] | None = None,
    depth_scale: float = 1000.0,
) -> RgbdFolder:
    """Returns the sequence in a folder; reads names, headers and cameras, but no images.

    Args:
        folder: one with `color` and `depth`, or with a single such folder up to two levels below.
        intrinsic: (fx, fy, cx, cy) in pixels of the depth image, instead of the folder's own.
        depth_scale: stored value of one metre.

    Raises:
        UserError: the folder is missing or has another layout, or its camera is unknown.
    """
    root = _find_root(Path(folder))
    color, depth = _files(root / "color", _COLOR), _files(root / "depth", _DEPTH)
    stems = {*color, *depth, *_files(root / "pose", (".txt",))}
    names = tuple(sorted(stems, key=lambda name: (int(name), name)))
    if not names:
        raise UserError(f"{root}: no frame: names in color/ and depth/ must be numbers")
    if not (np.isfinite(depth_scale) and depth_scale > 0):
        raise UserError(f"{root}: depth_scale must be positive, is {depth_scale}")
    if (root / "pose").is_dir():
        rows = None
    else:
        rows = _read_pose_rows(root / "pose.txt", names)
    size = _size(root / "depth", names, depth)
    color_size = _size(root / "color", names, color, beside=size)
    depth_k, color_k, notes = _read_cameras(root, size, color_size, intrinsic)
    mirrored = bool(depth_k[1, 1] < 0)
    color_k = None if color_k is None else np.abs(color_k)
    return RgbdFolder(
        root,
        names,
        size,
        np.abs(depth_k),
        color_size,
        color_k,
        mirrored,
        depth_scale,
        rows,
        color,
        depth,
        tuple(notes),
    )


def _find_root(folder: Path) -> Path:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    for level in ([folder], folder.glob("*"), folder.glob("*/*")):
        found = sorted(p for p in level if (p / "color").is_dir() and (p / "depth").is_dir())
        if len(found) > 1:
            raise UserError(f"{folder}: holds {len(found)} RGB-D folders; name one: {found[0]}")
        if found:
            return found[0]
    raise UserError(
        f"{folder}: no RGB-D folder: color/ and depth/ are needed; "
        "docs/how-to/exporters.md is about pictures without depth"
    )


def _numbers(path: Path) -> list[float] | None:
    """Returns all numbers of a text file, None if it cannot be read as numbers."""
    try:
        return [float(word) for word in files.read_text(path).split()]
    except ValueError:  # UserError too
        return None


def _files(folder: Path, types: Sequence[str]) -> dict[str, Path]:
    """Returns frame -> its file; of two files of one frame, that with the earlier type."""
    found = [p for p in sorted(folder.glob("*")) if p.stem.isdecimal() and p.is_file()]
    of_type = ([p for p in found if p.suffix.lower() == t] for t in reversed(types))
    return {path.stem: path for paths in of_type for path in paths}


def _size(
    folder: Path,
    names: Sequence[str],
    images: dict[str, Path],
    beside: tuple[int, int] | None = None,
) -> tuple[int, int]:
    """Returns the (width, height) that most images have after rotation by their flags.

    Args:
        folder: folder of the images, named in messages.
        names: the frames.
        images: frame -> image.
        beside: size of the depth images. Images with a flag that it does not confirm are ignored.

    Raises:
        UserError: no image is readable, or all have flags that depth does not confirm.
    """
    sizes: Counter = Counter()
    flags: Counter = Counter()
    for name in names[:: max(1, len(names) // 32)]:
        with contextlib.suppress(KeyError, UserError):  # the frame is dropped when it is read
            size, flag = pictures.shown_size(images[name]), pictures.orientation(images[name])
            if beside is None or _oriented_as_depth(size, flag, beside):
                sizes[size] += 1
            else:
                flags[flag] += 1
    if not sizes and flags:
        flag = flags.most_common(1)[0][0]
        raise UserError(
            f"{folder}: pictures have the orientation flag {flag} and depth has none, so it is "
            "unknown whether depth was rotated; rotate the pictures' pixels and remove the flag"
        )
    if not sizes:
        raise UserError(f"{folder}: no readable image")
    return sizes.most_common(1)[0][0]


def _oriented_as_depth(size: tuple[int, int], flag: int, depth: tuple[int, int]) -> bool:
    """Returns whether a picture has no flag, or is in depth's orientation thanks to its flag."""
    if flag == 1:
        return True
    landscape = [width > height for width, height in (size, depth)]
    square = any(same_shape((width, height), (height, width)) for width, height in (size, depth))
    return flag >= 5 and landscape[0] == landscape[1] and not square


def _read_cameras(
    root: Path,
    size: tuple[int, int],
    color_size: tuple[int, int],
    given: tuple[float, float, float, float] | None,
) -> tuple[np.ndarray, np.ndarray | None, list[str]]:
    """Returns the intrinsics of depth and colour (or None), and notes; fy keeps its sign."""
    if given is not None:
        fx, fy, cx, cy = given
        matrix = np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1.0]])
        depth, color = Given("intrinsic given", matrix, size), None
    else:
        folder = root / "intrinsic"
        depth = _read_intrinsic(folder / "intrinsic_depth.txt", size)
        color = _read_intrinsic(folder / "intrinsic_color.txt", color_size)
    if depth is None and color is None:
        raise UserError(
            f"{root}: camera unknown: there is no intrinsic/intrinsic_depth.txt, and no intrinsic "
            "(fx, fy, cx, cy) was given"
        )
    if depth is not None and color is not None and depth.matrix[1, 1] * color.matrix[1, 1] < 0:
        raise UserError(f"{color.where}: fy has another sign than that of depth")
    return of_one_view(depth, color, (size, color_size))


def _read_intrinsic(path: Path, size: tuple[int, int]) -> Given | None:
    """Returns the intrinsic in a file for pictures of a size, None if there is no file."""
    if not os.path.lexists(path):  # a dangling link is an error, not a missing file
        return None
    numbers = _numbers(path)
    if numbers is None or len(numbers) not in (9, 16):
        raise UserError(f"{path}: must be a 3x3 or 4x4 matrix")
    side = 3 if len(numbers) == 9 else 4
    matrix = np.array(numbers).reshape(side, side)
    (fx, _, cx), (_, fy, cy) = matrix[0, :3], matrix[1, :3]
    pinhole = np.eye(side)
    pinhole[:2, :3] = [[fx, 0, cx], [0, fy, cy]]
    if not np.abs(matrix - pinhole).max() <= MAX_SKEW * max(abs(fx), 1):
        raise UserError(f"{path}: must be fx 0 cx, 0 fy cy, 0 0 1 row by row, as of a pinhole")
    return Given(str(path), pinhole[:3, :3], size)


MAX_SKEW = 1e-3
"""Largest deviation of an intrinsic from a pinhole camera's, as a share of the focal length."""


def _read_pose_rows(path: Path, names: Sequence[str]) -> dict[str, list[float]]:
    """Returns frame -> row of pose.txt; row k belongs to the k-th frame."""
    if not path.is_file():
        raise UserError(f"{path.parent}: no poses: neither pose/ nor pose.txt")
    try:
        lines = files.read_text(path).splitlines()
        rows = [[float(word) for word in line.split()] for line in lines]
    except ValueError:  # UserError too
        raise UserError(f"{path}: not rows of numbers") from None
    rows = [row for row in rows if row]
    if any(len(row) != 7 for row in rows):
        raise UserError(f"{path}: rows must be tx ty tz qx qy qz qw")
    if len(rows) != len(names):
        raise UserError(f"{path}: {len(rows)} rows for {len(names)} frames")
    return dict(zip(names, rows, strict=True))
