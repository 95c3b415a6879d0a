"""Which questions training draws from: weights of data sets, and a stratified part of all.

A question's weight is that of its kind times that of its source (`data.kind_weights`,
`data.mixture`); a scene asks its questions in an order drawn by their weights. Sources that have
scenes of their own would not notice: so a scene has the largest weight of its questions' sources,
and an epoch visits a scene of half the largest weight half as often.
"""

import zlib
from collections.abc import Sequence

import numpy as np

from geode_jax.errors import UserError

OWN = "own"
"""Stands for the questions that name no source: the export's own."""


def parse_mixture(text: str) -> dict[str, float]:
    """ "scanqa=2,own=0.5" -> {"scanqa": 2.0, "own": 0.5}; what is not named weighs 1.

    Raises:
        UserError: it is not of this form, or a weight is negative or not finite.
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
    """A part of the kept rows that has the same share of every stratum, at least one row of each.

    The part of a smaller fraction lies inside that of a larger one.

    Args:
        strata: labels [n] each; a stratum is a combination of them.
        keep: [n] bool, which rows there are.
        fraction: in (0, 1].
        seed: of the draw.

    Returns:
        [n] bool.
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
    """The scenes of an epoch, none twice: systematic sampling, so their number never varies.

    Args:
        weights: [n], positive, the largest is 1.
        random: of this epoch.

    Returns:
        floor(sum of the weights) indices; scene i is there with a probability proportional to
        `weights[i]`.
    """
    order = random.permutation(len(weights))
    edges = np.cumsum(weights[order])
    count = scenes_per_epoch(weights)
    at = (random.random() + np.arange(count)) * (edges[-1] / count)
    return order[np.minimum(np.searchsorted(edges, at, side="right"), len(order) - 1)]


def scenes_per_epoch(weights: np.ndarray) -> int:
    """How many scenes `choose_scenes` chooses."""
    return int(weights.sum() + 1e-9)
