"""What all readers of RGB-D sequences offer: a moving camera, read frame by frame.

The readers are `rgbd.folder` (images and text files) and `rgbd.sens` (one file of ScanNet).
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from PIL import Image
from scipy.spatial.transform import Rotation

from geode_jax.exports import ROTATION_TOLERANCE


class Dropped(Exception):
    """A frame that cannot be used; the message is the reason."""


class RgbdSequence(Protocol):
    """An RGB-D sequence on disk, decoded frame by frame."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all frames, in the order of the sequence."""
        ...

    @property
    def depth_size(self) -> tuple[int, int]:
        """(width, height) of the depth images."""
        ...

    @property
    def notes(self) -> tuple[str, ...]:
        """What was corrected on reading, a line each."""
        ...

    def read_pose(self, name: str) -> np.ndarray:
        """Returns world-from-camera [4, 4], OpenCV axes, rotation exactly orthonormal.

        Raises:
            Dropped: the pose is missing, not finite, or not a rigid motion.
        """
        ...

    def read_cameras(self, name: str) -> tuple[np.ndarray, np.ndarray | None]:
        """Returns the intrinsics [3, 3] of depth and of colour at their images' sizes.

        Pixel centres are at integers. None for colour means the depth camera's, scaled.

        Raises:
            Dropped: a frame has an intrinsic of its own, which is missing or impossible.
        """
        ...

    def read_depth(self, name: str) -> np.ndarray:
        """Returns depth [height, width] float32 metres, 0 = missing.

        Raises:
            Dropped: the image is missing, unreadable, of another size, or without any depth.
        """
        ...

    def read_color(self, name: str) -> Image.Image:
        """Returns the colour image, RGB.

        Raises:
            Dropped: the image is missing or unreadable.
        """
        ...


def rigid(pose: np.ndarray) -> np.ndarray:
    """Returns the rigid motion [4, 4] closest to a matrix read from a file.

    Raises:
        Dropped: the matrix is not finite (ScanNet: -inf where tracking was lost) or not rigid.
    """
    if not np.isfinite(pose).all():
        raise Dropped("pose not finite")
    rotation = pose[:3, :3]
    error = np.abs(rotation @ rotation.T - np.eye(3)).max()
    if error > ROTATION_TOLERANCE or np.linalg.det(rotation) < 0:
        raise Dropped("pose not rigid")
    if np.abs(pose[3] - (0, 0, 0, 1)).max() > ROTATION_TOLERANCE:
        raise Dropped("pose not rigid")
    u, _, vt = np.linalg.svd(rotation)
    motion = np.eye(4)
    motion[:3, :3], motion[:3, 3] = u @ vt, pose[:3, 3]
    return motion


def pose_of_row(row: Sequence[float]) -> np.ndarray:
    """Returns world-from-camera [4, 4] of tx ty tz qx qy qz qw.

    The rotation is NaN where the quaternion has no direction: its length is 0, or not finite.
    """
    with np.errstate(over="ignore", under="ignore"):
        length = np.linalg.norm(row[3:])
    has_direction = 0 < length < np.inf
    pose = np.eye(4)
    pose[:3, :3] = Rotation.from_quat(row[3:]).as_matrix() if has_direction else np.nan
    pose[:3, 3] = row[:3]
    return pose


def to_metres(stored: np.ndarray, depth_scale: float) -> np.ndarray:
    """Returns depth in float32 metres of stored 16-bit values; 0 and 65535 mean missing.

    Raises:
        Dropped: all values are missing.
    """
    known = (stored > 0) & (stored < 65535)
    if not known.any():
        raise Dropped("no depth in the depth image")
    return np.where(known, stored, 0).astype(np.float32) / depth_scale
