"""Intrinsics of depth and colour cameras, brought to the size of the pictures on disk.

Data sets often resize pictures and leave the intrinsic as it was. The size for which an intrinsic
was made is inferred from its principal point, from the other camera's field of view, and from the
picture sizes of known sensors.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from geode_jax.errors import UserError
from geode_jax.exports import cameras

Size = tuple[int, int]
"""(width, height) of pictures, pixels."""

MAX_SHAPE_RATIO = 1.02
"""Pictures have the same shape if their aspect ratios differ by at most this factor (ScanNet's
differ by 1.005)."""
_RESIZE_FACTORS = (3 / 2, 2, 3, 4, 6, 8)
"""Factors by which pictures are commonly resized."""
_SENSOR_SIZES: tuple[Size, ...] = (
    *((160, 120), (256, 192), (320, 240), (640, 480), (1024, 768), (1280, 960), (1296, 968)),
    *((1440, 1080), (1920, 1440), (2048, 1536), (4032, 3024)),
    *((424, 240), (640, 360), (848, 480), (960, 540), (1280, 720), (1920, 1080), (3840, 2160)),
    *((320, 288), (512, 424), (512, 512), (640, 576), (1024, 1024)),
)
"""Picture sizes of RGB-D cameras in landscape; the same in portrait count too."""
_EXACT_CENTRE, _NEAR_CENTRE = 0.003, 0.01
"""Largest offset of a principal point from the middle, as a share of the side (or one pixel), that
identifies a picture size: any size; a sensor's size, if the present size is impossible."""
_SAME_FIELD_RATIO, _SAME_SIZE_RATIO = 1.05, 1.02
"""Largest ratio of two fields of view, or two picture sizes, that count as equal."""
_MIN_RESIZE_LOG, _MAX_LOG_SPREAD = 0.02, 0.015
"""Two cameras show that pictures were resized if principal points and fields of view differ by
more than the first, and by the same factor within the second; both are logarithms."""


@dataclasses.dataclass(frozen=True)
class Given:
    """An intrinsic from a file or the user, and the size of the pictures that it comes with.

    Attributes:
        where: its source, named in messages.
        matrix: [3, 3], pixel centres at integers; fy may be negative.
        size: (width, height) of the pictures.
    """

    where: str
    matrix: np.ndarray
    size: Size


def camera(where: str, fx: float, fy: float, cx: float, cy: float, size: Size) -> np.ndarray:
    """Returns the intrinsic [3, 3] of numbers read from a file; fy may be negative.

    Args:
        where: source of the numbers, named in the message.
        fx, fy, cx, cy: pixels.
        size: (width, height) of the image.

    Raises:
        UserError: no camera has these numbers, by the rules of `exports.cameras`.
    """
    intrinsic = np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1.0]])
    rule = cameras.fault(intrinsic, size)
    if not rule and fx < 0:
        rule = f"the focal length {fx} along x is negative"
    if rule:
        raise UserError(f"{where}: {rule}")
    return intrinsic


def of_one_view(
    depth: Given | None, color: Given | None, sizes: Sequence[Size]
) -> tuple[np.ndarray, np.ndarray | None, list[str]]:
    """Returns the intrinsics of a depth and a colour camera with about the same field of view.

    A principal point off the middle may mean that the intrinsic is for pictures of another size,
    which were resized. Where that size is certain, the intrinsic is scaled to the pictures'. Where
    nothing identifies a size, the intrinsic is used unchanged, with a note.

    Args:
        depth, color: at most one of them may be None; it then equals the other's, scaled.
        sizes: (width, height) of the depth and of the colour pictures.

    Returns:
        The depth's [3, 3], the colour's or None, and what was corrected or assumed, a line each.

    Raises:
        UserError: an intrinsic is impossible, the fields of view differ, pictures were resized
            from an unknown size, or only one intrinsic is given and the pictures have different
            shapes.
    """
    notes: list[str] = []
    if depth is not None and color is not None:
        given = (depth, color)
        found = [
            _at_present_size(one, size, given, notes)
            for one, size in zip(given, _original_sizes(depth, color, sizes), strict=True)
        ]
        wide = _field_of_view(found[1], color.size) / _field_of_view(found[0], depth.size)
        if not ((wide >= 1 / cameras.MAX_FIELD_RATIO) & (wide <= cameras.MAX_FIELD_RATIO)).all():
            raise UserError(
                f"{color.where}: colour sees {wide[0]:.2f} times as wide and {wide[1]:.2f} times "
                f"as high as depth by {depth.where}, not within {cameras.MAX_FIELD_RATIO}: an "
                "intrinsic is for another size, or colour and depth are not registered"
            )
        return found[0], found[1], notes
    only = depth if depth is not None else color
    assert only is not None, "neither intrinsic is given"
    size = _size_of_centre(only, sizes) or _size_of_nearest_sensor(only, sizes)
    matrix = _at_present_size(only, size, (only,), notes)
    (width, height), (across, down) = sizes
    if not same_shape(*sizes):
        raise UserError(
            f"{only.where}: depth is {width} x {height} and colour {across} x {down} "
            "pixels: pictures of different shapes need an intrinsic each"
        )
    if depth is None:
        return resized(matrix, sizes[1], sizes[0]), matrix, notes
    return matrix, None, notes


def _at_present_size(
    one: Given, original: Size | None, given: Sequence[Given], notes: list[str]
) -> np.ndarray:
    """Returns an intrinsic [3, 3] scaled from its original size to that of its pictures.

    Args:
        one: the intrinsic.
        original: size for which it was made, None if unknown.
        given: all intrinsics of the sequence.
        notes: gets a line about a correction or an assumption.

    Raises:
        UserError: the intrinsic is impossible for its pictures.
    """
    matrix = one.matrix
    if original is not None and original != one.size:
        matrix = resized(matrix, original, one.size)
        was, now = (f"{width} x {height}" for width, height in (original, one.size))
        notes.append(f"{one.where}: is for pictures of {was}, these are {now}: scaled")
    elif original is not None and not _confirms_present_size(given):
        off = 100 * cameras.off_centre(one.matrix, one.size).max()
        notes.append(
            f"{one.where}: taken to be for pictures of {original[0]} x {original[1]}; nothing "
            f"shows it, the centre is {off:.1f} % off the middle"
        )
    (fx, _, cx), (_, fy, cy), _ = matrix
    return camera(one.where, fx, fy, cx, cy, one.size)


def _original_sizes(
    depth: Given, color: Given, sizes: Sequence[Size]
) -> tuple[Size | None, Size | None]:
    """Returns the picture sizes for which two intrinsics were made, None where unknown.

    1. Each principal point alone may identify a size.
    2. Where only one does, the field of view of that camera decides for the other, among the sizes
       of sensors and of the pictures.
    3. Where both do but disagree by a common factor, one of the two pictures was resized. The
       field of view decides which, if that leaves one answer.

    Raises:
        UserError: pictures were resized, and it is not certain from what size.
    """
    one, other = _size_of_centre(depth, sizes), _size_of_centre(color, sizes)
    if one is None and other is not None:
        one = _size_by_field(depth, color, other, sizes)
    if other is None and one is not None:
        other = _size_by_field(color, depth, one, sizes)
    if one is None or other is None:
        return one, other
    given, found = (depth, color), (one, other)
    factor = _resize_between(given, found)
    if factor is None:
        return found
    answers: list[tuple[Size, Size]] = []
    if not _is_centred(depth, one) and (size := _size_by_field(depth, color, other, sizes)):
        answers.append((size, other))
    if not _is_centred(color, other) and (size := _size_by_field(color, depth, one, sizes)):
        answers.append((one, size))
    # Pictures that have a sensor's size were not resized.
    answers = [
        pair
        for pair in answers
        if _resize_between(given, pair) is None and not _moved_from_sensor(given, pair)
    ]
    if len(answers) == 1:
        return answers[0]
    raise UserError(
        f"{color.where}: its centre and its field of view differ from those of {depth.where} by "
        f"the same factor, {factor:.3f}: pictures were resized, and it is not sure from what size"
    )


def _size_of_centre(one: Given, sizes: Sequence[Size]) -> Size | None:
    """Returns the size that a principal point identifies, else the pictures' size if possible.

    Args:
        one: the intrinsic.
        sizes: all sizes of pictures of the sequence.

    Returns:
        The size; None where the present size is impossible and no other is identified.

    Raises:
        UserError: the principal point is in the middle of pictures of another shape only.
    """
    fits = cameras.fault(one.matrix, one.size) is None
    if fits and _is_centred(one, one.size):
        return one.size
    width, height = one.size
    factors = (*_RESIZE_FACTORS, *(1 / f for f in _RESIZE_FACTORS))
    scaled = {(round(width * f), round(height * f)) for f in factors}
    exact = [
        size for size in _known_sizes(sizes) | scaled if size != one.size and _is_centred(one, size)
    ]
    if fits:
        # Calibrated principal points are off the middle, and may by chance be in the middle of a
        # slightly different size.
        exact = [
            size
            for size in exact
            if np.abs(np.log(np.array(size) / one.size)).max() > np.log(_SAME_SIZE_RATIO)
        ]
        if exact and not any(same_shape(size, one.size) for size in exact):
            other_width, other_height = min(exact)
            raise UserError(
                f"{one.where}: the centre is in the middle of pictures of {other_width} x "
                f"{other_height}, these are {width} x {height}: were they cut or squeezed?"
            )
    exact = [size for size in exact if same_shape(size, one.size)]
    if exact:
        return min(exact, key=lambda size: cameras.off_centre(one.matrix, size).max())
    return one.size if fits else None


def _size_of_nearest_sensor(one: Given, sizes: Sequence[Size]) -> Size | None:
    """Returns the known size whose middle is nearest to the principal point, None if none is near.

    For intrinsics that are impossible at the present size.
    """
    offsets = {
        size: cameras.off_centre(one.matrix, size).max()
        for size in _known_sizes(sizes)
        if same_shape(size, one.size)
    }
    near = [size for size, offset in offsets.items() if offset <= _NEAR_CENTRE]
    return min(near, key=lambda size: offsets[size], default=None)


def _size_by_field(
    one: Given, other: Given, other_size: Size, sizes: Sequence[Size]
) -> Size | None:
    """Returns the known size at which a camera has the other camera's field of view.

    Args:
        one: the camera; the present size of its pictures is not considered.
        other, other_size: the other camera, and the size for which it was made.
        sizes: all sizes of pictures of the sequence.
    """
    apart: dict[Size, float] = {}
    for size in _known_sizes(sizes) - {one.size}:
        off = cameras.off_centre(one.matrix, size) - 0.5 / np.array(size)
        if (off <= cameras.MAX_CENTRE_OFFSET).all() and same_shape(size, one.size):
            wide = _field_of_view(one.matrix, size) / _field_of_view(other.matrix, other_size)
            if _resize_between([one, other], [size, other_size]) is None:
                apart[size] = float(np.abs(np.log(wide)).max())
    best = min(apart, key=lambda size: apart[size], default=None)
    return best if best is not None and apart[best] <= np.log(_SAME_FIELD_RATIO) else None


def _resize_between(given: Sequence[Given], sizes: Sequence[Size]) -> float | None:
    """Returns the one factor by which principal points and fields of view differ, None if none."""
    (one, other), (size, other_size) = given, sizes
    middle = [2 * g.matrix[:2, 2] + 1 for g in given]
    centre = middle[1] * size / (middle[0] * other_size)
    wide = _field_of_view(one.matrix, size) / _field_of_view(other.matrix, other_size)
    with np.errstate(invalid="ignore", divide="ignore"):
        factors = np.log(np.concatenate([centre, wide]))
    if not np.isfinite(factors).all():
        return None
    if abs(factors.mean()) > _MIN_RESIZE_LOG and np.ptp(factors) <= _MAX_LOG_SPREAD:
        return float(np.exp(factors.mean()))
    return None


def _moved_from_sensor(given: Sequence[Given], sizes: Sequence[Size]) -> bool:
    """Returns whether a picture of a sensor's size is taken to have had another size."""
    known = _known_sizes(())
    return any(
        one.size in known and one.size != size for one, size in zip(given, sizes, strict=True)
    )


def _confirms_present_size(given: Sequence[Given]) -> bool:
    """Returns whether one of the intrinsics has a sensor's size or its principal point centred."""
    known = _known_sizes(())
    return any(one.size in known or _is_centred(one, one.size) for one in given)


def _known_sizes(sizes: Sequence[Size]) -> set[Size]:
    """Returns the sizes of sensors, in landscape and portrait, and the given ones."""
    return {*_SENSOR_SIZES, *((height, width) for width, height in _SENSOR_SIZES), *sizes}


def _is_centred(one: Given, size: Size) -> bool:
    """Returns whether the principal point is exactly in the middle of pictures of a size."""
    most = np.maximum(_EXACT_CENTRE, 1 / np.array(size))
    return bool((cameras.off_centre(one.matrix, size) <= most + 1e-9).all())


def same_shape(size: Size, other: Size) -> bool:
    """Returns whether pictures of two sizes have the same aspect ratio."""
    return 1 / MAX_SHAPE_RATIO <= size[0] * other[1] / (size[1] * other[0]) <= MAX_SHAPE_RATIO


def _field_of_view(intrinsic: np.ndarray, size: Size) -> np.ndarray:
    """Returns width and height [2] of what a camera sees at a distance of 1."""
    return np.array(size) / np.abs([intrinsic[0, 0], intrinsic[1, 1]])


def resized(intrinsic: np.ndarray, old: Size, new: Size) -> np.ndarray:
    """Returns the intrinsic [3, 3] of the same picture at another size."""
    x, y = new[0] / old[0], new[1] / old[1]
    change = np.array([[x, 0, x / 2 - 0.5], [0, y, y / 2 - 0.5], [0, 0, 1]])
    return change @ intrinsic
