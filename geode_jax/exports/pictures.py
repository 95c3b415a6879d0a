"""Reads pictures as viewers show them; every picture of the project is read here.

* A picture is rotated and mirrored by its EXIF orientation flag. Intrinsics and depth maps refer
  to the picture as it is shown, which is what calibration programs see.
* Every colour mode becomes 8-bit RGB: palettes, grey, black and white, CMYK, 16 bit (the higher
  byte). Transparent pixels become white. Of several pictures in a file the first is read. Colour
  profiles are not applied.
* A depth map is 16-bit grey and is returned as stored. One with an orientation flag is refused,
  since the program that set the flag may or may not have rotated the pixels.
* A file that is truncated, damaged or too large is refused in one line.

This module needs Pillow, so it is not imported with the package; otherwise it stands alone (Python
3.9, numpy).
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
"""Endings of the names of pictures; upper case counts as lower case."""
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "PPM")
"""Pillow's names of the formats (JPEG includes MPO). The format is read from the content of a file,
not from its name."""
MAX_BYTES = 1 << 28
"""Largest picture file."""
MAX_PIXELS = 1 << 27
"""Most pixels of a picture, 134 million; a small file may hold more."""

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
"""Orientation flag -> the operation that turns the stored picture into the shown one."""


class PictureError(UserError):
    """A picture that cannot be used.

    Attributes:
        rule: the rule that it breaks, as "with an orientation flag"; "" if it cannot be decoded.
    """

    def __init__(self, where: str | os.PathLike, what: str, rule: str, reason: str = ""):
        self.rule = rule
        super().__init__(f"{where}: no {what}: {rule or reason}")


def read_picture(
    source: str | os.PathLike | bytes,
    where: str | os.PathLike = "",
    formats: tuple[str, ...] = FORMATS,
) -> Image.Image:
    """Reads a picture as it is shown, in RGB; see the module's docstring.

    Args:
        source: path of the file, or its content.
        where: beginning of error messages about content.
        formats: the formats that are accepted.

    Raises:
        UserError: the file cannot be read.
        PictureError: the content is no picture.
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
    """Returns a picture of any mode as RGB; raises PictureError if its range of grey is unknown."""
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
    """Returns the stored values [h, w] of a 16-bit depth picture (PNG or PGM).

    Raises:
        UserError: the file cannot be read.
        PictureError: the content is no depth picture.
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
        # Pillow scales the values of a PGM file to 16 bits; this undoes it.
        words = re.sub(rb"#[^\n\r]*", b"", data[:4096]).split()
        if len(words) < 4 or not words[3].isdigit():
            raise PictureError(where, "depth picture", "with a header that is no PGM file's")
        values = np.round(values * (int(words[3]) / 65535)).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise PictureError(where, "depth picture", "with values beyond 16 bits")
    return values.astype(np.uint16)


def shown_size(source: str | os.PathLike) -> tuple[int, int]:
    """Returns (width, height) of a picture as it is shown, without decoding it.

    Raises:
        UserError: the file cannot be read.
        PictureError: the content is no picture.
    """
    data, where = _content(source)
    image = _opened(data, where, "picture", FORMATS)
    width, height = image.size
    return (height, width) if _orientation(image) >= 5 else (width, height)


def orientation(source: str | os.PathLike | bytes, where: str | os.PathLike = "") -> int:
    """Returns the EXIF orientation flag of a picture, 1 to 8; 1 = shown as stored.

    Raises:
        UserError: the file cannot be read.
        PictureError: the content is no picture.
    """
    data, where = _content(source, where)
    return _orientation(_opened(data, where, "picture", FORMATS))


def _content(source: str | os.PathLike | bytes, where: str | os.PathLike = "") -> tuple[bytes, str]:
    """Returns the bytes of a picture file, and the beginning of messages about it."""
    if isinstance(source, bytes):
        return source, str(where) or "content"
    return read_bytes(source, MAX_BYTES), str(where) or str(source)


def _opened(data: bytes, where: str, what: str, formats: tuple[str, ...]) -> Image.Image:
    """Opens a picture without decoding it; raises PictureError if it is none, or too large."""
    too_large = f"of more than {MAX_PIXELS:,} pixels"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about large pictures, which are refused below
            image = Image.open(io.BytesIO(data), formats=formats)
    except Image.DecompressionBombError:
        raise PictureError(where, what, too_large) from None
    except Exception as error:  # Pillow's decoders raise many types for damaged files
        reason = one_line(str(error), 120) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            reason = f"none of {', '.join(formats)}"
        elif re.match(rb"P\d", data):  # Pillow's messages for these are Python's own
            reason = "the numbers of its header, such as its size, cannot be read"
        raise PictureError(where, what, "", reason) from None
    if image.size[0] * image.size[1] > MAX_PIXELS:
        raise PictureError(where, what, too_large)
    return image


def _decode(image: Image.Image, where: str, what: str) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about odd metadata
            image.load()
    except Exception as error:  # any type, as in _opened
        reason = one_line(str(error), 120) or type(error).__name__
        raise PictureError(where, what, "", reason) from None


def _orientation(image: Image.Image) -> int:
    """Returns the EXIF orientation flag, 1 to 8; 1 (shown as stored) if none is readable."""
    try:
        flag = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged metadata, which viewers ignore
        return 1
    return flag if flag in _TURNS else 1
