"""Plausibility checks of a room's pinhole cameras, poses and depth scale.

The commonest silent fault of RGB-D data is an intrinsic for pictures of another size: every number
is in range, and every point is in the wrong place. Three facts reveal it. The principal point of a
camera is near the middle of its picture; the depth and colour cameras of one device have about the
same field of view; and resizing a picture scales its focal lengths and principal point by the same
factor.

Pixel centres are at integers, so the middle of a picture of n pixels is at (n - 1) / 2. This module
stands alone (Python 3.9, numpy), as the whole package does.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

MAX_CENTRE_OFFSET = 0.06
"""Largest distance of the principal point from the middle as a share of the side, besides half a
pixel. Real sensors have at most 0.033 (TUM's first Kinect); resizing by 1.125 without adapting the
intrinsic gives 0.0625."""
MAX_FIELD_RATIO = 1.15
"""Largest ratio of the fields of view (side over focal length) of depth and colour. It is 1.12 for
Kinects that are not registered."""
_MAX_FIELD, _MIN_FIELD = 8.0, 0.1
"""Largest and smallest side over focal length: 152 and 5.7 degrees."""
_MAX_STRETCH = 2.0
"""Largest ratio of the two focal lengths; a 16 : 9 picture resized to a square has 1.78."""

_MAX_BLACK = 0.2
"""Share of exactly black pixels above which a scene is reported."""
_MAX_OUTSIDE = 0.02
"""Share of points far outside the room above which a scene is reported."""
_OUTSIDE_FACTOR = 2.0
"""A point is far outside if its distance from the median point is more than this many times the
distance within which 90 % of the points lie."""
_MAX_POINTS = 100_000
"""Points of a scene that are examined."""

_MAX_FLOATING = 0.1
"""Share of points in front of the surface that another view measured, above which an export is
reported. Correct exports have 0.03 (rooms) to 0.04 (recordings), inverted poses 0.12 to 0.3."""
_MAX_DISAGREEMENT, _BETTER = 0.03, 0.6
"""An export is also reported if more than `_MAX_DISAGREEMENT` of the points differ, and another
interpretation of poses or depth has less than `_BETTER` times that share."""
_DEPTH_TOLERANCE = 0.2
"""Relative difference of depth above which two views disagree about a point."""
_MAX_VIEWS, _POINTS_PER_VIEW = 8, 512
"""Views of a scene that are compared, and points of each."""
_MIN_OVERLAP = 0.2
"""Share of a view's points that must fall into another view for the two to be compared."""
_MIN_COMPARED = 300
"""Points of an export that must have been compared before a disagreement is reported."""
_MAX_EXTENT, _MIN_EXTENT = 30.0, 0.5
"""Metres over which the middle 96 % of a room's points may, and must, extend."""
_INVERTED, _OPENGL = "inverted poses", "camera axes as OpenGL's (y up, z back)"
_INTERPRETATIONS = {
    "": 1.0,
    _INVERTED: 1.0,
    _OPENGL: 1.0,
    **{f"depth times {factor:g}": factor for factor in (0.2, 0.5, 2.0, 5.0)},
}
"""How the stored arrays may be interpreted: {name: factor of depth}."""


def off_centre(intrinsic: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Returns the distances of principal points from the middle, as shares of the sides [..., 2].

    Args:
        intrinsic: [..., 3, 3].
        size: (width, height) of the picture that the intrinsic is for.
    """
    sides = np.array(size, np.float64)
    return np.abs(np.asarray(intrinsic, np.float64)[..., :2, 2] + 0.5 - sides / 2) / sides


def fault(intrinsic: np.ndarray, size: tuple[int, int]) -> str | None:
    """Returns why an intrinsic is implausible for a picture, None if it is plausible.

    Args:
        intrinsic: [3, 3]; the signs of the focal lengths are ignored.
        size: (width, height) of the picture.
    """
    fx, fy, cx, cy = (abs(intrinsic[0, 0]), abs(intrinsic[1, 1]), *intrinsic[:2, 2])
    numbers = f"focal lengths {fx:g}, {fy:g} and centre {cx:g}, {cy:g}"
    if not np.isfinite([fx, fy, cx, cy]).all() or min(fx, fy) <= 0:
        return f"{numbers} are no camera"
    picture = f"pictures of {size[0]} x {size[1]} pixels"
    if (off_centre(intrinsic, size) > MAX_CENTRE_OFFSET + 0.5 / np.array(size)).any():
        shares = ", ".join(f"{(c + 0.5) / n:.2f}" for c, n in zip((cx, cy), size))
        return (
            f"the centre {cx:g}, {cy:g} is at {shares} of the sides of {picture}, not within "
            f"{MAX_CENTRE_OFFSET} of the middle: is the intrinsic for another size?"
        )
    width, height = size[0] / fx, size[1] / fy
    if not (min(width, height) >= _MIN_FIELD and max(width, height) <= _MAX_FIELD):
        angle = 2 * np.degrees(np.arctan(width / 2))
        return f"{numbers}: no camera sees {angle:.3g} degrees wide in {picture}"
    if not 1 / _MAX_STRETCH <= fx / fy <= _MAX_STRETCH:
        return f"{numbers}: no camera has pixels {fx / fy:.2g} times as high as wide"
    return None


def scene_warnings(arrays: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Returns the signs of wrong cameras in one scene: {warning: the number that it ends with}.

    Args:
        arrays: tensors of the contract by name; the checks of absent ones are skipped.
    """
    found = {}
    depth = arrays.get("vggt/depth", arrays.get("target/depth"))
    if "camera/intrinsic" in arrays and depth is not None:
        off = off_centre(arrays["camera/intrinsic"], depth.shape[:0:-1])
        slack = 0.5 / np.array(depth.shape[:0:-1])
        if (off > MAX_CENTRE_OFFSET + slack).any():
            warning = "the principal point is off the middle of the picture (is the intrinsic for "
            found[warning + "another size?) by this share of the side:"] = off
    poses = arrays.get("camera/extrinsic", ())
    if len(poses) > 1 and np.allclose(poses, poses[:1], atol=1e-6):
        found["all views have the same pose (is it known?), views:"] = len(poses)
    if "images" in arrays:
        black = (arrays["images"].max(-1) == 0).mean()
        if black > _MAX_BLACK:
            found["pictures are black where colour saw nothing, share of pixels:"] = black
    points = _known_points(arrays.get("vggt/points"), depth)
    if points is not None and len(points):
        points = points[:: max(1, len(points) // _MAX_POINTS)].astype(np.float64)
        away = np.linalg.norm(points - np.median(points, axis=0), axis=-1)
        outside = (away > _OUTSIDE_FACTOR * np.quantile(away, 0.9)).mean()
        if outside > _MAX_OUTSIDE:
            warning = "points are more than twice as far away as 90 % of them, share of points:"
            found[warning] = outside
    return {warning: float(np.max(share)) for warning, share in found.items()}


class CameraCheck:
    """Collects the signs of wrong cameras, poses and depth scales over the scenes of an export.

    Use:
        check = CameraCheck(metric=True)
        for arrays in scenes:
            check.add(arrays)
        print(*check.lines(), sep="\\n")
    """

    def __init__(self, metric: bool) -> None:
        """Args: metric: whether lengths are metres."""
        self._metric = metric
        self._scenes = 0
        self._found: dict[str, list[float]] = {}
        self._counts = np.zeros((len(_INTERPRETATIONS), 3), np.int64)

    def add(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Examines a scene, given its tensors by name; the checks of absent ones are skipped."""
        self._scenes += 1
        for warning, share in scene_warnings(arrays).items():
            self._found.setdefault(warning, []).append(share)
        depth = arrays.get("vggt/depth", arrays.get("target/depth"))
        if depth is None or "camera/intrinsic" not in arrays or "camera/extrinsic" not in arrays:
            return
        views = [
            np.asarray(array[:_MAX_VIEWS], np.float64)
            for array in (depth, arrays["camera/intrinsic"], arrays["camera/extrinsic"])
        ]
        for row, (name, factor) in enumerate(_INTERPRETATIONS.items()):
            extrinsic = views[2]
            if name == _OPENGL:
                extrinsic = np.array([[1.0], [-1.0], [-1.0]]) * extrinsic
            self._counts[row] += _compare_views(
                views[0] * factor, views[1], extrinsic, inverted=name == _INVERTED
            )
        points = [_world(*view) for view in zip(*views)]
        points = np.concatenate([p for p in points if len(p)] or [np.zeros((0, 3))])
        if self._metric and len(points):
            low, high = np.quantile(points, (0.02, 0.98), axis=0)
            extent = float((high - low).max())
            if not _MIN_EXTENT <= extent <= _MAX_EXTENT:
                limit = f"less than {_MIN_EXTENT:g}"
                if extent > _MAX_EXTENT:
                    limit = f"more than {_MAX_EXTENT:g}"
                warning = f"the room extends over {limit} m (is the depth scale right?), metres:"
                self._found.setdefault(warning, []).append(extent)

    def lines(self) -> list[str]:
        """Returns the warnings, one line each; scenes with the same warning share a line."""
        found = [
            f"in {len(sizes)} of {self._scenes} scenes {warning} up to {max(sizes):.2f}"
            for warning, sizes in sorted(self._found.items())
        ]
        line = self._disagreement()
        return found if line is None else [*found, line]

    def _disagreement(self) -> str | None:
        if self._counts[0, 2] < _MIN_COMPARED:
            return None
        shares = {
            name: ((before + behind) / count, before / count)
            for name, (before, behind, count) in zip(_INTERPRETATIONS, self._counts.tolist())
            if count >= _MIN_COMPARED
        }
        apart, floating = shares[""]
        best = min(shares, key=lambda name: shares[name])
        better = apart > _MAX_DISAGREEMENT and shares[best][0] < _BETTER * apart
        if not better and floating <= _MAX_FLOATING:
            return None
        question = "are the poses camera-to-world, is the depth scale right?"
        if better:
            question = {
                _INVERTED: "are they camera-to-world?",
                _OPENGL: "are the axes of the cameras x right, y down, z ahead?",
            }.get(best, "is the depth scale right?")
            question = f"with {best} only {shares[best][0]:.0%} differ: {question}"
        return (
            f"views disagree about where surfaces are: {apart:.0%} of the points that two views "
            f"show differ by more than {_DEPTH_TOLERANCE:.0%} in depth, {floating:.0%} are in "
            f"front of the surface that the other view measured; {question}"
        )


def _compare_views(
    depth: np.ndarray, intrinsic: np.ndarray, extrinsic: np.ndarray, *, inverted: bool = False
) -> np.ndarray:
    """Counts the points of each view that contradict the depth of an overlapping view.

    A point of one view, projected into another, must have the depth that is stored there, or be
    hidden behind that surface. A point in front of the surface is wrong, or at an edge.

    Args:
        depth: [views, h, w], 0 = unknown.
        intrinsic: [views, 3, 3] at that size.
        extrinsic: [views, 3, 4], camera from world.
        inverted: the extrinsics are world from camera instead.

    Returns:
        [3]: points in front of the other view's surface, points behind it, all points.
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
            moved = world @ extrinsic[j, :, :3].T + extrinsic[j, :, 3]
            moved = moved[moved[:, 2] > 1e-6]
            pixels = moved @ intrinsic[j].T
            across, down = np.round(pixels[:, :2] / pixels[:, 2:]).T
            inside = (across >= 0) & (across < width) & (down >= 0) & (down < height)
            there = depth[j][down[inside].astype(int), across[inside].astype(int)]
            here = moved[inside, 2][there > 0]
            there = there[there > 0]
            if len(here) < _MIN_OVERLAP * len(world):
                continue
            before = (here < (1 - _DEPTH_TOLERANCE) * there).sum()
            behind = (here > (1 + _DEPTH_TOLERANCE) * there).sum()
            counts += (before, behind, len(here))
    return counts


def _world(depth: np.ndarray, intrinsic: np.ndarray, extrinsic: np.ndarray) -> np.ndarray:
    """Returns points [n, 3] of a view, evenly chosen among those whose depth is known."""
    rows, columns = np.nonzero(depth > 0)
    chosen = slice(None, None, max(1, len(rows) // _POINTS_PER_VIEW))
    rows, columns = rows[chosen], columns[chosen]
    far = depth[rows, columns]
    x = (columns - intrinsic[0, 2]) / intrinsic[0, 0] * far
    y = (rows - intrinsic[1, 2]) / intrinsic[1, 1] * far
    return (np.stack([x, y, far], axis=-1) - extrinsic[:, 3]) @ extrinsic[:, :3]


def _known_points(points: np.ndarray | None, depth: np.ndarray | None) -> np.ndarray | None:
    """Returns the points [n, 3] with a known depth; without depth, those other than the origin."""
    if points is None:
        return None
    if depth is not None and depth.shape == points.shape[:-1]:
        known = depth > 0
    else:
        known = (points != 0).any(-1)
    return points[known]
