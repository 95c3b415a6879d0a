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

FLOATING = 0.1
"""Share of points before what another view sees, from which it is said. Rooms have 0.03, recordings
0.04 at most; with inverted poses 0.12 to 0.3."""
DISAGREE, BETTER = 0.03, 0.6
"""It is also said where more than the one share disagrees, and another reading of poses or of depth
has less than the other share of that."""
_SAME_DEPTH = 0.2
"""By what share two views may differ about the depth of a point."""
_MOST_VIEWS, _POINTS_OF_VIEW, _SHARED, _ENOUGH = 8, 512, 0.2, 300
"""Views of a scene that are compared, points of each, the share of these that two views that
overlap have in common, and how many of an export are enough to say something."""
LARGEST, SMALLEST = 30.0, 0.5
"""Metres that the middle 96 % of a room's points may, and must, reach over."""
_INVERTED, _OPENGL = "inverted poses", "camera axes as OpenGL's (y up, z back)"
_READINGS = {
    "": 1.0,
    _INVERTED: 1.0,
    _OPENGL: 1.0,
    **{f"depth times {factor:g}": factor for factor in (0.2, 0.5, 2.0, 5.0)},
}
"""What an export may be instead -> the factor of its depth."""


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
    """What of a scene shows that its cameras may be wrong: reason -> how large, or how many.

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
    poses = arrays.get("camera/extrinsic", ())
    if len(poses) > 1 and np.allclose(poses, poses[:1], atol=1e-6):
        found["all views have the same pose (is it known?), views:"] = len(poses)
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


class Watch:
    """What the scenes of an export show together: of wrong cameras, poses and depth scales.

    Use:
        watch = Watch(metric=True)
        for arrays in scenes:
            watch.add(arrays)
        print(*watch.lines(), sep="\\n")
    """

    def __init__(self, metric: bool) -> None:
        """Args: metric: whether lengths are metres."""
        self._metric = metric
        self._scenes = 0
        self._shown: dict[str, list[float]] = {}
        self._views = np.zeros((len(_READINGS), 3), np.int64)

    def add(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Takes note of a scene, of its tensors by name; absent ones are not looked at."""
        self._scenes += 1
        for reason, size in shown_faults(arrays).items():
            self._shown.setdefault(reason, []).append(size)
        depth = arrays.get("vggt/depth", arrays.get("target/depth"))
        if depth is None or "camera/intrinsic" not in arrays or "camera/extrinsic" not in arrays:
            return
        seen = [
            np.asarray(array[:_MOST_VIEWS], np.float64)
            for array in (depth, arrays["camera/intrinsic"], arrays["camera/extrinsic"])
        ]
        for row, (reading, factor) in enumerate(_READINGS.items()):
            extrinsic = seen[2]
            if reading == _OPENGL:
                extrinsic = np.array([[1.0], [-1.0], [-1.0]]) * extrinsic
            self._views[row] += compared(
                seen[0] * factor, seen[1], extrinsic, inverted=reading == _INVERTED
            )
        points = [_world(*view) for view in zip(*seen)]
        points = np.concatenate([p for p in points if len(p)] or [np.zeros((0, 3))])
        if self._metric and len(points):
            low, high = np.quantile(points, (0.02, 0.98), axis=0)
            reach = float((high - low).max())
            if not SMALLEST <= reach <= LARGEST:
                limit = f"more than {LARGEST:g}" if reach > LARGEST else f"less than {SMALLEST:g}"
                reason = f"the room reaches over {limit} m (the depth scale?): metres,"
                self._shown.setdefault(reason, []).append(reach)

    def lines(self) -> list[str]:
        """What is wrong, a line each."""
        found = [
            f"in {len(sizes)} of {self._scenes} scenes {reason} up to {max(sizes):.2f}"
            for reason, sizes in sorted(self._shown.items())
        ]
        line = self._disagreement()
        return found if line is None else [*found, line]

    def _disagreement(self) -> str | None:
        if self._views[0, 2] < _ENOUGH:
            return None
        shares = {
            reading: ((before + behind) / count, before / count)
            for reading, (before, behind, count) in zip(_READINGS, self._views.tolist())
            if count >= _ENOUGH
        }
        apart, floating = shares[""]
        best = min(shares, key=lambda reading: shares[reading])
        better = apart > DISAGREE and shares[best][0] < BETTER * apart
        if not better and floating <= FLOATING:
            return None
        question = "are the poses camera-to-world, is the depth scale right?"
        if better:
            asked = {
                _INVERTED: "are they camera-to-world?",
                _OPENGL: "are the axes of the cameras x right, y down, z ahead?",
            }.get(best, "is the depth scale right?")
            question = f"with {best} only {shares[best][0]:.0%} differ: {asked}"
        return (
            f"views disagree about where surfaces are: {apart:.0%} of the points that two views "
            f"show differ by more than {_SAME_DEPTH:.0%} in depth, {floating:.0%} float before "
            f"what the other sees; {question}"
        )


def compared(
    depth: np.ndarray, intrinsic: np.ndarray, extrinsic: np.ndarray, *, inverted: bool = False
) -> np.ndarray:
    """How views that overlap agree: points of one in the pictures of others, counted.

    A point of one view must be as far away as another measured there, or be hidden behind what that
    sees. What floats before it is wrong, or at an edge.

    Args:
        depth: [views, h, w], 0 = unknown.
        intrinsic: [views, 3, 3] at that size.
        extrinsic: [views, 3, 4], camera from world.
        inverted: the extrinsics are world from camera instead.

    Returns:
        [3]: of the points, those before, those behind, all.
    """
    if inverted:
        rotation = extrinsic[:, :, :3].swapaxes(1, 2)
        extrinsic = np.concatenate([rotation, -rotation @ extrinsic[:, :, 3:]], axis=2)
    height, width = depth.shape[1:]
    counts = np.zeros(3, np.int64)
    for i in range(len(depth)):
        world = _world(depth[i], intrinsic[i], extrinsic[i])
        for j in range(len(depth)):
            if i == j or not len(world):
                continue
            seen = world @ extrinsic[j, :, :3].T + extrinsic[j, :, 3]
            seen = seen[seen[:, 2] > 1e-6]
            pixels = seen @ intrinsic[j].T
            across, down = np.round(pixels[:, :2] / pixels[:, 2:]).T
            inside = (across >= 0) & (across < width) & (down >= 0) & (down < height)
            there = depth[j][down[inside].astype(int), across[inside].astype(int)]
            here = seen[inside, 2][there > 0]
            there = there[there > 0]
            if len(here) < _SHARED * len(world):
                continue
            before = (here < (1 - _SAME_DEPTH) * there).sum()
            behind = (here > (1 + _SAME_DEPTH) * there).sum()
            counts += (before, behind, len(here))
    return counts


def _world(depth: np.ndarray, intrinsic: np.ndarray, extrinsic: np.ndarray) -> np.ndarray:
    """Points [n, 3] of a view, evenly chosen among those whose depth is known."""
    rows, columns = np.nonzero(depth > 0)
    chosen = slice(None, None, max(1, len(rows) // _POINTS_OF_VIEW))
    rows, columns = rows[chosen], columns[chosen]
    far = depth[rows, columns]
    x = (columns - intrinsic[0, 2]) / intrinsic[0, 0] * far
    y = (rows - intrinsic[1, 2]) / intrinsic[1, 1] * far
    return (np.stack([x, y, far], axis=-1) - extrinsic[:, 3]) @ extrinsic[:, :3]


def _known_points(points: np.ndarray | None, depth: np.ndarray | None) -> np.ndarray | None:
    """Points [n, 3] where there is a depth, or that are not the origin."""
    if points is None:
        return None
    if depth is not None and depth.shape == points.shape[:-1]:
        known = depth > 0
    else:
        known = (points != 0).any(-1)
    return points[known]
