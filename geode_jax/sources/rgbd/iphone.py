"""The iPhone recordings of ScanNet++, frame by frame.

Layout, with the pictures as the data set's own toolbox extracts them (`prepare_iphone_data`):

    iphone/rgb/frame_000000.jpg         colour, 1920 x 1440
    iphone/depth/frame_000000.png       16 bit, millimetres, 256 x 192, 0 = missing
    iphone/pose_intrinsic_imu.json      {"frame_000000": {"intrinsic": 3 x 3 of colour,
                                        "aligned_pose": 4 x 4 world-from-camera}}

`aligned_pose` has OpenCV axes and the frame of the laser scan (the toolbox's `arkit_pcl`). Both
images have the same field of view. The frames in the video and in `depth.bin` are not read.
"""

import contextlib
import dataclasses
import re
from pathlib import Path

import numpy as np
from PIL import Image

from geode_jax.errors import UserError
from geode_jax.exports import files, pictures
from geode_jax.sources.rgbd.intrinsics import camera, resized, same_shape
from geode_jax.sources.rgbd.sequence import Dropped, rigid, to_metres

_FRAME = re.compile(r"frame_\d{6}")


@dataclasses.dataclass(frozen=True)
class IphoneSequence:
    """A recording as an `RgbdSequence`, made by `open_iphone`; pictures are read on demand.

    Attributes:
        folder: `iphone`.
        names: the frames, in order.
        color_size, depth_size: (width, height) of the pictures.
        records: name -> its record of `pose_intrinsic_imu.json`.
        notes: what was corrected on reading, a line each.
    """

    folder: Path
    names: tuple[str, ...]
    color_size: tuple[int, int]
    depth_size: tuple[int, int]
    records: dict
    notes: tuple[str, ...] = ()

    def read_pose(self, name: str) -> np.ndarray:
        """Returns world-from-camera [4, 4], OpenCV axes.

        Raises:
            Dropped: the pose is missing, not finite, or not a rigid motion.
        """
        return rigid(self._matrix(name, "aligned_pose", 4))

    def read_cameras(self, name: str) -> tuple[np.ndarray, np.ndarray | None]:
        """Returns the frame's intrinsics of depth and of colour.

        Raises:
            Dropped: the intrinsic is missing or impossible.
        """
        (fx, _, cx), (_, fy, cy), _ = self._matrix(name, "intrinsic", 3).tolist()
        try:
            color = camera(name, fx, fy, cx, cy, self.color_size)
        except UserError:
            raise Dropped("impossible intrinsic") from None
        return resized(color, self.color_size, self.depth_size), color

    def read_depth(self, name: str) -> np.ndarray:
        """Returns depth [height, width] float32 metres, 0 = missing.

        Raises:
            Dropped: the image is missing, unreadable, of another size, or without any depth.
        """
        try:
            stored = pictures.read_depth(self.folder / "depth" / f"{name}.png")
        except UserError:
            raise Dropped("no readable depth image") from None
        if stored.shape != self.depth_size[::-1]:
            raise Dropped("depth image of another size")
        return to_metres(stored, 1000.0)

    def read_color(self, name: str) -> Image.Image:
        """Returns the colour image, RGB.

        Raises:
            Dropped: the image is missing, unreadable, or of another size.
        """
        try:
            image = pictures.read_picture(self.folder / "rgb" / f"{name}.jpg")
        except UserError:
            raise Dropped("no readable colour image") from None
        if image.size != self.color_size:
            raise Dropped("colour image of another size")
        return image

    def _matrix(self, name: str, field: str, side: int) -> np.ndarray:
        record = self.records.get(name)
        if not isinstance(record, dict) or field not in record:
            raise Dropped(f"no {field}")
        try:
            return np.array(record[field], np.float64).reshape(side, side)
        except (TypeError, ValueError, OverflowError):
            raise Dropped(f"unreadable {field}") from None


def open_iphone(folder: Path) -> IphoneSequence:
    """Returns a recording of which names, sizes, poses and intrinsics have been read.

    Args:
        folder: `iphone` of a scene.

    Raises:
        UserError: frames have not been extracted, none is readable, or colour and depth have other
            shapes.
    """
    names = sorted({path.stem for path in (folder / "rgb").glob("*.jpg")})
    names = tuple(name for name in names if _FRAME.fullmatch(name))
    if not names or not (folder / "depth").is_dir():
        raise UserError(
            f"{folder}: no rgb/frame_*.jpg with depth/frame_*.png: the toolbox of the data set "
            "extracts them (iphone.prepare_iphone_data); rgb.mkv and depth.bin are not read"
        )
    records = files.read_json_object(folder / "pose_intrinsic_imu.json", nan=True)
    sizes = [
        _first_size(folder, kind, [f"{name}{ending}" for name in names])
        for kind, ending in (("rgb", ".jpg"), ("depth", ".png"))
    ]
    if not same_shape(*sizes):
        raise UserError(f"{folder}: colour {sizes[0]} and depth {sizes[1]} have other shapes")
    return IphoneSequence(folder, names, sizes[0], sizes[1], records)


def _first_size(folder: Path, kind: str, names: list[str]) -> tuple[int, int]:
    """Returns the (width, height) of the first readable picture."""
    for name in names:
        with contextlib.suppress(UserError):  # the frame is dropped when it is read
            return pictures.shown_size(folder / kind / name)
    raise UserError(f"{folder / kind}: no readable image")
