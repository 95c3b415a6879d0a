"""Small videos, written by PyAV."""

import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

TURNED = {90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}
"""Clockwise degrees by which players turn a picture -> entries a, b, c, d of its matrix."""


def write_video(
    path: Path, count: int, *, turned: int = 0, times: list[int] | None = None, size=(48, 32)
) -> Path:
    """Writes a video of `count` frames; the grey of frame i is (5 i) mod 256, left half black.

    Args:
        path: of the new .mp4.
        count: number of frames.
        turned: clockwise degrees of the rotation flag.
        times: presentation times of the frames in 1/100 s; None: ten a second.
        size: width and height as stored.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as video:
        stream = video.add_stream("mpeg4", rate=100)
        stream.bit_rate = 8_000_000
        stream.width, stream.height = size
        stream.pix_fmt, stream.time_base = "yuv420p", Fraction(1, 100)
        for i in range(count):
            picture = np.zeros((size[1], size[0], 3), np.uint8)
            picture[:, size[0] // 2 :] = 5 * i % 256
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = times[i] if times else 10 * i
            frame.time_base = Fraction(1, 100)
            video.mux(stream.encode(frame))
        video.mux(stream.encode())
    if turned:
        data = bytearray(path.read_bytes())
        matrix = data.index(b"tkhd") + 44  # ISO 14496-12, 8.3.2: rows a b u, c d v, x y w
        for entry, value in zip((0, 1, 3, 4), TURNED[turned], strict=True):
            data[matrix + 4 * entry : matrix + 4 * entry + 4] = struct.pack(">i", value << 16)
        path.write_bytes(data)
    return path


def number_of(frame: np.ndarray, count: int) -> int:
    """Returns which frame of `write_video` a picture shows, of the first 51."""
    assert count <= 51
    grey = np.sort(frame.mean(-1).reshape(-1))
    return round(float(grey[len(grey) // 2 :].mean()) / 5)
