"""What a pinhole camera of a room can be, and what of an export shows that its cameras are wrong.

Intrinsics that belong to pictures of another size are the commonest silent fault of RGB-D data:
nothing is out of range, and every point is in the wrong place. Three facts give them away. The
principal point of a camera is near the middle of its picture; depth and colour, taken from one
place, see about as wide; and a resized picture moves both by the same factor.

Pixel centres are at integers, so the middle of a picture of n pixels is at (n - 1) / 2. This module
stands alone (Python 3.9, numpy), as the whole package does.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

CENTRE = 0.06
"""How far the principal point may be from the middle, as a share of the side, and half a pixel.
Sensors measured 0.033 at most (TUM's first Kinect); pictures scaled by 1.125 have 0.0625."""
FIELD = 1.15
"""How many times as wide one of two cameras may see as the other. Kinects that are not registered
have 1.12."""
WIDEST, NARROWEST = 8.0, 0.1
"""Side over focal length: 152 and 5.7 degrees."""
STRETCH = 2.0
"""How many times as long as high a pixel may be, or the other way: 16 : 9 in a square has 1.78."""

BLACK = 0.2
"""Share of pictures that is exactly black, from which it is said."""
OUTSIDE = 0.02
"""Share of points outside the bulk, from which it is said."""
_BULK = 2.0
"""The bulk of a room reaches so many times as far from its middle as 90 % of its points do."""
_MOST_POINTS = 100_000
"""Points of a scene that are looked at."""


def off_centre(intrinsic: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """How far principal points are from the middle, as a share of the sides [..., 2].

    Args:
        intrinsic: [..., 3, 3].
        size: (width, height) of the picture that it is for.
    """
    sides = np.array(size, np.float64)
    return np.abs(np.asarray(intrinsic, np.float64)[..., :2, 2] + 0.5 - sides / 2) / sides


def fault(intrinsic: np.ndarray, size: tuple[int, int]) -> str | None:
    """Why no camera of a picture has this intrinsic; None where one may have it.

    Args:
        intrinsic: [3, 3]; the focal lengths' signs play no part.
        size: (width, height).
    """
    fx, fy, cx, cy = (abs(intrinsic[0, 0]), abs(intrinsic[1, 1]), *intrinsic[:2, 2])
    said = f"focal lengths {fx:g}, {fy:g} and centre {cx:g}, {cy:g}"
    if not np.isfinite([fx, fy, cx, cy]).all() or min(fx, fy) <= 0:
        return f"{said} are no camera"
    picture = f"pictures of {size[0]} x {size[1]} pixels"
    if (off_centre(intrinsic, size) > CENTRE + 0.5 / np.array(size)).any():
        shares = ", ".join(f"{(c + 0.5) / n:.2f}" for c, n in zip((cx, cy), size))
        return (
            f"the centre {cx:g}, {cy:g} is at {shares} of the sides of {picture}, not within "
            f"{CENTRE} of the middle: is the intrinsic for another size?"
        )
    width, height = size[0] / fx, size[1] / fy
    if not (min(width, height) >= NARROWEST and max(width, height) <= WIDEST):
        return f"{said} see 2 atan({width / 2:.3g}) wide: no camera's for {picture}"
    if not 1 / STRETCH <= fx / fy <= STRETCH:
        return f"{said}: pixels {fx / fy:.2g} times as high as wide are no camera's"
    return None


def shown_faults(arrays: Mapping[str, np.ndarray]) -> dict[str, float]:
    """What of a scene shows that its cameras may be wrong: reason -> how large, 0 to 1.

    Args:
        arrays: tensors of the contract by name; what is absent is not looked at.
    """
    found = {}
    depth = arrays.get("vggt/depth", arrays.get("target/depth"))
    if "camera/intrinsic" in arrays and depth is not None:
        off = off_centre(arrays["camera/intrinsic"], depth.shape[:0:-1])
        slack = 0.5 / np.array(depth.shape[:0:-1])
        if (off > CENTRE + slack).any():
            reason = "the principal point is off the middle of the picture (is the intrinsic for "
            found[reason + "another size?), as a share of the side,"] = off
    if "images" in arrays:
        black = (arrays["images"].max(-1) == 0).mean()
        if black > BLACK:
            found["pictures are black where colour saw nothing, a share of"] = black
    points = _known_points(arrays.get("vggt/points"), depth)
    if points is not None and len(points):
        points = points[:: max(1, len(points) // _MOST_POINTS)].astype(np.float64)
        away = np.linalg.norm(points - np.median(points, axis=0), axis=-1)
        outside = (away > _BULK * np.quantile(away, 0.9)).mean()
        if outside > OUTSIDE:
            found["points lie far outside the room, twice as far as 90 % of them, a share of"] = (
                outside
            )
    return {reason: float(np.max(size)) for reason, size in found.items()}


def _known_points(points: np.ndarray | None, depth: np.ndarray | None) -> np.ndarray | None:
    """Points [n, 3] where there is a depth, or that are not the origin."""
    if points is None:
        return None
    same = depth is not None and depth.shape == points.shape[:-1]
    known = depth > 0 if same else (points != 0).any(-1)
    return points[known]
