"""From the sums of the losses to one number (Hidden-CoT paper, Sec. III-D.4): eq. 2, its ablation.

The pairs (sum, count) of the losses have been added up over all microbatches and devices.
"""

import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from geode_jax.objectives.base import Pair
from geode_jax.shapes import Array

LOG_VARIANCE_BOUNDS = (-7.0, 7.0)
"""Bounds of log sigma^2: weights 1 / (2 sigma^2) from 548 (the paper saw up to 450) to 0.0005."""


def mean(pair: Pair) -> jax.Array:
    """Returns sum / count, 0 for an empty pair; for sums over all microbatches and devices."""
    total, count = pair
    return jnp.where(count > 0, total, 0.0) / jnp.where(count > 0, count, 1.0)


def combine(pairs: Sequence[Pair], weights: Sequence[float] | None = None) -> Pair:
    """Returns several losses as one term of eq. 2: (weighted sum of means, 1), (0, 0) if all empty.

    For the terms of Sec. III-D.2 whose losses count different things, as the classes and boxes of
    detection; for sums over all microbatches and devices, as in `mean`.
    """
    weights = (1.0,) * len(pairs) if weights is None else weights
    total = jnp.zeros((), jnp.float32)
    present = jnp.zeros((), bool)
    for pair, weight in zip(pairs, weights, strict=True):
        total += weight * mean(pair)
        present |= pair[1] > 0
    return total, present.astype(jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def bounded(value: jax.Array, low: float, high: float) -> jax.Array:
    """clip(value, low, high) whose gradient leads back inside the bounds.

    The gradient is 0 only where a descent step would move `value` further out. With a plain clip, a
    parameter that one step carried past a bound would stay there. The rule depends on the sign of
    the whole gradient: do not add up gradients of parts of a loss.
    """
    return jnp.clip(value, low, high)


def _bounded_forward(value, low, high):
    return jnp.clip(value, low, high), value


def _bounded_backward(low, high, value, gradient):
    outward = ((value >= high) & (gradient < 0)) | ((value <= low) & (gradient > 0))
    return (jnp.where(outward, 0.0, gradient),)


bounded.defvjp(_bounded_forward, _bounded_backward)


def uncertainty_total(
    terms: Mapping[str, Pair],
    log_variance: Mapping[str, Array],
    bounds: tuple[float, float] = LOG_VARIANCE_BOUNDS,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Eq. 2: sum of L_i / (2 sigma_i^2) + log sigma_i over the terms that have a target [29].

    With s = log sigma^2 a term is exp(-s) L / 2 + s / 2. A term with count 0 is left out, since
    s / 2 alone would drive s to its bound. s is bounded by `bounded`.

    Args:
        terms: (sum, count) by name, of all microbatches and devices.
        log_variance: the scalar parameter s of each term, without weight decay.
        bounds: (low, high) of s.

    Returns:
        The total and, for the log, each term's weight 1 / (2 sigma^2) without gradient.

    Raises:
        KeyError: a term has no log-variance.
    """
    total = jnp.zeros((), jnp.float32)
    weights = {}
    for name, pair in terms.items():
        s = jnp.asarray(bounded(log_variance[name], *bounds))
        weight = 0.5 * jnp.exp(-s)
        total += jnp.where(pair[1] > 0, weight * mean(pair) + 0.5 * s, 0.0)
        weights[name] = jax.lax.stop_gradient(weight)
    return total, weights


def static_total(
    terms: Mapping[str, Pair], weights: Mapping[str, float]
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns the ablation of eq. 2 with fixed weights, sum of w_i L_i, and the weights.

    Raises:
        KeyError: a term has no weight.
    """
    used = {name: jnp.asarray(weights[name], jnp.float32) for name in terms}
    total = sum((used[name] * mean(pair) for name, pair in terms.items()), jnp.float32(0.0))
    return total, used
