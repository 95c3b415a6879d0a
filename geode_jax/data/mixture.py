"""Sampling of training questions: weights of data sets, and a stratified subset.

The weight of a question is the weight of its kind times the weight of its source
(`data.kind_weights`, `data.mixture`) and decides which questions of a scene are drawn. That has no
effect on a source whose scenes have no other questions, so scenes are weighted too: a scene has the
largest weight of its questions' sources, and an epoch visits a scene of half the largest weight
half as often.
"""

import zlib
from collections.abc import Sequence

import numpy as np

from geode_jax.errors import UserError

OWN = "own"
"""Source of the questions that name none: the export itself."""


def parse_mixture(text: str) -> dict[str, float]:
    """Parses "scanqa=2,own=0.5" to {"scanqa": 2.0, "own": 0.5}; other sources have weight 1.

    Raises:
        UserError: the text has another form, or a weight is negative or not finite.
    """
    weights: dict[str, float] = {}
    for part in filter(None, text.split(",")):
        name, equals, number = part.rpartition("=")
        try:
            weight = float(number)
        except ValueError:
            weight = -1.0
        if not equals or not name or name in weights or not 0 <= weight < float("inf"):
            raise UserError(f"config: data.mixture: {part!r} is not SOURCE=WEIGHT, weight >= 0")
        weights[name] = weight
    return weights


def stratified_part(
    strata: Sequence[np.ndarray], keep: np.ndarray, fraction: float, seed: int
) -> np.ndarray:
    """Draws the same share of the kept rows of every stratum, at least one row of each.

    The rows of a smaller fraction are a subset of the rows of a larger one.

    Args:
        strata: arrays of labels [n]; a stratum is a combination of labels.
        keep: [n] bool, the rows to draw from.
        fraction: share in (0, 1].
        seed: seed of the draw.

    Returns:
        [n] bool, the drawn rows.
    """
    names = ["\n".join(map(str, labels)) for labels in zip(*strata, strict=True)]
    distinct, stratum = np.unique(names, return_inverse=True)
    part = np.zeros(len(keep), bool)
    for i, name in enumerate(distinct):
        rows = np.flatnonzero(keep & (stratum == i))
        random = np.random.default_rng((seed, zlib.crc32(str(name).encode())))
        wanted = max(1, round(fraction * len(rows)))
        part[random.permutation(rows)[:wanted]] = True
    return part


def choose_scenes(weights: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Draws the scenes of an epoch without repetition, always the same number of them.

    This is systematic sampling.

    Args:
        weights: [n], positive, the largest is 1.
        random: generator of this epoch.

    Returns:
        floor(sum of the weights) indices; scene i is drawn with a probability proportional to
        `weights[i]`.
    """
    order = random.permutation(len(weights))
    edges = np.cumsum(weights[order])
    count = scenes_per_epoch(weights)
    at = (random.random() + np.arange(count)) * (edges[-1] / count)
    return order[np.minimum(np.searchsorted(edges, at, side="right"), len(order) - 1)]


def scenes_per_epoch(weights: np.ndarray) -> int:
    """Returns the number of scenes that `choose_scenes` draws."""
    return int(weights.sum() + 1e-9)
