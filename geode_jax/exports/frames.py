"""From the frame of a VGGT reconstruction to the one that Sonata's points are expected in.

VGGT's cloud has no scale (its unit is a mean distance), stands in its first camera's OpenCV frame
(x right, y down, z ahead), and has its origin there. Sonata was trained on metres, z up, the cloud
centred in x and y, the floor at 0, and is not invariant to any of it.

This file stands alone (numpy; Python 3.9), as `exports` does.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

Y_DOWN = (0.0, -1.0, 0.0)
"""Up in an OpenCV camera that is held level, which is what VGGT's first camera is taken for."""

ROOM_HEIGHT = 3.0
"""Metres from floor to ceiling where nothing better is known, as Concerto's own demo assumes."""


class Similarity(NamedTuple):
    """x -> scale * rotation @ x + translation.

    Attributes:
        rotation: [3, 3].
        scale: metres a unit of the source.
        translation: [3] metres.
    """

    rotation: np.ndarray
    scale: float
    translation: np.ndarray

    def points(self, points: np.ndarray) -> np.ndarray:
        """Points [..., 3] in the new frame."""
        return self.scale * points @ self.rotation.T + self.translation

    def extrinsic(self, extrinsic: np.ndarray) -> np.ndarray:
        """Camera-from-world poses [..., 3, 4] for the new world; their cameras see in metres.

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
    """The similarity that takes a cloud to metres, z up, centred in x and y, its floor at z = 0.

    Args:
        points: [N, 3], the cloud (of confident points) that decides centre, floor and scale.
        up: direction of up in the cloud's frame, any length.
        metres_per_unit: the scale where it is known (1 for a metric cloud), above 0; None takes the
            cloud to be `height` high.
        height: metres, above 0; plays no part where the scale is known.
        outliers: share of the points that may lie beyond the extent on each side, below a half.

    Raises:
        ValueError: an argument out of its range, no point, a point that is not finite, no
            direction, or a cloud without height that has no known scale.
    """
    points = np.asarray(points, np.float64)
    if points.ndim != 2 or points.shape[1:] != (3,) or not len(points):
        raise ValueError(f"frames: points of shape {list(points.shape)} are not [N, 3]")
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
    """The rotation [3, 3] that turns `up` to +z by the shortest way."""
    length = np.linalg.norm(up)
    if not 0 < length < np.inf:
        raise ValueError(f"frames: up {up.tolist()} is no direction")
    x, y, z = up / length
    if z < -1 + 1e-12:  # straight down: every half turn about a level axis is as short
        return np.diag([1.0, -1.0, -1.0])
    # Rodrigues' formula about up x z.
    cross = np.array([[0, 0, -x], [0, 0, -y], [x, y, 0]])
    return np.eye(3) + cross + cross @ cross / (1 + z)
