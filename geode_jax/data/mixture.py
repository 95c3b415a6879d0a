"""Sampling of training questions: weights of data sets, and a stratified subset.

The weight of a question is the weight of its kind times the weight of its source
(`data.kind_weights`, `data.mixture`) and decides which questions of a scene are drawn. That has no
effect on a source whose scenes have no other questions, so scenes are weighted too: a scene has the
largest weight of its questions' sources, and an epoch visits a scene of half the largest weight
half as often.
"""

import zlib
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from geode_jax.errors import UserError

OWN = "own"
"""Source of the questions that name none: the export itself."""


def parse_mixture(text: str) -> dict[str, float]:
    """Parses "scanqa=2,own=0.5" to {"scanqa": 2.0, "own": 0.5}; other sources have weight 1.

    Raises:
        UserError: the text has another form, or a weight is negative or not finite.
    """
    return _parse("data.mixture", text, lambda x: 0 <= x < float("inf"), "WEIGHT, weight >= 0")


def parse_fraction(value: float | str) -> float | dict[str, float]:
    """Parses "s-mit=0.25,own=0.5" to {"s-mit": 0.25, "own": 0.5}; other sources are whole.

    Args:
        value: the text, or one number for all sources, which is returned.

    Raises:
        UserError: the text has another form, or a number in it is not in (0, 1].
    """
    if not isinstance(value, str):
        return value
    share = "FRACTION, fraction in (0, 1]; one number is for all"
    return _parse("data.fraction", value, lambda x: 0 < x <= 1, share)


def _parse(
    field: str, text: str, holds: Callable[[float], bool], number_rule: str
) -> dict[str, float]:
    """Parses "NAME=NUMBER,NAME=NUMBER"; raises UserError if a part has another form."""
    found: dict[str, float] = {}
    for part in filter(None, text.split(",")):
        name, equals, number = part.rpartition("=")
        try:
            value = float(number)
        except ValueError:
            value = float("nan")
        if not equals or not name or name in found or not holds(value):
            raise UserError(f"config: {field}: {part!r} is not SOURCE={number_rule}")
        found[name] = value
    return found


def check_sources(names: Iterable[str], sources: Sequence[str], where: str) -> None:
    """Refuses a name that is no source of the questions.

    Args:
        names: the names in a configuration.
        sources: those of the export.
        where: beginning of the message, such as `data: source_weights`.

    Raises:
        UserError: a name is not in `sources`.
    """
    for name in names:
        if name not in sources:
            raise UserError(f"{where}: {name}: the questions are of {', '.join(sources)}")


def stratified_part(
    strata: Sequence[np.ndarray], keep: np.ndarray, fraction: float | np.ndarray, seed: int
) -> np.ndarray:
    """Draws the same share of the kept rows of every stratum, at least one row of each.

    The rows of a smaller fraction are a subset of the rows of a larger one.

    Args:
        strata: arrays of labels [n]; a stratum is a combination of labels.
        keep: [n] bool, the rows to draw from.
        fraction: share in (0, 1], or [n] the share of each row's stratum.
        seed: seed of the draw.

    Returns:
        [n] bool, the drawn rows.
    """
    names = ["\n".join(map(str, labels)) for labels in zip(*strata, strict=True)]
    distinct, stratum = np.unique(names, return_inverse=True)
    share = np.broadcast_to(fraction, keep.shape)
    part = np.zeros(len(keep), bool)
    for i, name in enumerate(distinct):
        rows = np.flatnonzero(keep & (stratum == i))
        random = np.random.default_rng((seed, zlib.crc32(str(name).encode())))
        wanted = max(1, round(float(share[rows[0]]) * len(rows))) if len(rows) else 0
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
