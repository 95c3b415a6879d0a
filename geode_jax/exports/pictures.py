"""Reading of pictures, as a person sees them: the one reader for all paths that a picture takes.

* A picture is turned as its orientation flag says. What belongs to a picture, such as an intrinsic
  or a depth map, belongs to the picture as it is shown, which is what programs of calibration get.
* Whatever its colour mode, it becomes RGB of 8 bits: palettes, grey, black and white, CMYK, 16 bit
  (the higher byte). What is transparent becomes white. Of several pictures in a file the first is
  taken; colour profiles are not applied.
* A depth map is 16 bit grey and comes as it is stored. One with an orientation flag is refused:
  what made it turned the pixels or not, and nothing says which.
* What is cut off, damaged, or too large to be a picture is refused in one line.

This module needs Pillow, and is loaded by those who do; apart from that it stands alone (Python
3.9, numpy), as the whole package does.
"""

from __future__ import annotations

import io
import os
import re
import warnings

import numpy as np
from PIL import Image, UnidentifiedImageError

from .files import UserError, one_line, read_bytes

ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp")
"""Of names of pictures, in small letters; large ones are the same."""
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "PPM")
"""As Pillow names them, MPO among JPEG; what a file is, its content says and not its name."""
MAX_BYTES = 1 << 28
"""Largest file of a picture."""
MAX_PIXELS = 1 << 27
"""Largest picture, whatever its file's size: 134 million pixels."""

_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""Orientation flag -> what brings a stored picture to how it is shown."""


class PictureError(UserError):
    """A picture that cannot be used.

    Attributes:
        rule: that it breaks, as "with an orientation flag"; empty where it cannot be decoded.
    """

    def __init__(self, where: str | os.PathLike, what: str, rule: str, reason: str = ""):
        self.rule = rule
        super().__init__(f"{where}: no {what}: {rule or reason}")


def read_picture(
    source: str | os.PathLike | bytes,
    where: str | os.PathLike = "",
    formats: tuple[str, ...] = FORMATS,
) -> Image.Image:
    """A picture, RGB, as it is shown; see the module's docstring.

    Args:
        source: its path, or the content of its file.
        where: begins the complaint about content.
        formats: that it may have.

    Raises:
        UserError: the file cannot be read.
        PictureError: what it holds is no picture.
    """
    data, where = _content(source, where)
    image = _opened(data, where, "picture", formats)
    _decode(image, where, "picture")
    turn = _TURNS.get(_orientation(image))
    try:
        image = _as_rgb(image, where)
    except (OSError, ValueError) as error:
        if isinstance(error, PictureError):
            raise
        raise PictureError(where, "picture", "", one_line(str(error), 120)) from None
    return image if turn is None else image.transpose(turn)


def _as_rgb(image: Image.Image, where: str) -> Image.Image:
    """Any mode as RGB; PictureError where nothing says what is black and what is white."""
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise PictureError(where, "picture", "with grey values beyond 16 bits")
        clear = image.info.get("transparency")
        grey = (values >> 8).astype(np.uint8)
        image = Image.fromarray(grey if clear is None else np.where(values == clear, 255, grey))
    elif image.mode == "F":
        raise PictureError(where, "picture", "with grey values that are not whole numbers")
    elif image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255,) * 4), image)
    return image.convert("RGB")


def read_depth(source: str | os.PathLike | bytes, where: str | os.PathLike = "") -> np.ndarray:
    """The stored values [h, w] of a 16-bit depth picture (PNG or PGM).

    Raises:
        UserError: the file cannot be read.
        PictureError: what it holds is no depth picture.
    """
    data, where = _content(source, where)
    image = _opened(data, where, "depth picture", ("PNG", "PPM"))
    if not image.mode.startswith("I"):
        raise PictureError(where, "depth picture", "not 16 bit")
    _decode(image, where, "depth picture")
    if _orientation(image) != 1:
        raise PictureError(where, "depth picture", "with an orientation flag")
    values = np.asarray(image)
    if image.format == "PPM":
        # Pillow stretches the values of a PGM file to 16 bits.
        words = re.sub(rb"#[^\n\r]*", b"", data[:4096]).split()
        if len(words) < 4 or not words[3].isdigit():
            raise PictureError(where, "depth picture", "with a header that is no PGM file's")
        values = np.round(values * (int(words[3]) / 65535)).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise PictureError(where, "depth picture", "with values beyond 16 bits")
    return values.astype(np.uint16)


def shown_size(source: str | os.PathLike) -> tuple[int, int]:
    """(width, height) of a picture as it is shown, without decoding it.

    Raises:
        UserError: the file cannot be read.
        PictureError: what it holds is no picture.
    """
    data, where = _content(source)
    image = _opened(data, where, "picture", FORMATS)
    width, height = image.size
    return (height, width) if _orientation(image) >= 5 else (width, height)


def orientation(source: str | os.PathLike | bytes, where: str | os.PathLike = "") -> int:
    """The orientation flag of a picture, 1 to 8 as the EXIF standard numbers them; 1 = as stored.

    Raises:
        UserError: the file cannot be read.
        PictureError: what it holds is no picture.
    """
    data, where = _content(source, where)
    return _orientation(_opened(data, where, "picture", FORMATS))


def _content(source: str | os.PathLike | bytes, where: str | os.PathLike = "") -> tuple[bytes, str]:
    """The bytes of a picture file, and the beginning of messages about it."""
    if isinstance(source, bytes):
        return source, str(where) or "content"
    return read_bytes(source, MAX_BYTES), str(where) or str(source)


def _opened(data: bytes, where: str, what: str, formats: tuple[str, ...]) -> Image.Image:
    """A picture that is not decoded yet; PictureError where there is none, or a huge one."""
    too_large = f"of more than {MAX_PIXELS:,} pixels"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large pictures, which are refused here
            image = Image.open(io.BytesIO(data), formats=formats)
    except Image.DecompressionBombError:
        raise PictureError(where, what, too_large) from None
    except Exception as error:  # Pillow raises whatever a damaged file makes its decoders
        reason = one_line(str(error), 120) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            reason = f"none of {', '.join(formats)}"
        elif re.match(rb"P\d", data):  # Pillow's words for these are Python's
            reason = "the numbers of its header, such as its size, cannot be read"
        raise PictureError(where, what, "", reason) from None
    if image.size[0] * image.size[1] > MAX_PIXELS:
        raise PictureError(where, what, too_large)
    return image


def _decode(image: Image.Image, where: str, what: str) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata
            image.load()
    except Exception as error:  # as above
        reason = one_line(str(error), 120) or type(error).__name__
        raise PictureError(where, what, "", reason) from None


def _orientation(image: Image.Image) -> int:
    """1 to 8, as the EXIF standard numbers them; 1, as stored, where none is readable."""
    try:
        flag = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged metadata, which viewers pass over
        return 1
    return flag if flag in _TURNS else 1
