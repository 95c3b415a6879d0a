"""Random arrays for the tests of the losses, and losses compiled with their gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from scipy import special

from geode_jax.objectives import losses
from geode_jax.ops import cross_entropy


def draw(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def draw_probs(*shape, seed=0):
    return special.softmax(draw(*shape, seed=seed), axis=-1)


def draw_ids(high, *shape, seed=0):
    return np.random.default_rng([seed, *shape]).integers(0, high, shape).astype(np.int32)


def draw_boxes(*shape, seed=0):
    rng = np.random.default_rng([seed, *shape])
    parts = [rng.normal(size=(*shape, 3)), rng.uniform(0.2, 2.0, (*shape, 3))]
    return np.concatenate([*parts, rng.uniform(-0.75, 0.75, (*shape, 1))], -1).astype(np.float32)


def draw_topk(vocabulary, k, *shape, seed=0, temperature=1.0):
    """Returns a teacher's log-probabilities [..., X], top k ids and their log-probabilities."""
    full = special.log_softmax(2.0 * draw(*shape, vocabulary, seed=seed + 1), axis=-1)
    ids = np.argsort(-full, axis=-1)[..., :k].astype(np.int32)
    return full, ids, np.take_along_axis(full, ids, -1)


def draw_mask(*shape, seed=0):
    mask = np.random.default_rng([seed, *shape]).random(shape) < 0.6
    mask.flat[0], mask.flat[-1] = True, False
    return mask


def distillation(logits_X, ids, logprobs, mask, temperature=1.0):
    """Computes `losses.distillation` from logits, with the identity as head."""
    *between, X = logits_X.shape
    k = ids.shape[-1]
    counted = jnp.broadcast_to(
        jnp.asarray(mask).reshape(np.shape(mask) + (1,) * (len(between) - np.ndim(mask))), between
    )
    own = jnp.where(jnp.isfinite(logprobs), ids, -1).reshape(1, -1, k)
    rows = [x.reshape(1, -1, *x.shape[len(between) :]) for x in map(jnp.asarray, (ids, logprobs))]

    def part(index, scores, counted, ids, logprobs):
        return losses.distillation(
            scores.listed_nk, scores.rest_n, ids, logprobs, counted, temperature
        )[index]

    def summed(index):
        loss = functools.partial(part, index)
        states = jnp.reshape(logits_X, (1, -1, X))
        return cross_entropy.token_loss(
            loss, states, jnp.eye(X), own, counted.reshape(1, -1), *rows, tied=False, rest=0
        )

    return summed(0), summed(1)


def text_cross_entropy(logits_X, labels, mask):
    """Computes `losses.token_cross_entropy` from logits, with the identity as head."""
    identity, counted = jnp.eye(logits_X.shape[-1]), jnp.asarray(mask)
    loss, own = losses.token_cross_entropy, labels[..., None]
    total = cross_entropy.token_loss(loss, logits_X, identity, own, counted, tied=True)
    return total, jnp.sum(counted, dtype=jnp.float32)


@functools.cache  # one compilation for all tests of a loss
def compiled(loss):
    def total(*arrays):
        total, count = loss(*arrays)
        assert total.shape == count.shape == ()
        assert total.dtype == count.dtype == jnp.float32
        return total, count

    return jax.jit(jax.value_and_grad(total, has_aux=True))


def value_and_grad(loss, *arrays):
    (total, count), grad = compiled(loss)(*arrays)
    return float(total), float(count), np.asarray(grad)


def spoil(array, mask, garbage):
    mask = mask.reshape(mask.shape + (1,) * (array.ndim - mask.ndim))
    if np.issubdtype(array.dtype, np.integer):
        garbage = {np.inf: -(2**31)}.get(garbage, 2**31 - 1)
    return np.where(mask, array, np.asarray(garbage, array.dtype))
