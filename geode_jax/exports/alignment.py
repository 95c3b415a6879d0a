"""Aligns a reconstruction of unknown scale (VGGT's) to a metric one of the same views.

The similarity is fitted to the cameras, their centres and their orientations, or, where there are
too few cameras or all stand in one place, its scale is taken from the depths. Up to nearly half of
the cameras and of the depths may be wrong.

This file stands alone (numpy; Python 3.9), as `exports` does. All arithmetic is in float64.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .frames import Similarity

LEAST_VIEWS = 3
"""Fewest cameras that a scale is taken from: of two, neither can be seen to be wrong."""
LEAST_SPREAD = 0.2
"""Least RMS distance of the cameras from their centre, metres, that a scale is taken from. Centres
are a few centimetres wrong, which over a smaller spread is a wrong scale."""
USUAL_DISTANCE = 2.5
"""Metres to what a camera indoors sees, where no depth is known."""
MOST_PAIRS = 2000
"""Pairs of cameras that a first similarity is looked for among."""
OUTLIER = 3 * 1.4826
"""Errors above so many medians are outliers: three standard deviations of a normal distribution."""
EXACT = (0.01, 0.5)
"""Errors of a camera, metres and degrees, that are never called outliers."""


class AlignmentError(ValueError):
    """Nothing determines the similarity; the message is one line."""


class Alignment(NamedTuple):
    """A similarity from the estimated to the metric world, and what remains between the two.

    Attributes:
        similarity: the map.
        method: "cameras", or "depth" if the scale is that of the depths.
        fitted: bool [V], views that the similarity was fitted to; the others are outliers.
        centres_m: [V] distances of the camera centres, metres.
        rotations_deg: [V] angles between the cameras, degrees.
        depth_relative: [V] medians of |depth - metric depth| / metric depth; NaN where unknown.
        distance: metres, the median depth.
    """

    similarity: Similarity
    method: str
    fitted: np.ndarray
    centres_m: np.ndarray
    rotations_deg: np.ndarray
    depth_relative: np.ndarray
    distance: float

    @property
    def displacements(self) -> np.ndarray:
        """Metres [V] by which each view's errors displace what it sees at the median depth.

        The largest of the distance of the centres, the arc of the angle and the error of the depth.
        """
        arc = np.radians(self.rotations_deg) * self.distance
        depth = np.nan_to_num(self.depth_relative) * self.distance
        return np.maximum(np.maximum(self.centres_m, arc), depth)

    def residuals(self) -> dict[str, float]:
        """Returns the medians over all views: centres, rotations, depths, displacements."""
        depth = self.depth_relative[np.isfinite(self.depth_relative)]
        found = {
            "residual_m": float(np.median(self.displacements)),
            "centres_m": float(np.median(self.centres_m)),
            "rotations_deg": float(np.median(self.rotations_deg)),
        }
        return {**found, "depth_relative": float(np.median(depth))} if len(depth) else found


def align(
    estimated: np.ndarray,
    metric: np.ndarray,
    *,
    depth: np.ndarray | None = None,
    confidence: np.ndarray | None = None,
    metric_depth: np.ndarray | None = None,
) -> Alignment:
    """Returns the similarity that takes a reconstruction to the metric world of the same views.

    The cameras are used if at least `LEAST_VIEWS` agree and stand `LEAST_SPREAD` apart. Else the
    scale is the median of metric over estimated depths, weighted by confidence, and the rest is
    that of the cameras: of one view its pose, so that both reconstructions have one first camera.

    Args:
        estimated, metric: camera-from-world [V, 3, 4] of the two reconstructions.
        depth: [V, h, w] estimated depths, 0 = unknown.
        confidence: [V, h, w] weights of `depth`, not negative; None: all the same.
        metric_depth: [V, h, w] metres at the same pixels, 0 = unknown.

    Raises:
        AlignmentError: there is neither enough of the cameras nor a pair of depths.
    """
    estimated, metric = np.asarray(estimated, np.float64), np.asarray(metric, np.float64)
    if not (np.isfinite(estimated).all() and np.isfinite(metric).all()):
        raise AlignmentError("a camera is not finite")
    moving, fixed = _centres(estimated), _centres(metric)
    turns = np.swapaxes(metric[:, :, :3], 1, 2) @ estimated[:, :, :3]
    ratios = None if depth is None or metric_depth is None else _ratios(depth, metric_depth)
    by_depth = None
    if ratios is not None and np.isfinite(ratios).any():
        by_depth = _median(ratios, np.ones_like(ratios) if confidence is None else confidence)
    distance = _distance(depth, metric_depth, by_depth)
    found = _robust(moving, fixed, turns, distance, None)
    method = "cameras"
    if found is None or not _spread_out(fixed[found[1]]):
        if by_depth is None:
            raise AlignmentError(
                f"fewer than {LEAST_VIEWS} cameras that agree and stand {LEAST_SPREAD} m apart, "
                "and no metric depth: nothing gives the scale"
            )
        method, found = "depth", _robust(moving, fixed, turns, distance, by_depth)
    if found is None:
        raise AlignmentError("the cameras do not determine a similarity")
    similarity, fitted = found
    if by_depth is None and depth is not None:
        distance = _distance(depth, None, similarity.scale)
    left = np.full(len(estimated), np.nan)
    if ratios is not None:
        for view, ratio in enumerate(ratios):
            known = ratio[np.isfinite(ratio)]
            left[view] = np.median(np.abs(similarity.scale / known - 1)) if len(known) else np.nan
    return Alignment(
        similarity,
        method,
        fitted,
        np.linalg.norm(similarity.points(moving) - fixed, axis=-1),
        _degrees(turns, similarity.rotation[None])[:, 0],
        left,
        distance,
    )


def fit_similarity(
    moving: np.ndarray,
    fixed: np.ndarray,
    weight: np.ndarray,
    *,
    turns: np.ndarray | None = None,
    arm: float = 0.0,
    scale: float | None = None,
) -> Similarity:
    """Returns the similarity of least squares (Umeyama 1991), optionally of orientations too.

    It minimises the weighted sum of |fixed - s Q moving - b|^2 + arm^2 |Q - turn|^2 / 2, whose last
    part is the squared displacement by the angle between Q and a turn at the distance `arm`.

    Args:
        moving, fixed: [N, 3], the same points in two frames.
        weight: [N], not negative, with a sum above 0.
        turns: [N, 3, 3], rotations that should equal the similarity's.
        arm: see above, in units of `fixed`.
        scale: the scale if it is known.
    """
    weight = weight / weight.sum()
    centre_m, centre_f = weight @ moving, weight @ fixed
    m, f = moving - centre_m, fixed - centre_f
    extent = weight @ (m**2).sum(-1)
    cross = (f * weight[:, None]).T @ m
    told = np.zeros((3, 3)) if turns is None else np.einsum("n,nij->ij", weight, turns)
    given, scale = scale, 1.0 if scale is None else scale
    # Without turns the rotation does not depend on the scale, and one round is exact.
    for _ in range(1 if turns is None else 20):
        rotation = _rotation(scale * cross + 0.5 * arm**2 * told)
        if given is None and extent > 0:
            scale = float((rotation * cross).sum() / extent)
    return Similarity(rotation, scale, centre_f - scale * rotation @ centre_m)


# --- The parts ------------------------------------------------------------------------------------


def _rotation(matrix: np.ndarray) -> np.ndarray:
    """Returns the rotation that is nearest to a matrix [3, 3]."""
    u, _, vt = np.linalg.svd(matrix)
    return (u * np.array([1.0, 1.0, np.linalg.det(u) * np.linalg.det(vt)])) @ vt


def _centres(extrinsic: np.ndarray) -> np.ndarray:
    return -np.einsum("vji,vj->vi", extrinsic[:, :, :3], extrinsic[:, :, 3])


def _degrees(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Returns the angles [n, m] between rotations [n, 3, 3] and [m, 3, 3]."""
    # From |A - B| = sqrt(8) sin(angle / 2), which is exact for small angles, unlike the trace.
    apart = np.linalg.norm((a[:, None] - b[None]).reshape(len(a), len(b), 9), axis=-1)
    return np.degrees(2 * np.arcsin(np.minimum(apart / np.sqrt(8), 1)))


def _ratios(depth: np.ndarray, metric: np.ndarray) -> np.ndarray:
    """Returns metric over estimated depths, NaN where one is unknown."""
    depth, metric = np.asarray(depth, np.float64), np.asarray(metric, np.float64)
    known = (depth > 0) & (metric > 0) & np.isfinite(depth) & np.isfinite(metric)
    return np.divide(metric, depth, out=np.full(depth.shape, np.nan), where=known)


def _median(values: np.ndarray, weights: np.ndarray) -> float:
    """Returns the weighted median of the values that are not NaN."""
    known = np.isfinite(values)
    values, weights = values[known], np.asarray(weights, np.float64)[known]
    if not weights.sum() > 0:
        weights = np.ones_like(values)
    order = np.argsort(values)
    share = np.cumsum(weights[order])
    return float(values[order][np.searchsorted(share, 0.5 * share[-1])])


def _distance(depth, metric, scale) -> float:
    """Returns the median of the known metric depths, else of the estimated ones times a scale."""
    for values, factor in ((metric, 1.0), (depth, scale)):
        if values is not None and factor is not None:
            known = np.asarray(values, np.float64)
            known = known[known > 0]
            if len(known):
                return float(np.median(known)) * factor
    return USUAL_DISTANCE


def _spread_out(centres: np.ndarray) -> bool:
    if len(centres) < LEAST_VIEWS:
        return False
    off = centres - centres.mean(0)
    return bool(np.sqrt((off**2).sum(-1).mean()) >= LEAST_SPREAD)


def _robust(
    moving: np.ndarray, fixed: np.ndarray, turns: np.ndarray, arm: float, scale: float | None
) -> tuple[Similarity, np.ndarray] | None:
    """Returns a similarity of the cameras that agree, and which they are; None if there is none.

    The first one has the rotation that most orientations agree with, and of all pairs of cameras
    (of all cameras, if the scale is given) the one with the least median error (Rousseeuw 1984).
    """
    apart = np.median(_degrees(turns, turns), axis=1)
    anchor = int(np.argmin(apart))
    near = _degrees(turns, turns[anchor][None])[:, 0]
    agree = near <= max(OUTLIER * np.median(near), EXACT[1])
    rotation = _rotation(turns[agree].sum(0))
    turned = moving @ rotation.T
    scales, shifts = _hypotheses(turned, fixed, scale)
    if not len(scales):
        return None
    errors = np.linalg.norm(
        scales[:, None, None] * turned[None] + shifts[:, None] - fixed[None], axis=-1
    )
    best = int(np.argmin(np.median(errors, axis=1)))
    similarity = Similarity(rotation, float(scales[best]), shifts[best])
    fitted = np.zeros(len(moving), bool)
    for _ in range(10):
        error = np.linalg.norm(similarity.points(moving) - fixed, axis=-1)
        angle = _degrees(turns, similarity.rotation[None])[:, 0]
        agree = (error <= max(OUTLIER * np.median(error), EXACT[0])) & (
            angle <= max(OUTLIER * np.median(angle), EXACT[1])
        )
        if not agree.any() or (agree == fitted).all():
            break
        fitted = agree
        weight = fitted.astype(np.float64)
        similarity = fit_similarity(moving, fixed, weight, turns=turns, arm=arm, scale=scale)
    return (similarity, fitted) if fitted.any() and similarity.scale > 0 else None


def _hypotheses(
    turned: np.ndarray, fixed: np.ndarray, scale: float | None
) -> tuple[np.ndarray, np.ndarray]:
    """Returns scales [k] and translations [k, 3] of pairs of cameras, or of single ones."""
    if scale is not None:
        return np.full(len(fixed), scale), fixed - scale * turned
    first, second = np.triu_indices(len(fixed), 1)
    chosen = slice(None, None, max(1, -(-len(first) // MOST_PAIRS)))
    first, second = first[chosen], second[chosen]
    across = turned[first] - turned[second]
    length = (across**2).sum(-1)
    along = (across * (fixed[first] - fixed[second])).sum(-1)
    useful = (length > 1e-12 * max(float(length.max(initial=0)), 1e-300)) & (along > 0)
    first, second = first[useful], second[useful]
    scales = along[useful] / length[useful]
    middle = (turned[first] + turned[second]) / 2
    return scales, (fixed[first] + fixed[second]) / 2 - scales[:, None] * middle
