"""Reads pictures and videos as inputs of VGGT; needs Python 3.9, numpy, Pillow, video decoders."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import export_job as job
import numpy as np
from PIL import Image

UNREAD = (".avif", ".dng", ".heic", ".heif", ".jp2", ".tif", ".tiff")
"""Endings of pictures that are refused, because skipping them would lose frames silently."""
VIDEOS = (".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v")


def natural_order(path: Path) -> list:
    """Returns a sort key that puts 2.jpg before 10.jpg."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path.name)]


def chosen(count: int, most: int) -> list[int]:
    """Returns at most `most` of `count` indices, evenly spaced from 0."""
    return list(range(count)) if count <= most else [i * count // most for i in range(most)]


# All decoders give the same frames: those of the first video stream in display order, each as
# often as it is stored, rotated by the container's flag as in players; non-square pixels are not
# scaled. A decoder that cannot rotate a video with such a flag raises an error.


def _opencv_frames(path: Path) -> Iterator[np.ndarray]:
    import cv2

    video = cv2.VideoCapture(str(path))
    video.set(cv2.CAP_PROP_ORIENTATION_AUTO, 1)
    if video.get(cv2.CAP_PROP_ORIENTATION_META) and not video.get(cv2.CAP_PROP_ORIENTATION_AUTO):
        raise ValueError("its backend does not turn frames")
    while True:
        more, frame = video.read()
        if not more:
            return
        yield frame[:, :, ::-1]


def _pyav_frames(path: Path) -> Iterator[np.ndarray]:
    package = job.load_contract(job.CONTRACT)
    yield from importlib.import_module(f"{package.__name__}.videos").decoded(path)


def _imageio_frames(path: Path) -> Iterator[np.ndarray]:
    import imageio.v3

    # Only the ffmpeg plug-in rotates frames; the option keeps it from repeating any.
    options = {"plugin": "FFMPEG", "output_params": ["-fps_mode", "passthrough"]}
    yield from imageio.v3.imiter(str(path), **options)


def video_frames(path: Path, most: int) -> list[np.ndarray]:
    """Returns at most `most` frames [H, W, 3] of a video, upright, by the first working decoder.

    Raises:
        InputError: no installed decoder can read the video.
    """
    tried = []
    for decode in (_opencv_frames, _pyav_frames, _imageio_frames):
        name = decode.__name__.split("_")[1]
        try:
            # Decoded twice, because the number of frames in containers is often wrong.
            wanted = set(chosen(sum(1 for _ in decode(path)), most))
            if wanted:
                return [frame for i, frame in enumerate(decode(path)) if i in wanted]
            tried.append(f"{name} finds no frame")
        except Exception as error:  # not installed or no codec; each library has its own types
            words = " ".join(str(error).split())[:80]
            tried.append(f"{name}: {type(error).__name__}: {words}")
    raise job.InputError(f"{path}: cannot be decoded ({'; '.join(tried)})")


def read_pictures(source: Path, most: int, contract: str | Path) -> list[Image.Image]:
    """Returns the pictures of a scene, RGB, upright (`exports.pictures`).

    Args:
        source: a folder of pictures, or a video.
        most: largest number of pictures; they are spread evenly.
        contract: folder of the package `exports`.

    Raises:
        InputError: there is no picture, or one cannot be read.
    """
    if source.suffix.lower() in VIDEOS:
        return [Image.fromarray(np.ascontiguousarray(f)) for f in video_frames(source, most)]
    endings = _reader(contract).ENDINGS
    found = (path for path in source.iterdir() if not path.name.startswith("."))
    files = sorted((p for p in found if p.suffix.lower() in endings), key=natural_order)
    for path in source.iterdir():
        if path.suffix.lower() in UNREAD and not path.name.startswith("."):
            raise job.InputError(f"{path}: pictures of this kind are not read; make it a .png")
    if not files:
        raise job.InputError(f"{source}: no picture ({', '.join(endings)})")
    try:
        return [_reader(contract).read_picture(files[index]) for index in chosen(len(files), most)]
    except ValueError as error:  # UserError of the package just loaded
        raise job.InputError(str(error)) from None


def _reader(contract: str | Path) -> Any:
    """Returns the module `pictures` of the package `exports`, which does not import it itself."""
    return importlib.import_module(f"{job.load_contract(contract).__name__}.pictures")


def prepare(
    picture: Image.Image, mode: str, size: int, patch: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns a picture preprocessed as in VGGT's `load_and_preprocess_images`.

    "crop" resizes the width to `size` and the height in proportion, in whole patches; pictures
    taller than `size` lose their top and bottom. "pad" resizes the longer side to `size` and fills
    a square with white. Both resize bicubically.

    Returns:
        uint8 [H, W, 3], and bool [H, W], True for pixels of the picture.
    """
    width, height = picture.size
    longest = width if mode == "crop" else max(width, height)

    def resized(side: int) -> int:
        return size if side == longest else max(1, round(side * (size / longest) / patch)) * patch

    new = (resized(width), resized(height))
    pixels = np.asarray(picture.resize(new, Image.Resampling.BICUBIC))
    if mode == "crop":
        top = max(0, (pixels.shape[0] - size) // 2)
        pixels = pixels[top : top + size]
        return pixels, np.ones(pixels.shape[:2], bool)
    square, inside = np.full((size, size, 3), 255, np.uint8), np.zeros((size, size), bool)
    top, left = ((size - side) // 2 for side in pixels.shape[:2])
    place = (slice(top, top + pixels.shape[0]), slice(left, left + pixels.shape[1]))
    square[place], inside[place] = pixels, True
    return square, inside
