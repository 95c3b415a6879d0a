"""Pictures and videos as VGGT takes them: numpy, Pillow and a video decoder; Python 3.9."""

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
"""Pictures that would be missing without a word."""
VIDEOS = (".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v")


def natural_order(path: Path) -> list:
    """Sorts 2.jpg before 10.jpg."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path.name)]


def chosen(count: int, most: int) -> list[int]:
    """At most `most` of `count` frames, evenly spaced from the first."""
    return list(range(count)) if count <= most else [i * count // most for i in range(most)]


# Every decoder gives the same frames: those of the first video stream in the order in which they
# are shown, each as often as it is stored, turned as the container says, as players do it; pixels
# that are not square stay so. One that cannot turn a video which is to be turned refuses it.


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
    import av

    with av.open(str(path)) as video:
        for frame in video.decode(video=0):
            # Degrees against the clock; before version 14 nobody tells.
            quarters, rest = divmod(frame.rotation, 90)
            if rest:
                raise ValueError("it is turned by no quarter")
            yield np.rot90(frame.to_ndarray(format="rgb24"), quarters)


def _imageio_frames(path: Path) -> Iterator[np.ndarray]:
    import imageio.v3

    # ffmpeg turns frames, which imageio's other plug-ins do not, and repeats none if so told.
    options = {"plugin": "FFMPEG", "output_params": ["-fps_mode", "passthrough"]}
    yield from imageio.v3.imiter(str(path), **options)


def video_frames(path: Path, most: int) -> list[np.ndarray]:
    """At most `most` frames [H, W, 3] of a video as a person sees it, by what can decode it here.

    Raises:
        InputError: nothing can.
    """
    tried = []
    for decode in (_opencv_frames, _pyav_frames, _imageio_frames):
        name = decode.__name__.split("_")[1]
        try:
            # Decoded twice: containers are often wrong about how many frames they have.
            wanted = set(chosen(sum(1 for _ in decode(path)), most))
            if wanted:
                return [frame for i, frame in enumerate(decode(path)) if i in wanted]
            tried.append(f"{name} finds no frame")
        except Exception as error:  # not installed, or no such codec: each library has its own
            said = " ".join(str(error).split())[:80]
            tried.append(f"{name}: {type(error).__name__}: {said}")
    raise job.InputError(f"{path}: cannot be decoded ({'; '.join(tried)})")


def read_pictures(source: Path, most: int, contract: str | Path) -> list[Image.Image]:
    """The pictures of a scene, RGB, as a person sees them (`exports.pictures`).

    Args:
        source: a folder of pictures, or a video.
        most: how many at most, spread evenly.
        contract: folder of the package `exports`.

    Raises:
        InputError: there is none, or one cannot be read.
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
    """The module `pictures` of the package `exports`, which that does not load by itself."""
    return importlib.import_module(f"{job.load_contract(contract).__name__}.pictures")


def prepare(
    picture: Image.Image, mode: str, size: int, patch: int
) -> tuple[np.ndarray, np.ndarray]:
    """A picture as VGGT takes it, by the rule of its own `load_and_preprocess_images`.

    crop: the width becomes `size`, the height follows, in whole patches; what is taller than
    `size` loses its top and bottom. pad: the longer side becomes `size`, the other follows, white
    fills the square. Bicubic.

    Returns:
        uint8 [H, W, 3], and bool [H, W], which pixels are of the picture.
    """
    width, height = picture.size
    longest = width if mode == "crop" else max(width, height)
    whole = [max(1, round(side * (size / longest) / patch)) * patch for side in picture.size]
    new = [size if side == longest else side_ for side, side_ in zip(picture.size, whole)]
    pixels = np.asarray(picture.resize(tuple(new), Image.BICUBIC))
    if mode == "crop":
        top = max(0, (pixels.shape[0] - size) // 2)
        pixels = pixels[top : top + size]
        return pixels, np.ones(pixels.shape[:2], bool)
    square, inside = np.full((size, size, 3), 255, np.uint8), np.zeros((size, size), bool)
    top, left = ((size - side) // 2 for side in pixels.shape[:2])
    place = (slice(top, top + pixels.shape[0]), slice(left, left + pixels.shape[1]))
    square[place], inside[place] = pixels, True
    return square, inside
