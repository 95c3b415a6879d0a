"""Attention by tiles with an online softmax, in plain XLA: memory grows with S, not with S^2.

Forward: Milakov & Gimelshein 2018 (the running maximum and sum), Rabe & Staats 2021 (by tiles).
Backward: Dao et al. 2022, Algorithm 4: weights are computed again from the logits and their saved
logarithm of the sum. Pairs of tiles in which no row of the batch sees anything are skipped.

Letters: I tiles of queries, J of keys; N = R * queries of a tile, the R = H // G query heads of a
key head one after the other, so that a key tile is read once for all of them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from geode_jax.ops.attention_plan import MASKED, SKIP, Intervals, by_tile, tile_classes, tile_size
from geode_jax.shapes import Array

BLOCK = 256
"""Keys of a tile at most, and queries where they are of several heads."""
ROWS = 512
"""Rows N of a tile of one head's queries at most: XLA's CPU client makes a product of 256 x 64 by
64 x 256 on one thread, one of twice as many rows on all."""


def query_tiles(x_BLHE: Array, kv_heads: int, size: int) -> jax.Array:
    """[B, L, H, E] -> [B, G, I, N, E], zeros behind the last query."""
    B, L, H, E = x_BLHE.shape
    tiles, share = -(-L // size), H // kv_heads
    x = jnp.pad(x_BLHE, ((0, 0), (0, tiles * size - L), (0, 0), (0, 0)))
    x = x.reshape(B, tiles, size, kv_heads, share, E).transpose(0, 3, 1, 4, 2, 5)
    return x.reshape(B, kv_heads, tiles, share * size, E)


def from_query_tiles(x_BGINE: Array, heads: int, length: int) -> jax.Array:
    """The inverse of `query_tiles`."""
    B, G, tiles, N, E = x_BGINE.shape
    share = heads // G
    x = x_BGINE.reshape(B, G, tiles, share, N // share, E).transpose(0, 2, 4, 1, 3, 5)
    return x.reshape(B, tiles * (N // share), heads, E)[:, :length]


def key_tiles(x_BMGE: Array, size: int) -> jax.Array:
    """[B, M, G, E] -> [B, G, J, keys of a tile, E], zeros behind the last key."""
    B, M, G, E = x_BMGE.shape
    tiles = -(-M // size)
    x = jnp.pad(x_BMGE, ((0, 0), (0, tiles * size - M), (0, 0), (0, 0)))
    return x.reshape(B, tiles, size, G, E).transpose(0, 3, 1, 2, 4)


def from_key_tiles(x_BGJKE: Array, length: int) -> jax.Array:
    """The inverse of `key_tiles`."""
    B, G, tiles, size, E = x_BGJKE.shape
    return x_BGJKE.transpose(0, 2, 3, 1, 4).reshape(B, tiles * size, G, E)[:, :length]


class _Tiled(NamedTuple):
    """What both passes loop over; tiles come first, as `lax.scan` wants them."""

    q: jax.Array  # [I, B, G, N, E]
    k: jax.Array  # [J, B, G, K, E]
    v: jax.Array
    rows: Intervals  # [I, B, queries of a tile]
    first_key: jax.Array  # [J]
    active: jax.Array  # bool [I, J]


def _tiled(q, k, v, intervals: Intervals) -> _Tiled:
    M, G = k.shape[1:3]
    block_q = tile_size(q.shape[1], max(BLOCK, ROWS * G // q.shape[2]), 1)
    block_k = tile_size(M, BLOCK, 1)
    intervals = Intervals(*(jnp.broadcast_to(x, q.shape[:2]) for x in intervals))
    ends = (jnp.clip(jnp.asarray(x), 0, M) for x in intervals)  # hides the keys of the padding
    rows = by_tile(Intervals(*ends), block_q)
    return _Tiled(
        jnp.moveaxis(query_tiles(q, G, block_q), 2, 0),
        jnp.moveaxis(key_tiles(k, block_k), 2, 0),
        jnp.moveaxis(key_tiles(v, block_k), 2, 0),
        Intervals(*(jnp.moveaxis(x, 1, 0) for x in rows)),
        jnp.arange(0, M, block_k, dtype=jnp.int32),
        jnp.any(tile_classes(intervals, M, block_q, block_k) != SKIP, axis=0),
    )


def _product(x, y) -> jax.Array:
    """fp32 [B, G, n, m] of [B, G, n, k] and [B, G, k, m].

    All are of this form, for which operands and sums stand transposed where that takes it: of a
    first operand that is transposed, XLA's products on CPUs take two to three times as long.
    """
    return jnp.matmul(x, y, preferred_element_type=jnp.float32)


def _logits(q, k_EK, rows: Intervals, first_key) -> jax.Array:
    """fp32 [B, G, N, K] of one pair of tiles, hidden keys at MASKED."""
    B, G, N, E = q.shape
    prefix, start, end = (x[..., None] for x in rows)
    key = first_key + jnp.arange(k_EK.shape[-1], dtype=jnp.int32)
    mask = (key < prefix) | ((key >= start) & (key < end))  # [B, queries, K]
    s = _product(q, k_EK) * E**-0.5
    s = s.reshape(B, G, N // mask.shape[1], *mask.shape[1:])
    return jnp.where(mask[:, None, None], s, MASKED).reshape(B, G, N, -1)


def forward(
    q_BLHE: Array,
    k_BMGE: Array,
    v_BMGE: Array,
    intervals: Intervals,
) -> tuple[jax.Array, jax.Array]:
    """Output [B, L, H, E], and the logarithm of each query's sum, fp32 [B, G, I, N].

    Args:
        q_BLHE, k_BMGE, v_BMGE, intervals: as of `attention.attention`.
    """
    t = _tiled(q_BLHE, k_BMGE, v_BMGE, intervals)
    B, G, N, E = t.q.shape[1:]
    keys = t.k.mT, t.v, t.first_key

    def of_queries(_, x):
        q, rows, active = x

        def of_keys(carry, y):
            k_EK, v, first_key, on = y

            def add(carry):
                peak, total, out = carry
                s = _logits(q, k_EK, rows, first_key)
                new = jnp.maximum(peak, jnp.max(s, axis=-1))
                # Before the first visible key the maximum is MASKED: weights of 1, which 0 below
                # takes away.
                p = jnp.exp(s - jnp.where(new > MASKED, new, 0.0)[..., None])
                decay = jnp.exp(peak - new)
                out = out * decay[..., None] + _product(p.astype(v.dtype), v)
                return new, total * decay + jnp.sum(p, axis=-1), out

            return jax.lax.cond(on, add, lambda carry: carry, carry), None

        zero = jnp.zeros((B, G, N), jnp.float32)
        carry = zero + MASKED, zero, jnp.zeros((B, G, N, E), jnp.float32)
        (peak, total, out), _ = jax.lax.scan(of_keys, carry, (*keys, active))
        sees = total > 0
        out = out / jnp.where(sees, total, 1.0)[..., None]
        lse = jnp.where(sees, peak + jnp.log(jnp.where(sees, total, 1.0)), 0.0)
        return None, (out.astype(q_BLHE.dtype), lse)

    _, (out, lse) = jax.lax.scan(of_queries, None, (t.q, t.rows, t.active))
    return from_query_tiles(jnp.moveaxis(out, 0, 2), *_size(q_BLHE)), jnp.moveaxis(lse, 0, 2)


def _size(q_BLHE) -> tuple[int, int]:
    """Heads and length."""
    return q_BLHE.shape[2], q_BLHE.shape[1]


def backward(
    q_BLHE: Array,
    k_BMGE: Array,
    v_BMGE: Array,
    intervals: Intervals,
    out_BLHE: Array,
    lse: Array,
    g_BLHE: Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of q, k and v for cotangent g of the output; the rest is of `forward`."""
    t = _tiled(q_BLHE, k_BMGE, v_BMGE, intervals)
    G, scale = k_BMGE.shape[2], q_BLHE.shape[-1] ** -0.5
    block_q = t.rows.start.shape[2]
    g_tiles, out_tiles = (
        jnp.moveaxis(query_tiles(x, G, block_q), 2, 0) for x in (g_BLHE, out_BLHE)
    )
    delta = jnp.sum(g_tiles.astype(jnp.float32) * out_tiles.astype(jnp.float32), axis=-1)

    keys = t.k, t.k.mT, t.v.mT, t.first_key

    def of_queries(carry, x):
        q, g, lse, delta, rows, active = x
        q_EN, g_EN = q.mT, g.mT

        def of_keys(dq, y):
            k, k_EK, v_EK, first_key, on, dk_EK, dv_EK = y

            def add(sums):
                dq, dk_EK, dv_EK = sums
                p = jnp.exp(_logits(q, k_EK, rows, first_key) - lse[..., None])
                dp = _product(g, v_EK)
                ds = (p * (dp - delta[..., None]) * scale).astype(q.dtype)
                return (
                    dq + _product(ds, k),
                    dk_EK + _product(q_EN, ds),
                    dv_EK + _product(g_EN, p.astype(g.dtype)),
                )

            dq, *of_tile = jax.lax.cond(on, add, lambda sums: sums, (dq, dk_EK, dv_EK))
            return dq, tuple(of_tile)

        zero = jnp.zeros(q.shape, jnp.float32)
        dq, carry = jax.lax.scan(of_keys, zero, (*keys, active, *carry))
        return carry, dq.astype(q_BLHE.dtype)

    zero = jnp.zeros(t.k.mT.shape, jnp.float32)
    xs = t.q, g_tiles, jnp.moveaxis(lse, 2, 0), delta, t.rows, t.active
    (dk, dv), dq = jax.lax.scan(of_queries, (zero, zero), xs)
    dk, dv = (
        from_key_tiles(jnp.moveaxis(x.mT, 0, 2), k_BMGE.shape[1]).astype(k_BMGE.dtype)
        for x in (dk, dv)
    )
    return from_query_tiles(jnp.moveaxis(dq, 0, 2), *_size(q_BLHE)), dk, dv
