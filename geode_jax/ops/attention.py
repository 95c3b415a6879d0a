"""Attention with one mask contract: every query sees keys [0, prefix_end) and [start, end).

Causal, prefix, padding, cross-attention, a KV cache that is not full yet, and many questions of one
scene sharing [V][T] as their prefix are all of this form, so that one contract (and later one tile
plan for the kernels) serves them all:

| use | prefix_end | start | end |
|---|---|---|---|
| causal, row padded on the left by p | 0 | p | i + 1 |
| question of a scene, V in keys [0, n) | n | first column of the question | i + 1 |
| its answer, [V][T] in keys [0, m) | m | first column of the question | i + 1 |
| cross-attention to k valid vision tokens | 0 | 0 | k |
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from geode_jax.shapes import Array


class Intervals(NamedTuple):
    """Visible keys of each query: [0, prefix_end) and [start, end). All int32 [B, L]."""

    prefix_end: Array
    start: Array
    end: Array


def causal(batch: int, length: int, *, start: Array | int = 0, prefix_end: int = 0) -> Intervals:
    """Causal intervals of `length` queries whose own keys begin at column `prefix_end`.

    Args:
        batch: B.
        length: L.
        start: first valid own column of each row, [B] or scalar (left padding before it).
        prefix_end: keys [0, prefix_end) come before the queries' own keys and are seen by all.
    """
    column = jnp.arange(length, dtype=jnp.int32) + prefix_end
    start = jnp.broadcast_to(jnp.asarray(start, jnp.int32), (batch,)) + prefix_end
    shape = (batch, length)
    return Intervals(
        prefix_end=jnp.full(shape, prefix_end, jnp.int32),
        start=jnp.broadcast_to(start[:, None], shape),
        end=jnp.broadcast_to(column + 1, shape),
    )


def visible(intervals: Intervals, keys: int) -> jax.Array:
    """The contract as a dense mask: bool [B, L, keys]."""
    key = jnp.arange(keys, dtype=jnp.int32)
    own = (key >= intervals.start[..., None]) & (key < intervals.end[..., None])
    return own | (key < intervals.prefix_end[..., None])


def attention(q_BLHE: Array, k_BMGE: Array, v_BMGE: Array, intervals: Intervals) -> jax.Array:
    """Scaled dot-product attention under the interval contract.

    Args:
        q_BLHE: queries, H heads of width E.
        k_BMGE: keys; G divides H (grouped-query attention: head h reads key head h * G // H).
        v_BMGE: values.
        intervals: visible keys of each query, [B, L] each; [B, 1] where all queries see the same.

    Returns:
        [B, L, H, E] in the dtype of the queries. A query that sees no key returns zero.
    """
    B, L, H, E = q_BLHE.shape
    M, G = k_BMGE.shape[1:3]
    q = (q_BLHE * E**-0.5).reshape(B, L, G, H // G, E).transpose(0, 2, 3, 1, 4)
    k, v = k_BMGE.transpose(0, 2, 1, 3), v_BMGE.transpose(0, 2, 1, 3)
    # The softmax runs in fp32: bf16 sums over hundreds of keys lose the small weights. The mask is
    # added once for all heads, and the sum divides the output, which is smaller than the weights.
    logits = jnp.einsum("bgrle,bgme->bgrlm", q, k, preferred_element_type=jnp.float32)
    logits = logits + jnp.where(visible(intervals, M), 0.0, MASKED)[:, None, None]
    peak = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    weights = jnp.exp(logits - peak)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    out = jnp.einsum(
        "bgrlm,bgme->bgrle", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
    )
    sees = (intervals.end > intervals.start) | (intervals.prefix_end > 0)
    out = jnp.where(sees[:, None, None, :, None], out / total, 0.0)
    return out.transpose(0, 3, 1, 2, 4).reshape(B, L, H, E).astype(q_BLHE.dtype)


MASKED = -1e30
"""Added to the logit of a hidden key. Finite, so that a row without visible keys stays finite."""
