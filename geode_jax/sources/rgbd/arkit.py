"""Recordings of ARKitScenes, frame by frame.

Layout of a video `<id>`, in its folder or in `<id>_frames` in it:

    lowres_wide/<id>_<seconds>.png              colour, 256 x 192
    lowres_depth/<id>_<seconds>.png             16 bit, millimetres, 0 = missing
    lowres_wide_intrinsics/<id>_<seconds>.pincam    width height fx fy cx cy
    lowres_wide.traj                            seconds, axis-angle (3), translation (3)

A row of the trajectory is camera-from-world, with OpenCV axes; the world is in metres, z up (as
Apple's `tenFpsDataLoader` reads it). Poses are recorded at another rate than pictures, so a frame's
pose is interpolated between the rows before and after it. Every frame has an intrinsic of its own,
whose time stamp may differ by a millisecond.

The device was held in any of four ways, and the pictures are stored as the sensor took them. Here
pictures, intrinsics and poses are turned by quarter turns, the same for all frames of a video, so
that the world's up direction, averaged over the poses, is up in the pictures. The column
`sky_direction` of the data set's metadata says the same.
"""

import dataclasses
import os
import re
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.spatial.transform import Rotation, Slerp

from geode_jax.errors import UserError
from geode_jax.exports import files, pictures
from geode_jax.sources.rgbd.intrinsics import camera
from geode_jax.sources.rgbd.sequence import Dropped, to_metres

MAX_POSE_GAP = 0.25
"""Longest time between two rows of a trajectory between which a pose is interpolated, seconds;
they are 0.1 apart."""
MAX_OVERHANG = 0.005
"""Longest time before the first or after the last row for which that row is taken, seconds; time
stamps in names are rounded to milliseconds."""
_STAMP_SLIP = 0.001
"""Difference between the time stamps of a picture and of its intrinsic, seconds."""
_QUARTER = np.array([[0, 1, 0, 0], [-1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])
"""Camera axes after a quarter turn anticlockwise of the picture, from those before."""


@dataclasses.dataclass(frozen=True)
class ArkitVideo:
    """A video as an `RgbdSequence`, made by `open_arkit`; pictures are read on demand.

    Attributes:
        folder: folder of the frames.
        video: its id.
        names: time stamps of the frames, seconds, in order.
        stored_size: (width, height) of the pictures on disk.
        turns: quarter turns anticlockwise that make the pictures upright.
        times: [n] seconds of the trajectory's rows, ascending.
        poses: [n, 4, 4] world-from-camera of the pictures on disk.
        notes: what was corrected on reading, a line each.
    """

    folder: Path
    video: str
    names: tuple[str, ...]
    stored_size: tuple[int, int]
    turns: int
    times: np.ndarray
    poses: np.ndarray
    notes: tuple[str, ...] = ()

    @property
    def depth_size(self) -> tuple[int, int]:
        """(width, height) of the upright pictures."""
        width, height = self.stored_size
        return (height, width) if self.turns % 2 else (width, height)

    def read_pose(self, name: str) -> np.ndarray:
        """Returns world-from-camera [4, 4] of the upright picture, OpenCV axes.

        Raises:
            Dropped: the trajectory has no rows around the frame.
        """
        pose = pose_at(self.times, self.poses, float(name))
        return pose @ np.linalg.matrix_power(_QUARTER, self.turns).T

    def read_cameras(self, name: str) -> tuple[np.ndarray, np.ndarray | None]:
        """Returns the intrinsic of the frame's upright picture, twice: depth has the same.

        Raises:
            Dropped: the intrinsic is missing, unreadable or impossible.
        """
        path = self._intrinsic_file(name)
        if path is None:
            raise Dropped("no intrinsic")
        size, matrix = read_pincam(path)
        if size != self.stored_size:
            raise Dropped("intrinsic for pictures of another size")
        for _ in range(self.turns):
            (fx, _, cx), (_, fy, cy), _ = matrix
            matrix = np.array([[fy, 0, cy], [0, fx, size[0] - 1 - cx], [0, 0, 1]])
            size = size[::-1]
        return matrix, matrix

    def read_depth(self, name: str) -> np.ndarray:
        """Returns depth [height, width] float32 metres of the upright picture, 0 = missing.

        Raises:
            Dropped: the image is missing, unreadable, of another size, or without any depth.
        """
        try:
            stored = pictures.read_depth(self._picture("lowres_depth", name))
        except UserError:
            raise Dropped("no readable depth image") from None
        if stored.shape != self.stored_size[::-1]:
            raise Dropped("depth image of another size")
        return to_metres(np.rot90(stored, self.turns), 1000.0)

    def read_color(self, name: str) -> Image.Image:
        """Returns the upright colour image, RGB.

        Raises:
            Dropped: the image is missing, unreadable, or of another size.
        """
        try:
            image = pictures.read_picture(self._picture("lowres_wide", name))
        except UserError:
            raise Dropped("no readable colour image") from None
        if image.size != self.stored_size:
            raise Dropped("colour image of another size")
        return Image.fromarray(np.ascontiguousarray(np.rot90(np.asarray(image), self.turns)))

    def _picture(self, kind: str, name: str) -> Path:
        return self.folder / kind / f"{self.video}_{name}.png"

    def _intrinsic_file(self, name: str) -> Path | None:
        places = [name, *(f"{float(name) + slip:.3f}" for slip in (-_STAMP_SLIP, _STAMP_SLIP))]
        folder = self.folder / "lowres_wide_intrinsics"
        found = (folder / f"{self.video}_{place}.pincam" for place in places)
        return next((path for path in found if path.is_file()), None)


def open_arkit(folder: Path, video: str) -> ArkitVideo:
    """Returns a video of which names, trajectory and one intrinsic have been read.

    Args:
        folder: the folder with `lowres_wide`, see the module.
        video: its id, with which the names of its pictures begin.

    Raises:
        UserError: there is no frame, or the trajectory or all intrinsics are missing or damaged.
    """
    stamp = re.compile(rf"{re.escape(video)}_(\d+(?:\.\d+)?)\.png")
    found = {
        match[1]
        for kind in ("lowres_wide", "lowres_depth")
        for path in (folder / kind).glob("*.png")
        if (match := stamp.fullmatch(path.name))
    }
    if not found:
        raise UserError(f"{folder}: no frame: lowres_wide/{video}_<seconds>.png is looked for")
    names = tuple(sorted(found, key=lambda name: (float(name), name)))
    times, poses = read_trajectory(folder / "lowres_wide.traj")
    video_read = ArkitVideo(folder, video, names, (0, 0), 0, times, poses)
    reason = ""
    for name in names:
        path = video_read._intrinsic_file(name)
        try:
            size = None if path is None else read_pincam(path)[0]
        except Dropped as dropped:
            reason, size = f" ({dropped})", None
        if size is not None:
            return dataclasses.replace(video_read, stored_size=size, turns=upright_turns(poses))
    raise UserError(f"{folder / 'lowres_wide_intrinsics'}: no intrinsic of a frame{reason}")


def read_pincam(path: Path) -> tuple[tuple[int, int], np.ndarray]:
    """Returns (width, height) and the intrinsic [3, 3] of a `.pincam` file.

    Raises:
        Dropped: it is no line of six numbers, or no camera has them.
    """
    try:
        width, height, fx, fy, cx, cy = (float(word) for word in files.read_text(path).split())
        size = (int(width), int(height))
    except (ValueError, OverflowError):  # UserError too
        raise Dropped("unreadable intrinsic") from None
    if size != (width, height) or not 0 < min(size) <= max(size) < 1 << 16:
        raise Dropped("unreadable intrinsic")
    try:
        return size, camera(str(path), fx, fy, cx, cy, size)
    except UserError:
        raise Dropped("impossible intrinsic") from None


def read_trajectory(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Returns the times [n] of a `.traj` file, ascending, and world-from-camera [n, 4, 4].

    Raises:
        UserError: the file is missing, has no row, or a row is not seven finite numbers.
    """
    if not os.path.lexists(path):
        raise UserError(f"{path}: no trajectory")
    rows = {}
    for number, line in enumerate(files.read_text(path).splitlines(), 1):
        words = line.split()
        if not words:
            continue
        try:
            row = np.array([float(word) for word in words])
        except ValueError:
            row = np.zeros(0)
        if row.shape != (7,) or not np.isfinite(row).all() or np.abs(row[1:]).max() > 1e6:
            raise UserError(f"{path}: line {number}: must be seven numbers: time, rotation, place")
        rows[row[0]] = row[1:]
    if not rows:
        raise UserError(f"{path}: has no row")
    times = np.array(sorted(rows))
    values = np.array([rows[time] for time in times])
    poses = np.tile(np.eye(4), (len(times), 1, 1))
    to_world = Rotation.from_rotvec(values[:, :3]).as_matrix().swapaxes(1, 2)
    poses[:, :3, :3] = to_world
    poses[:, :3, 3] = -(to_world @ values[:, 3:, None])[..., 0]
    return times, poses


def pose_at(times: np.ndarray, poses: np.ndarray, time: float) -> np.ndarray:
    """Returns the pose [4, 4] at a time, between the rows before and after it.

    The rotation turns evenly about one axis, the camera's centre moves on a straight line.

    Args:
        times: [n] ascending.
        poses: [n, 4, 4] world-from-camera.
        time: in the unit of `times`, seconds.

    Raises:
        Dropped: the rows are more than MAX_POSE_GAP apart, or the time is outside of them.
    """
    if not times[0] - MAX_OVERHANG <= time <= times[-1] + MAX_OVERHANG:
        raise Dropped("no pose at its time")
    time = float(np.clip(time, times[0], times[-1]))
    after = int(np.searchsorted(times, time))
    if times[after] == time:
        return poses[after]
    before = after - 1
    if times[after] - times[before] > MAX_POSE_GAP:
        raise Dropped("no pose at its time")
    pair = Rotation.from_matrix(poses[[before, after], :3, :3])
    share = (time - times[before]) / (times[after] - times[before])
    pose = np.eye(4)
    pose[:3, :3] = Slerp([0, 1], pair)(share).as_matrix()
    pose[:3, 3] = (1 - share) * poses[before, :3, 3] + share * poses[after, :3, 3]
    return pose


def upright_turns(poses: np.ndarray) -> int:
    """Returns the quarter turns anticlockwise that bring the world's up (z) to the pictures' top.

    Args:
        poses: [n, 4, 4] world-from-camera, OpenCV axes.
    """
    x, y = poses[:, 2, :2].sum(0)  # the sum of the world's z axis in camera axes
    return int(np.argmax([-y, x, y, -x]))  # at the top, right, bottom, left
