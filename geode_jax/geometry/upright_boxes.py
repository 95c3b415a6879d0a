"""Footprints of upright boxes, and the gaps between boxes.

Boxes are [centre xyz, size xyz, yaw about z], metres and radians. Horizontal points are complex
numbers x + iy. Sizes beside those of `shapes`: i and j boxes of two sets.
"""

import numpy as np
from jaxtyping import Complex, Float

_SQUARE = np.array([1 + 1j, -1 + 1j, -1 - 1j, 1 - 1j]) / 2


def centres(boxes: Float[np.ndarray, "N 7"]) -> Complex[np.ndarray, " N"]:
    """Returns the horizontal centres [N] of boxes [N, 7], complex."""
    return boxes[:, 0] + 1j * boxes[:, 1]


def footprints(boxes: Float[np.ndarray, "N 7"]) -> Complex[np.ndarray, "4 N"]:
    """Returns the corners [4, N] of the footprints of boxes [N, 7], counter-clockwise, complex."""
    corners = _SQUARE.real[:, None] * boxes[:, 3] + 1j * _SQUARE.imag[:, None] * boxes[:, 4]
    return centres(boxes) + np.exp(1j * boxes[:, 6]) * corners


def to_box_plane(
    points: Complex[np.ndarray, "*axes"], boxes: Float[np.ndarray, "N 7"]
) -> Float[np.ndarray, "*axes N 2"]:
    """Returns x, y [..., N, 2] of complex points [...] in the frames of boxes [N, 7]."""
    local = (points[..., None] - centres(boxes)) * np.exp(-1j * boxes[:, 6])
    return local.view(np.float64).reshape(*local.shape, 2)


def footprint_gaps(
    a: Float[np.ndarray, "i 7"], b: Float[np.ndarray, "j 7"]
) -> Float[np.ndarray, "i j"]:
    """Returns the horizontal distance [i, j] between the footprints of boxes a [i, 7] and b [j, 7].

    It is 0 if they overlap. Two disjoint rectangles are closest at a corner of one of them, so the
    distances of each one's corners from the other give the exact result. Overlap is the
    separating-axis test with the four edge directions.
    """
    apart, square = _corner_gaps(a, b)
    apart_too, square_too = _corner_gaps(b, a)
    return np.sqrt(np.minimum(square, square_too.T)) * (apart | apart_too.T)


def _corner_gaps(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns whether an edge direction of b separates a from b, and the smallest squared
    distance of a's corners from b."""
    corners = to_box_plane(footprints(a), b)
    half = b[:, 3:5] / 2
    apart = (corners.min(0) > half) | (corners.max(0) < -half)
    outside = np.maximum(np.abs(corners) - half, 0) ** 2
    return apart[..., 0] | apart[..., 1], (outside[..., 0] + outside[..., 1]).min(0)


def box_gaps(a: Float[np.ndarray, "i 7"], b: Float[np.ndarray, "j 7"]) -> Float[np.ndarray, "i j"]:
    """Returns the closest-point distances [i, j] between boxes a [i, 7] and b [j, 7], metres.

    A box is its footprint times an interval of heights, so the squared distance is the sum of the
    squared horizontal and vertical gaps.
    """
    low_a, high_a = a[:, 2] - a[:, 5] / 2, a[:, 2] + a[:, 5] / 2
    low_b, high_b = b[:, 2] - b[:, 5] / 2, b[:, 2] + b[:, 5] / 2
    above = low_b[None, :] - high_a[:, None]
    below = low_a[:, None] - high_b[None, :]
    vertical = np.maximum(np.maximum(above, below), 0)
    # Boxes are rounded to millimetres: an object that stands on another has a gap of exactly 0.
    vertical = np.where(vertical < 1e-9, 0.0, vertical)
    return np.hypot(footprint_gaps(a, b), vertical)
