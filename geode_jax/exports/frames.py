"""Transforms a VGGT reconstruction to the frame that Sonata expects.

VGGT's point cloud has no metric scale (its unit is a mean distance); its frame is the OpenCV frame
of the first camera (x right, y down, z forward). Sonata was trained on metres, z up, the cloud
centred in x and y, the floor at 0, and is not invariant to any of these.

This file stands alone (numpy; Python 3.9), as `exports` does.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

Y_DOWN = (0.0, -1.0, 0.0)
"""The up direction in the OpenCV frame of a level camera; VGGT's first camera is assumed level."""

ROOM_HEIGHT = 3.0
"""Assumed metres from floor to ceiling, as in Concerto's demo."""


class Similarity(NamedTuple):
    """The map x -> scale * rotation @ x + translation.

    Attributes:
        rotation: [3, 3].
        scale: metres per unit of the source frame.
        translation: [3] metres.
    """

    rotation: np.ndarray
    scale: float
    translation: np.ndarray

    def points(self, points: np.ndarray) -> np.ndarray:
        """Returns points [..., 3] in the new frame."""
        return self.scale * points @ self.rotation.T + self.translation

    def extrinsic(self, extrinsic: np.ndarray) -> np.ndarray:
        """Returns camera-from-world poses [..., 3, 4] for the new world frame, in metres.

        With y = s Q x + b, R x + t in units is R Q^T y + (s t - R Q^T b) in metres.
        """
        rotation = extrinsic[..., :3] @ self.rotation.T
        translation = self.scale * extrinsic[..., 3] - rotation @ self.translation
        return np.concatenate([rotation, translation[..., None]], axis=-1)


def to_sonata_frame(
    points: np.ndarray,
    *,
    up: tuple[float, float, float] = Y_DOWN,
    metres_per_unit: float | None = None,
    height: float = ROOM_HEIGHT,
    outliers: float = 0.01,
) -> Similarity:
    """Returns the similarity to metres, z up, the cloud centred in x and y, its floor at z = 0.

    Args:
        points: [n, 3], confident points, from which centre, floor and scale are measured.
        up: up direction in the frame of the points, of any length.
        metres_per_unit: the scale if known (1 for a metric cloud), above 0; None assumes that the
            cloud is `height` high.
        height: metres, above 0; ignored if the scale is known.
        outliers: share of the points, below a half, that are ignored on each side when the extent
            is measured.

    Raises:
        ValueError: an argument is out of range, there is no point, a point is not finite, `up` is
            no direction, or the scale is unknown and the cloud has no height.
    """
    points = np.asarray(points, np.float64)
    if points.ndim != 2 or points.shape[1:] != (3,) or not len(points):
        raise ValueError(f"frames: points of shape {list(points.shape)} are not [n, 3]")
    if not np.isfinite(points).all():
        raise ValueError("frames: a point is not finite")
    for name, value in (("metres_per_unit", metres_per_unit), ("height", height)):
        if value is not None and not 0 < value < np.inf:
            raise ValueError(f"frames: {name} {value} is no length above 0")
    if not 0 <= outliers < 0.5:
        raise ValueError(f"frames: {outliers} is no share of outliers below a half")
    rotation = _rotation_to_z(np.asarray(up, np.float64))
    turned = points @ rotation.T
    low, high = np.quantile(turned, [outliers, 1 - outliers], axis=0)
    if metres_per_unit is None:
        if high[2] <= low[2]:
            raise ValueError("frames: the cloud has no height to take its scale from")
        metres_per_unit = float(height / (high[2] - low[2]))
    origin = np.array([*(low[:2] + high[:2]) / 2, low[2]])
    return Similarity(rotation, float(metres_per_unit), -metres_per_unit * origin)


def _rotation_to_z(up: np.ndarray) -> np.ndarray:
    """Returns the rotation [3, 3] with the smallest angle that turns `up` to +z."""
    length = np.linalg.norm(up)
    if not 0 < length < np.inf:
        raise ValueError(f"frames: up {up.tolist()} is no direction")
    x, y, z = up / length
    if z < -1 + 1e-12:  # straight down: half a turn about any horizontal axis
        return np.diag([1.0, -1.0, -1.0])
    # Rodrigues' formula about up x z.
    cross = np.array([[0, 0, -x], [0, 0, -y], [x, y, 0]])
    return np.eye(3) + cross + cross @ cross / (1 + z)
