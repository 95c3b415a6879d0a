"""What every reader of RGB-D sequences gives: a camera on its way, read frame by frame.

Readers: `rgbd_folder` (images and text files), `datasets.sens` (one file of ScanNet).
"""

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from PIL import Image

from geode_jax.errors import UserError
from geode_jax.exports import ROTATION_TOLERANCE, cameras

SHAPE = 1.02
"""Within which the shapes of two pictures are the same; ScanNet's are within 1.005."""
_FACTORS = (3 / 2, 2, 3, 4, 6, 8)
"""By which pictures are resized."""
_SIZES = ((640, 480), (1296, 968))
"""Of ScanNet's cameras, whose one picture is often brought to the size of the other."""
_NEAR, _EXACT, _SAME_FIELD, _SAME_SIZE = 0.03, 0.003, 1.05, 1.005
"""See `_original_size`."""


class Dropped(Exception):
    """Why a frame cannot be used."""


class RgbdSequence(Protocol):
    """An RGB-D sequence on disk, decoded frame by frame."""

    @property
    def names(self) -> tuple[str, ...]:
        """Of all frames, in the order of the sequence."""

    @property
    def depth_size(self) -> tuple[int, int]:
        """(width, height) of the depth images."""

    @property
    def depth_intrinsic(self) -> np.ndarray:
        """[3, 3] at that size, pixel centres at integers."""

    @property
    def color_intrinsic(self) -> np.ndarray | None:
        """[3, 3] at the colour images' size; None = the depth camera's, scaled."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What was corrected on reading, a line each."""

    def read_pose(self, name: str) -> np.ndarray:
        """World-from-camera [4, 4], OpenCV axes, rotation exactly orthonormal.

        Raises:
            Dropped: missing, not finite, not a rigid motion.
        """

    def read_depth(self, name: str) -> np.ndarray:
        """Depth [height, width] float32 metres, 0 = missing.

        Raises:
            Dropped: missing, unreadable, of another size, without any depth.
        """

    def read_color(self, name: str) -> Image.Image:
        """The colour image, RGB.

        Raises:
            Dropped: missing or unreadable.
        """


def rigid(pose: np.ndarray) -> np.ndarray:
    """The rigid motion [4, 4] that a matrix read from a file is meant to be.

    Raises:
        Dropped: not finite (ScanNet: -inf where tracking was lost), not rigid.
    """
    if not np.isfinite(pose).all():
        raise Dropped("pose not finite")
    rotation = pose[:3, :3]
    error = np.abs(rotation @ rotation.T - np.eye(3)).max()
    if error > ROTATION_TOLERANCE or np.linalg.det(rotation) < 0:
        raise Dropped("pose not rigid")
    if np.abs(pose[3] - (0, 0, 0, 1)).max() > ROTATION_TOLERANCE:
        raise Dropped("pose not rigid")
    u, _, vt = np.linalg.svd(rotation)
    motion = np.eye(4)
    motion[:3, :3], motion[:3, 3] = u @ vt, pose[:3, 3]
    return motion


def pose_of_row(row: Sequence[float]) -> np.ndarray:
    """World-from-camera [4, 4] of tx ty tz qx qy qz qw; not finite where the quaternion is 0."""
    with np.errstate(invalid="ignore"):
        x, y, z, w = np.array(row[3:]) / np.linalg.norm(row[3:])
    pose = np.eye(4)
    pose[:3, :3] = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ]
    pose[:3, 3] = row[:3]
    return pose


def to_metres(stored: np.ndarray, depth_scale: float) -> np.ndarray:
    """Depth float32 metres of stored 16-bit values; 0 and 65535 mean missing.

    Raises:
        Dropped: nothing is known.
    """
    known = (stored > 0) & (stored < 65535)
    if not known.any():
        raise Dropped("no depth in the depth image")
    return np.where(known, stored, 0).astype(np.float32) / depth_scale


@dataclasses.dataclass(frozen=True)
class Given:
    """An intrinsic as a file or the user gives it, and the pictures that it is given for.

    Attributes:
        where: it is from, for a complaint.
        matrix: [3, 3], pixel centres at integers; fy may be negative.
        size: (width, height) of the pictures.
    """

    where: str
    matrix: np.ndarray
    size: tuple[int, int]


def camera(where: str, fx, fy, cx, cy, size: tuple[int, int]) -> np.ndarray:
    """The intrinsic [3, 3] of numbers read from a file; fy may be negative.

    Args:
        where: they are from, for the complaint.
        fx, fy, cx, cy: pixels.
        size: (width, height) of the image.

    Raises:
        UserError: no camera has these, by the rules of `exports.cameras`.
    """
    intrinsic = np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1.0]])
    rule = cameras.fault(intrinsic, size)
    if not rule and fx < 0:
        rule = f"the focal length {fx} along x is negative"
    if rule:
        raise UserError(f"{where}: {rule}")
    return intrinsic


def of_one_view(
    depth: Given | None, color: Given | None, sizes: Sequence[tuple[int, int]]
) -> tuple[np.ndarray, np.ndarray | None, list[str]]:
    """The intrinsics of a depth and a colour camera that see about the same.

    An intrinsic whose centre is off the middle may be for pictures of another size: these were
    resized, and it was left as it was. Where that size is sure, it is brought to the pictures'.

    Args:
        depth, color: one of them may be None, not given: then it is the other's, scaled.
        sizes: (width, height) of the depth and of the colour pictures.

    Returns:
        The depth's [3, 3], the colour's or None, and what was corrected, a line each.

    Raises:
        UserError: one is no camera's, they see differently, or only one is given and the pictures
            have different shapes.
    """
    said: list[str] = []
    found: list[np.ndarray | None] = []
    for one, other in ((depth, color), (color, depth)):
        if one is None:
            found.append(None)
            continue
        matrix = one.matrix
        if not _fits(one):
            original = _original_size(one, other if _fits(other) else None, sizes)
            if original is not None:
                matrix = resized(matrix, original, one.size)
                was, now = (f"{w} x {h}" for w, h in (original, one.size))
                said.append(f"{one.where}: is for pictures of {was}, these are {now}: scaled")
        found.append(
            camera(one.where, *(matrix[i] for i in ((0, 0), (1, 1), (0, 2), (1, 2))), one.size)
        )
    if depth is not None and color is not None:
        wide = _field(found[1], color.size) / _field(found[0], depth.size)
        if not ((wide >= 1 / cameras.FIELD) & (wide <= cameras.FIELD)).all():
            raise UserError(
                f"{color.where}: colour sees {wide[0]:.2f} times as wide and {wide[1]:.2f} times "
                f"as high as depth by {depth.where}, not within {cameras.FIELD}: an intrinsic is "
                "for another size, or colour and depth are not registered"
            )
        return found[0], found[1], said
    (width, height), (across, down) = sizes
    if not 1 / SHAPE <= width * down / (height * across) <= SHAPE:
        raise UserError(
            f"{(depth or color).where}: depth is {width} x {height} and colour {across} x {down} "
            "pixels: pictures of different shapes need an intrinsic each"
        )
    if depth is None:
        return resized(found[1], sizes[1], sizes[0]), found[1], said
    return found[0], None, said


def _fits(one: Given | None) -> bool:
    return one is not None and cameras.fault(one.matrix, one.size) is None


def _original_size(
    one: Given, other: Given | None, sizes: Sequence[tuple[int, int]]
) -> tuple[int, int] | None:
    """The (width, height) of the pictures that an intrinsic was made for; None if none is sure.

    Its centre must be in their middle, and the pictures have shrunk or grown alike in both
    directions. Of several sizes the one is taken with which it sees as the other camera does,
    within `_SAME_FIELD`; without another camera the centre must be within `_NEAR`, as a share of
    the side, and where sizes differ by more than `_SAME_SIZE`, within `_EXACT`.

    Args:
        one: the intrinsic and the pictures that it is not for.
        other: the other camera's, where that fits its own pictures.
        sizes: of the depth and of the colour pictures.
    """
    factors = [*_FACTORS, *(1 / f for f in _FACTORS)]
    scaled = (tuple(round(side * f) for side in one.size) for f in factors)
    possible = []
    for size in sorted({*scaled, *_SIZES, *sizes} - {one.size}):
        factor = np.array(size) / one.size
        off = cameras.off_centre(one.matrix, size)
        near = _NEAR if other is None else cameras.CENTRE
        if (off <= near + 0.5 / np.array(size)).all() and 1 / SHAPE <= factor[0] / factor[
            1
        ] <= SHAPE:
            possible.append((size, off.max()))
    if other is not None:
        wide = _field(other.matrix, other.size)
        apart = {
            size: np.abs(np.log(_field(one.matrix, size) / wide)).max() for size, _ in possible
        }
        best = min(apart, key=apart.get, default=None)
        return best if best is not None and apart[best] <= np.log(_SAME_FIELD) else None
    widths = [size[0] for size, _ in possible]
    if possible and max(widths) > _SAME_SIZE * min(widths):
        possible = [(size, off) for size, off in possible if off <= _EXACT]
    return min(possible, key=lambda pair: pair[1])[0] if possible else None


def _field(intrinsic: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """How wide and how high a camera sees at a distance of 1: [2]."""
    return np.array(size) / np.abs([intrinsic[0, 0], intrinsic[1, 1]])


def resized(intrinsic: np.ndarray, old: tuple[int, int], new: tuple[int, int]) -> np.ndarray:
    """The intrinsic of the same picture at another (width, height)."""
    x, y = new[0] / old[0], new[1] / old[1]
    change = np.array([[x, 0, x / 2 - 0.5], [0, y, y / 2 - 0.5], [0, 0, 1]])
    return change @ intrinsic
