"""`.sens` files of ScanNet, version 4, frame by frame in any order.

Layout, little endian (ScanNet's SensReader): uint32 version, uint64 length and the sensor's name;
four float32 [4, 4]: intrinsic of colour, extrinsic of colour, intrinsic of depth, extrinsic of
depth; int32 compression of colour and of depth; uint32 width and height of colour, then of depth;
float32 depth_shift; uint64 number of frames. A frame: float32 [4, 4] camera-to-world, uint64 two
time stamps and the bytes of colour and of depth, then these bytes. What follows the frames
(inertial data) is not read, nor are the extrinsics, which are the identity in ScanNet: both cameras
are taken to have the same position and axes.

Opening a file reads headers only, 96 bytes per frame; pictures are decoded on demand.
"""

import dataclasses
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from geode_jax.errors import UserError
from geode_jax.exports import files
from geode_jax.exports.pictures import orientation, read_picture
from geode_jax.sources.rgbd.intrinsics import Given, of_one_view
from geode_jax.sources.rgbd.sequence import Dropped, rigid, to_metres

VERSION = 4
COLOR = {-1: "unknown", 0: "raw", 1: "png", 2: "jpeg"}
"""Number -> compression of colour; png and jpeg are read."""
DEPTH = {-1: "unknown", 0: "raw_ushort", 1: "zlib_ushort", 2: "occi_ushort"}
"""Number -> compression of depth; raw_ushort and zlib_ushort are read."""

_CAMERAS, _SIZES, _FRAME = struct.Struct("<64f"), struct.Struct("<2i4IfQ"), struct.Struct("<16f4Q")
_MAX_NAME_BYTES = 4096


@dataclasses.dataclass(frozen=True)
class SensFile:
    """A `.sens` file as an `RgbdSequence`, made by `open_sens`; it keeps no file open.

    Attributes:
        path: the file.
        sensor: the sensor's name.
        names: "0", "1", ...: the numbers of the frames.
        color_size, depth_size: (width, height).
        color_intrinsic, depth_intrinsic: [3, 3] at these sizes, pixel centres at integers.
            `intrinsics.resized` scales them to other sizes.
        color_format: jpeg or png.
        depth_format: zlib_ushort or raw_ushort.
        depth_scale: stored value of one metre (the file's depth_shift).
        poses: [n, 4, 4] float32 camera-to-world as stored; -inf where tracking was lost.
        places: [n, 3] int64: offset of a frame's colour, bytes of its colour, bytes of its depth.
        notes: what was corrected on reading, a line each.
    """

    path: Path
    sensor: str
    names: tuple[str, ...]
    color_size: tuple[int, int]
    depth_size: tuple[int, int]
    color_intrinsic: np.ndarray | None
    depth_intrinsic: np.ndarray
    color_format: str
    depth_format: str
    depth_scale: float
    poses: np.ndarray
    places: np.ndarray
    notes: tuple[str, ...] = ()

    def read_pose(self, name: str) -> np.ndarray:
        """Returns world-from-camera [4, 4], OpenCV axes, rotation exactly orthonormal.

        Raises:
            Dropped: the pose is not finite (tracking was lost) or not a rigid motion.
        """
        return rigid(self.poses[int(name)].astype(np.float64))

    def read_cameras(self, name: str) -> tuple[np.ndarray, np.ndarray | None]:
        """Returns the intrinsics of depth and colour, which are those of all frames."""
        return self.depth_intrinsic, self.color_intrinsic

    def read_stored_depth(self, name: str) -> np.ndarray:
        """Returns depth [height, width] uint16 as stored, 0 = missing.

        Raises:
            Dropped: the image is damaged or of another size.
        """
        start, color, size = self.places[int(name)].tolist()
        stored = self._read(start + color, size)
        width, height = self.depth_size
        if self.depth_format == "zlib_ushort":
            unpacker = zlib.decompressobj()
            try:  # at most one byte too many, so that a damaged file cannot fill the memory
                stored = unpacker.decompress(stored, 2 * width * height + 1)
            except zlib.error:
                raise Dropped("unreadable depth image") from None
        if len(stored) != 2 * width * height:
            raise Dropped("depth image of another size")
        return np.frombuffer(stored, "<u2").reshape(height, width)

    def read_depth(self, name: str) -> np.ndarray:
        """Returns depth [height, width] float32 metres, 0 = missing.

        Raises:
            Dropped: the image is damaged, of another size, or without any depth.
        """
        return to_metres(self.read_stored_depth(name), self.depth_scale)

    def read_color(self, name: str) -> Image.Image:
        """Returns the colour image, RGB.

        Raises:
            Dropped: the image is damaged, of another size, or has an orientation flag, which depth
                cannot have.
        """
        start, size, _ = self.places[int(name)].tolist()
        try:
            data = self._read(start, size)
            image = read_picture(data, formats=(self.color_format.upper(),))
            if orientation(data) != 1:
                raise Dropped("colour image with an orientation flag")
        except UserError:
            raise Dropped("unreadable colour image") from None
        if image.size != self.color_size:
            raise Dropped("colour image of another size")
        return image

    def _read(self, start: int, size: int) -> bytes:
        with open(self.path, "rb") as file:
            file.seek(start)
            return file.read(size)


def open_sens(path: str | Path) -> SensFile:
    """Returns a file of which the headers have been read, also those of all frames.

    Raises:
        UserError: the file cannot be read, is truncated (the message names the frame), has another
            version or compression, or an impossible camera.
    """
    path = Path(path)
    try:
        with files.open_regular(path) as file:
            return _read_headers(path, file.raw, path.stat().st_size)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def _read_headers(path: Path, file, end: int) -> SensFile:
    def take(size: int, where: Callable[[], str]) -> bytes:
        data = file.read(size)
        if len(data) < size:
            raise UserError(f"{path}: truncated in {where()}")
        return data

    def header() -> str:
        return "the header, before any frame"

    (version,) = struct.unpack("<I", take(4, header))
    if version != VERSION:
        raise UserError(f"{path}: version {version} of .sens; {VERSION} is read")
    (length,) = struct.unpack("<Q", take(8, header))
    if length > _MAX_NAME_BYTES:
        raise UserError(f"{path}: not a .sens file: the sensor's name has {length} bytes")
    sensor = take(length, header).decode("utf-8", "replace")
    cameras = np.array(_CAMERAS.unpack(take(_CAMERAS.size, header))).reshape(4, 4, 4)
    color, depth, *sizes, scale, count = _SIZES.unpack(take(_SIZES.size, header))
    formats = (
        _known(path, "colour", color, COLOR, ("jpeg", "png")),
        _known(path, "depth", depth, DEPTH, ("zlib_ushort", "raw_ushort")),
    )
    if not 1 <= scale < np.inf:
        raise UserError(f"{path}: depth_shift {scale} is no number of units in a metre")
    if not 0 < min(sizes) <= max(sizes) < 1 << 16:
        raise UserError(f"{path}: images of {sizes} pixels")
    color_size, depth_size = (sizes[0], sizes[1]), (sizes[2], sizes[3])
    color_given = Given(f"{path}: colour", cameras[0, :3, :3], color_size)
    depth_given = Given(f"{path}: depth", cameras[2, :3, :3], depth_size)
    for one in (color_given, depth_given):
        if not one.matrix[1, 1] > 0:
            raise UserError(
                f"{one.where}: focal lengths {one.matrix[[0, 1], [0, 1]]} are no camera"
            )
    depth_k, color_k, notes = of_one_view(depth_given, color_given, (depth_size, color_size))
    poses, places, place = [], [], file.tell()
    while len(poses) < count:
        data = take(_FRAME.size, lambda: f"frame {len(poses)} of {count}")
        *_, color_bytes, depth_bytes = _FRAME.unpack(data)
        place += _FRAME.size
        if place + color_bytes + depth_bytes > end:
            raise UserError(f"{path}: truncated in frame {len(poses)} of {count}")
        poses.append(np.frombuffer(data, "<f4", 16))
        places.append((place, color_bytes, depth_bytes))
        place = file.seek(place + color_bytes + depth_bytes)
    return SensFile(
        path,
        sensor,
        tuple(map(str, range(count))),
        color_size,
        depth_size,
        color_k,
        depth_k,
        *formats,
        scale,
        np.array(poses, np.float32).reshape(-1, 4, 4),
        np.array(places, np.int64).reshape(-1, 3),
        tuple(notes),
    )


def _known(path: Path, what: str, number: int, names: dict[int, str], read) -> str:
    """Returns the name of a compression; raises UserError if it is not in `read`."""
    name = names.get(number, str(number))
    if name not in read:
        rule = f"{what} is compressed as {name}; read are {' and '.join(read)}"
        raise UserError(f"{path}: {rule}")
    return name
