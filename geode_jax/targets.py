"""Domains of all targets, defined once.

Losses take logarithms and squares of these quantities in float32. A target outside its domain is
left out and counted in `Pipeline.dropped`. It is never clipped, because a clipped target is wrong,
and a target that is not finite would spoil the whole batch.
"""

import math
from collections import Counter
from collections.abc import Mapping

import numpy as np

from geode_jax.exports.contract import LARGEST_FEATURE, LARGEST_PLACE

LOG_VALUES = (math.log(0.01), 11.0)
"""Logarithms of the numbers of questions, in base units (`units.BASE_UNIT`): 0.01 to 59,874."""

MOST_VALUES = {"length": 100.0, "area": 5000.0, "count": 1000.0}
"""Dimension -> the largest number of a question, in its base unit (metres, square metres, items),
that a room can have; a larger number was read or written in a wrong unit."""

LOG_EDGES = (math.log(1e-4), 4.0)
"""Logarithms of the edges of boxes in metres: 0.1 mm to 54.6 m."""

MOST_PLACE = LARGEST_PLACE
"""Largest coordinate of boxes and points, metres: larger ones are not in the frame of a room."""

MOST_YAW = 100.0
"""Largest yaw, radians: float32 cannot resolve larger angles."""

DEPTHS = (1e-3, 1000.0)
"""Least and largest known depth, metres (or the export's scene units)."""

MOST_FEATURE = LARGEST_FEATURE
"""Largest feature of a teacher; the loss is a squared distance."""


BIN_RANGE = (0.3, 10.0)
"""Centres of the nearest and the farthest depth bin, metres."""


def depth_bin_centres(bins: int) -> np.ndarray:
    """Centres [bins] of the depth bins, metres, float64: evenly spaced in log depth."""
    return np.geomspace(*BIN_RANGE, bins)


def plausible(value: float, dimension: str, base: float) -> bool:
    """Returns whether a room can have this measure.

    Args:
        value: number in the unit.
        dimension: dimension of the unit: "length", "area" or "count".
        base: one of the unit in metres, square metres or items.
    """
    most = MOST_VALUES.get(dimension, math.inf)
    return 0 <= value * base <= most * (1 + 1e-9) and (dimension != "count" or value == int(value))


def held_boxes(boxes_7: np.ndarray) -> np.ndarray:
    """Returns which boxes [..., 7] (centre, size, yaw) can be encoded, [...] bool."""
    boxes = np.asarray(boxes_7, np.float64)
    low, high = np.exp(LOG_EDGES)
    edges = boxes[..., 3:6]
    return np.asarray(
        (np.abs(boxes[..., :3]) <= MOST_PLACE).all(-1)
        & ((edges >= low) & (edges <= high)).all(-1)
        & (np.abs(boxes[..., 6]) <= MOST_YAW)
    )


def held_depth(depth: np.ndarray) -> np.ndarray:
    """Returns which depths are known and can be learned; 0 is unknown."""
    return (depth >= DEPTHS[0]) & (depth <= DEPTHS[1])


def held_places(places_3: np.ndarray) -> np.ndarray:
    """Returns which points [..., 3] lie in a room's frame, [...] bool."""
    return np.asarray((np.abs(places_3) <= MOST_PLACE).all(-1))


def held_features(features: np.ndarray) -> bool:
    """Returns whether all features of a scene can be learned."""
    return not features.size or max(float(features.max()), -float(features.min())) <= MOST_FEATURE


def left_out(tensors: Mapping[str, np.ndarray]) -> Counter:
    """Counts the targets of a scene that are left out, by reason, for `Pipeline.dropped`."""
    found: Counter = Counter()
    for name in ("target/depth", "vggt/depth"):
        if name in tensors:
            depth = tensors[name]
            found[f"pixel of {name} beyond {DEPTHS[0]:g} to {DEPTHS[1]:g}"] = int(
                ((depth > 0) & ~held_depth(depth)).sum()
            )
    if "vggt/points" in tensors:
        bad = ~held_places(tensors["vggt/points"])
        found[f"pixel of vggt/points beyond {MOST_PLACE:g} m"] = int(bad.sum())
    if "target/boxes" in tensors:
        bad = ~held_boxes(tensors["target/boxes"])
        found["box of target/boxes that cannot be encoded"] = int(bad.sum())
    if not held_features(tensors.get("teacher/features", np.zeros(0))):
        found[f"teacher/features of a scene beyond {MOST_FEATURE:g}"] = 1
    return +found
