"""What every reader of RGB-D sequences gives: a camera on its way, read frame by frame.

Readers: `rgbd_folder` (images and text files), `datasets.sens` (one file of ScanNet).
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from PIL import Image

from geode_jax.errors import UserError
from geode_jax.exports import ROTATION_TOLERANCE


class Dropped(Exception):
    """Why a frame cannot be used."""


class RgbdSequence(Protocol):
    """An RGB-D sequence on disk, decoded frame by frame."""

    @property
    def names(self) -> tuple[str, ...]:
        """Of all frames, in the order of the sequence."""

    @property
    def depth_size(self) -> tuple[int, int]:
        """(width, height) of the depth images."""

    @property
    def depth_intrinsic(self) -> np.ndarray:
        """[3, 3] at that size, pixel centres at integers."""

    @property
    def color_intrinsic(self) -> np.ndarray | None:
        """[3, 3] at the colour images' size; None = the depth camera's, scaled."""

    def read_pose(self, name: str) -> np.ndarray:
        """World-from-camera [4, 4], OpenCV axes, rotation exactly orthonormal.

        Raises:
            Dropped: missing, not finite, not a rigid motion.
        """

    def read_depth(self, name: str) -> np.ndarray:
        """Depth [height, width] float32 metres, 0 = missing.

        Raises:
            Dropped: missing, unreadable, of another size, without any depth.
        """

    def read_color(self, name: str) -> Image.Image:
        """The colour image, RGB.

        Raises:
            Dropped: missing or unreadable.
        """


def rigid(pose: np.ndarray) -> np.ndarray:
    """The rigid motion [4, 4] that a matrix read from a file is meant to be.

    Raises:
        Dropped: not finite (ScanNet: -inf where tracking was lost), not rigid.
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
    """World-from-camera [4, 4] of tx ty tz qx qy qz qw; not finite where the quaternion is 0."""
    with np.errstate(invalid="ignore"):
        x, y, z, w = np.array(row[3:]) / np.linalg.norm(row[3:])
    pose = np.eye(4)
    pose[:3, :3] = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ]
    pose[:3, 3] = row[:3]
    return pose


def to_metres(stored: np.ndarray, depth_scale: float) -> np.ndarray:
    """Depth float32 metres of stored 16-bit values; 0 and 65535 mean missing.

    Raises:
        Dropped: nothing is known.
    """
    known = (stored > 0) & (stored < 65535)
    if not known.any():
        raise Dropped("no depth in the depth image")
    return np.where(known, stored, 0).astype(np.float32) / depth_scale


def camera(where: str, fx, fy, cx, cy, size: tuple[int, int]) -> np.ndarray:
    """The intrinsic [3, 3] of numbers read from a file; fy may be negative.

    Args:
        where: they are from, for the complaint.
        fx, fy, cx, cy: pixels.
        size: (width, height) of the image.

    Raises:
        UserError: no camera has these.
    """
    if not np.isfinite([fx, fy, cx, cy]).all() or fx <= 0 or fy == 0:
        raise UserError(f"{where}: focal lengths {fx}, {fy} and centre {cx}, {cy} are no camera")
    if not (0 < cx < size[0] and 0 < cy < size[1]):
        rule = f"the centre {cx}, {cy} is outside the image of {size[0]} x {size[1]} pixels"
        raise UserError(f"{where}: {rule}")
    return np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1.0]])


def resized(intrinsic: np.ndarray, old: tuple[int, int], new: tuple[int, int]) -> np.ndarray:
    """The intrinsic of the same picture at another (width, height)."""
    x, y = new[0] / old[0], new[1] / old[1]
    change = np.array([[x, 0, x / 2 - 0.5], [0, y, y / 2 - 0.5], [0, 0, 1]])
    return change @ intrinsic
