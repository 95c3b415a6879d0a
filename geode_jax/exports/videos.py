"""Reads the frames of videos by PyAV (`pip install av`, or the extra `video` of geode_jax).

* Frames are those of the first video stream in display order, each as often as it is stored,
  whatever their times are; a variable frame rate changes nothing.
* Frames are turned by the container's rotation flag, as players turn them. Pixels that are not
  square are not scaled.
* A video that is cut off or damaged is refused: its frames would be others than those of the whole.

This module needs PyAV, so it is not imported with the package; otherwise it stands alone (Python
3.9, numpy).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from .files import UserError, one_line

ENDINGS = (".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v")
"""Endings of the names of videos; upper case counts as lower case."""


def uniform_indices(count: int, frames: int) -> np.ndarray:
    """Returns which of a video's `count` frames are seen, [frames]; the first and the last are.

    This is the rule of VSI-Bench's harness, lmms-eval, for the models that take a fixed number of
    frames (`llava_onevision`, `llava_vid`): evenly spaced, rounded down, and repeated where the
    video has fewer frames.
    """
    return np.linspace(0, count - 1, frames, dtype=int)


def decoded(path: Path) -> Iterator[np.ndarray]:
    """Yields all frames of a video, uint8 [H, W, 3], upright.

    Raises:
        ImportError: PyAV is not installed.
        ValueError, OSError, av.error.FFmpegError: the video cannot be read.
    """
    import av

    with av.open(str(path)) as video:
        for frame in video.decode(video=0):
            # Degrees anticlockwise. PyAV has this attribute from version 14 on.
            quarters, rest = divmod(frame.rotation, 90)
            if rest:
                raise ValueError("it is turned by no quarter")
            yield np.rot90(frame.to_ndarray(format="rgb24"), quarters)


def read_frames(path: Path, frames: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Returns the frames of `uniform_indices` of a video, and these indices.

    Args:
        path: of the video.
        frames: number of frames, repeated ones included.

    Returns:
        Frames uint8 [H, W, 3], and indices [frames].

    Raises:
        UserError: PyAV is missing, or the video is missing, damaged, cut off or without a frame.
    """
    try:
        import av.error
    except ImportError:
        raise UserError(f"{path}: reading a video needs PyAV: pip install av") from None
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            count = _frame_count(path)
            indices = uniform_indices(count, frames)
            wanted = set(indices.tolist())
            found = {i: frame for i, frame in enumerate(decoded(path)) if i in wanted}
    except (av.error.FFmpegError, ValueError, OSError, MemoryError) as error:
        raise UserError(f"{path}: no whole video: {one_line(str(error), 100)}") from None
    if len(found) < len(wanted):
        raise UserError(f"{path}: no whole video: its last frames do not decode")
    return [found[i] for i in indices.tolist()], indices


def _frame_count(path: Path) -> int:
    """Returns the number of frames that decode.

    Raises:
        ValueError: there is none, or the container promises more, or packets are damaged.
    """
    import av

    with av.open(str(path)) as video:
        if not video.streams.video:
            raise ValueError("it has no video stream")
        promised = video.streams.video[0].frames
        count = damaged = 0
        for frame in video.decode(video=0):
            count += 1
            damaged += bool(frame.is_corrupt)
    if not count:
        raise ValueError("it has no frame")
    if damaged or count < promised:
        raise ValueError(f"cut off or damaged: {count - damaged} of {max(promised, count)} frames")
    return count
