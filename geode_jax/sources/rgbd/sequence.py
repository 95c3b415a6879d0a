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
_SENSORS = (
    *((160, 120), (256, 192), (320, 240), (640, 480), (1024, 768), (1280, 960), (1296, 968)),
    *((1440, 1080), (1920, 1440), (2048, 1536), (4032, 3024)),
    *((424, 240), (640, 360), (848, 480), (960, 540), (1280, 720), (1920, 1080), (3840, 2160)),
    *((320, 288), (512, 424), (512, 512), (640, 576), (1024, 1024)),
)
"""Of the cameras that RGB-D data come from, lying; they are also held upright."""
_EXACT, _NEAR = 0.003, 0.01
"""How far off the middle a centre may be that tells the size of its pictures, as a share of the
side or one pixel: of any size, and of a sensor's where the present size is impossible."""
_SAME_FIELD, _SAME_SIZE = 1.05, 1.02
"""Within which two fields of view are the same, and two sizes cannot be told apart."""
_RESIZED, _ALIKE = 0.02, 0.015
"""Two cameras show that pictures were resized where centres and fields of view differ by more than
the one, and by the same factor within the other; both are logarithms."""


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
    Where nothing tells, it is taken to be for the pictures that are there, and this is said.

    Args:
        depth, color: one of them may be None, not given: then it is the other's, scaled.
        sizes: (width, height) of the depth and of the colour pictures.

    Returns:
        The depth's [3, 3], the colour's or None, and what was corrected or assumed, a line each.

    Raises:
        UserError: one is no camera's, they see differently, they were resized and nothing says
            from what size, or only one is given and the pictures have different shapes.
    """
    said: list[str] = []
    found: list[np.ndarray | None] = []
    for one, size in zip((depth, color), _original_sizes(depth, color, sizes), strict=True):
        if one is None:
            found.append(None)
            continue
        matrix = one.matrix
        if size not in (None, one.size):
            matrix = resized(matrix, size, one.size)
            was, now = (f"{w} x {h}" for w, h in (size, one.size))
            said.append(f"{one.where}: is for pictures of {was}, these are {now}: scaled")
        elif size is not None and not _told([depth, color], one):
            off = 100 * cameras.off_centre(one.matrix, one.size).max()
            said.append(
                f"{one.where}: taken to be for pictures of {size[0]} x {size[1]}; nothing shows "
                f"it, the centre is {off:.1f} % off the middle"
            )
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
    if not same_shape(*sizes):
        raise UserError(
            f"{(depth or color).where}: depth is {width} x {height} and colour {across} x {down} "
            "pixels: pictures of different shapes need an intrinsic each"
        )
    if depth is None:
        return resized(found[1], sizes[1], sizes[0]), found[1], said
    return found[0], None, said


def _original_sizes(
    depth: Given | None, color: Given | None, sizes: Sequence[tuple[int, int]]
) -> list[tuple[int, int] | None]:
    """The (width, height) of the pictures that two intrinsics were made for; None if none is sure.

    First each is looked at alone: a centre in the very middle tells the size. What that leaves
    open, the other camera's field of view decides, among the sizes of sensors and of the pictures.

    Raises:
        UserError: pictures were resized, and it is not sure from what size.
    """
    given = [depth, color]
    found = [None if one is None else _size_of_centre(one, sizes) for one in given]
    for i, one in enumerate(given):
        other, its = given[1 - i], found[1 - i]
        if one is None or found[i] is not None:
            continue
        if other is not None and its is not None:
            found[i] = _size_by_field(one, other, its, sizes)
        elif other is None:
            found[i] = _size_alone(one, sizes)
    if None in given or None in found:
        return found
    factor = _resize_between(given, found)
    if factor is None:
        return found
    answers = []
    for i, one in enumerate(given):
        if _exact(one, found[i]):
            continue
        size = _size_by_field(one, given[1 - i], found[1 - i], sizes)
        pair = [size if k == i else found[k] for k in (0, 1)]
        if size is not None and _resize_between(given, pair) is None:
            answers.append(pair)
    # What is as a sensor gives it was not resized.
    unlike = [pair for pair in answers if not _moved_from_sensor(given, pair)]
    if len(unlike) == 1:
        return unlike[0]
    raise UserError(
        f"{color.where}: its centre and its field of view differ from those of {depth.where} by "
        f"the same factor, {factor:.3f}: pictures were resized, and it is not sure from what size"
    )


def _size_of_centre(one: Given, sizes: Sequence[tuple[int, int]]) -> tuple[int, int] | None:
    """The size that a centre tells; else the pictures' where it may be theirs, and None."""
    fits = cameras.fault(one.matrix, one.size) is None
    if fits and _exact(one, one.size):
        return one.size
    scaled = {
        tuple(round(side * f) for side in one.size) for f in (*_FACTORS, *(1 / f for f in _FACTORS))
    }
    exact = [
        size for size in _known_sizes(sizes) | scaled if size != one.size and _exact(one, size)
    ]
    if fits:
        # Centres that are measured are not in the middle: by chance on another size's of these.
        exact = [
            size
            for size in exact
            if np.abs(np.log(np.array(size) / one.size)).max() > np.log(_SAME_SIZE)
        ]
        if exact and not any(same_shape(size, one.size) for size in exact):
            width, height = min(exact)
            raise UserError(
                f"{one.where}: the centre is in the middle of pictures of {width} x {height}, "
                f"these are {one.size[0]} x {one.size[1]}: were they cut or squeezed?"
            )
    exact = [size for size in exact if same_shape(size, one.size)]
    if exact:
        return min(exact, key=lambda size: cameras.off_centre(one.matrix, size).max())
    return one.size if fits else None


def _size_alone(one: Given, sizes: Sequence[tuple[int, int]]) -> tuple[int, int] | None:
    """The sensor's size whose middle is nearest, where the pictures cannot have this centre."""
    near = {
        size: off
        for size in _known_sizes(sizes)
        if same_shape(size, one.size)
        and (off := cameras.off_centre(one.matrix, size).max()) <= _NEAR
    }
    return min(near, key=near.get, default=None)


def _size_by_field(
    one: Given,
    other: Given,
    its: tuple[int, int],
    sizes: Sequence[tuple[int, int]],
) -> tuple[int, int] | None:
    """The size of a sensor or of the pictures with which one camera sees as wide as the other.

    Args:
        one: whose size is looked for, other than that of its pictures.
        other, its: the other camera, and the size that it is for.
        sizes: of the pictures.
    """
    apart = {}
    for size in _known_sizes(sizes) - {one.size}:
        off = cameras.off_centre(one.matrix, size) - 0.5 / np.array(size)
        if (off <= cameras.CENTRE).all() and same_shape(size, one.size):
            wide = _field(one.matrix, size) / _field(other.matrix, its)
            if _resize_between([one, other], [size, its]) is None:
                apart[size] = np.abs(np.log(wide)).max()
    best = min(apart, key=apart.get, default=None)
    return best if best is not None and apart[best] <= np.log(_SAME_FIELD) else None


def _resize_between(given: Sequence[Given], sizes: Sequence[tuple[int, int]]) -> float | None:
    """The factor by which centres and fields of view differ where it is one and the same."""
    (one, other), (size, its) = given, sizes
    middle = [2 * g.matrix[:2, 2] + 1 for g in given]
    centre = middle[1] * size / (middle[0] * its)
    wide = _field(one.matrix, size) / _field(other.matrix, its)
    with np.errstate(invalid="ignore", divide="ignore"):
        factors = np.log(np.concatenate([centre, wide]))
    if not np.isfinite(factors).all():
        return None
    if abs(factors.mean()) > _RESIZED and np.ptp(factors) <= _ALIKE:
        return float(np.exp(factors.mean()))
    return None


def _moved_from_sensor(given: Sequence[Given], pair: Sequence[tuple[int, int]]) -> bool:
    known = _known_sizes(())
    return any(
        one.size in known and one.size != size for one, size in zip(given, pair, strict=True)
    )


def _told(given: Sequence[Given | None], one: Given) -> bool:
    """Whether something shows that an intrinsic is for the size of its pictures."""
    other = [g for g in given if g is not None and g is not one]
    known = _known_sizes(())
    return any(g.size in known or _exact(g, g.size) for g in (one, *other))


def _known_sizes(sizes: Sequence[tuple[int, int]]) -> set[tuple[int, int]]:
    """Of sensors, lying and upright, and those that are given."""
    return {*_SENSORS, *((height, width) for width, height in _SENSORS), *map(tuple, sizes)}


def _exact(one: Given, size: tuple[int, int]) -> bool:
    """Whether the centre is in the very middle of pictures of a size."""
    most = np.maximum(_EXACT, 1 / np.array(size))
    return bool((cameras.off_centre(one.matrix, size) <= most + 1e-9).all())


def same_shape(size: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether pictures of two (width, height) have the same shape."""
    return 1 / SHAPE <= size[0] * other[1] / (size[1] * other[0]) <= SHAPE


def _field(intrinsic: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """How wide and how high a camera sees at a distance of 1: [2]."""
    return np.array(size) / np.abs([intrinsic[0, 0], intrinsic[1, 1]])


def resized(intrinsic: np.ndarray, old: tuple[int, int], new: tuple[int, int]) -> np.ndarray:
    """The intrinsic of the same picture at another (width, height)."""
    x, y = new[0] / old[0], new[1] / old[1]
    change = np.array([[x, 0, x / 2 - 0.5], [0, y, y / 2 - 0.5], [0, 0, 1]])
    return change @ intrinsic
