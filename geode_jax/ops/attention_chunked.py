"""Attention by tiles with an online softmax, in plain XLA: memory grows with S, not with S^2.

Forward: Milakov & Gimelshein 2018 (the running maximum and sum), Rabe & Staats 2021 (by tiles).
Backward: Dao et al. 2022, Algorithm 4, which recomputes the weights from the logits and the saved
logarithm of their sum. Pairs of tiles in which no row of the batch sees a key are skipped.

Sizes beside those of `shapes`: i tiles of queries, n rows of such a tile; j tiles of keys, m keys
of such a tile. The rows of a query tile are its queries in the first of the H // G query heads of a
key head, then those of the next, so that a key tile is read once for all of these heads.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float, Float32

from geode_jax.ops.attention_plan import (
    MASKED,
    SKIP,
    Intervals,
    by_tile,
    per_query,
    sees,
    tile_classes,
    tile_size,
)

BLOCK = 256
"""Most keys of a tile, and most queries where several query heads share a key head."""
ROWS = 512
"""Most rows of a query tile of one head: XLA's CPU client computes a product of 256 x 64 by
64 x 256 on one thread, and one with twice as many rows on all threads."""


def query_tiles(
    x_BLHE: Float[jax.Array, "B L H E"], kv_heads: int, size: int
) -> Float[jax.Array, "B G i n E"]:
    """Returns [B, L, H, E] as [B, G, i, n, E], with zeros behind the last query."""
    B, L, H, E = x_BLHE.shape
    tiles, share = -(-L // size), H // kv_heads
    x = jnp.pad(x_BLHE, ((0, 0), (0, tiles * size - L), (0, 0), (0, 0)))
    x = x.reshape(B, tiles, size, kv_heads, share, E).transpose(0, 3, 1, 4, 2, 5)
    return x.reshape(B, kv_heads, tiles, share * size, E)


def from_query_tiles(
    x_BGinE: Float[jax.Array, "B G i n E"], heads: int, length: int
) -> Float[jax.Array, "B L H E"]:
    """Inverts `query_tiles`."""
    B, G, tiles, rows, E = x_BGinE.shape
    share = heads // G
    x = x_BGinE.reshape(B, G, tiles, share, rows // share, E).transpose(0, 2, 4, 1, 3, 5)
    return x.reshape(B, tiles * (rows // share), heads, E)[:, :length]


def key_tiles(x_BMGE: Float[jax.Array, "B M G E"], size: int) -> Float[jax.Array, "B G j m E"]:
    """Returns [B, M, G, E] as [B, G, j, m, E], with zeros behind the last key."""
    B, M, G, E = x_BMGE.shape
    tiles = -(-M // size)
    x = jnp.pad(x_BMGE, ((0, 0), (0, tiles * size - M), (0, 0), (0, 0)))
    return x.reshape(B, tiles, size, G, E).transpose(0, 3, 1, 2, 4)


def from_key_tiles(
    x_BGjmE: Float[jax.Array, "B G j m E"], length: int
) -> Float[jax.Array, "B M G E"]:
    """Inverts `key_tiles`."""
    B, G, tiles, size, E = x_BGjmE.shape
    return x_BGjmE.transpose(0, 2, 3, 1, 4).reshape(B, tiles * size, G, E)[:, :length]


class _Tiled(NamedTuple):
    """What both passes loop over; tiles are the first axis, as `lax.scan` requires."""

    q: jax.Array  # [i, B, G, n, E]
    k: jax.Array  # [j, B, G, m, E]
    v: jax.Array
    rows: Intervals  # [i, B, queries of a tile]
    first_key: jax.Array  # [j]
    active: jax.Array  # bool [i, j]


def _tiled(q, k, v, intervals: Intervals) -> _Tiled:
    M, G = k.shape[1:3]
    block_q = tile_size(q.shape[1], max(BLOCK, ROWS * G // q.shape[2]), 1)
    block_k = tile_size(M, BLOCK, 1)
    intervals = per_query(intervals, q.shape[:2], M)
    rows = by_tile(intervals, block_q)
    return _Tiled(
        jnp.moveaxis(query_tiles(q, G, block_q), 2, 0),
        jnp.moveaxis(key_tiles(k, block_k), 2, 0),
        jnp.moveaxis(key_tiles(v, block_k), 2, 0),
        Intervals(*(jnp.moveaxis(x, 1, 0) for x in rows)),
        jnp.arange(0, M, block_k, dtype=jnp.int32),
        jnp.any(tile_classes(intervals, M, block_q, block_k) != SKIP, axis=0),
    )


def _product(x, y) -> jax.Array:
    """Returns the products [..., rows, columns] of matrices in float32.

    Keep the first operand untransposed: XLA on CPUs is 2 to 3 times slower otherwise. So some
    operands and sums are stored transposed.
    """
    return jnp.matmul(x, y, preferred_element_type=jnp.float32)


def _logits(q, k_Em, rows: Intervals, first_key) -> jax.Array:
    """Returns the logits float32 [B, G, n, m] of one pair of tiles; hidden keys are at MASKED."""
    B, G, n, E = q.shape
    key = first_key + jnp.arange(k_Em.shape[-1], dtype=jnp.int32)
    mask = sees(key, *(x[..., None] for x in rows))  # [B, queries, m]
    s = _product(q, k_Em) * E**-0.5
    s = s.reshape(B, G, n // mask.shape[1], *mask.shape[1:])
    return jnp.where(mask[:, None, None], s, MASKED).reshape(B, G, n, -1)


def forward(
    q_BLHE: Float[jax.Array, "B L H E"],
    k_BMGE: Float[jax.Array, "B M G E"],
    v_BMGE: Float[jax.Array, "B M G E"],
    intervals: Intervals,
) -> tuple[Float[jax.Array, "B L H E"], Float32[jax.Array, "B G i n"]]:
    """Returns the output [B, L, H, E] and each query's log-sum-exp, float32 [B, G, i, n].

    Args:
        q_BLHE, k_BMGE, v_BMGE, intervals: as in `attention.attention`.
    """
    t = _tiled(q_BLHE, k_BMGE, v_BMGE, intervals)
    B, G, n, E = t.q.shape[1:]
    keys = t.k.mT, t.v, t.first_key

    def of_queries(_, x):
        q, rows, active = x

        def of_keys(carry, y):
            k_Em, v, first_key, on = y

            def add(carry):
                peak, total, out = carry
                s = _logits(q, k_Em, rows, first_key)
                new = jnp.maximum(peak, jnp.max(s, axis=-1))
                # Before the first visible key the maximum is MASKED, and MASKED - MASKED would give
                # weights of 1; MASKED - 0 gives 0.
                p = jnp.exp(s - jnp.where(new > MASKED, new, 0.0)[..., None])
                decay = jnp.exp(peak - new)
                out = out * decay[..., None] + _product(p.astype(v.dtype), v)
                return new, total * decay + jnp.sum(p, axis=-1), out

            return jax.lax.cond(on, add, lambda carry: carry, carry), None

        zero = jnp.zeros((B, G, n), jnp.float32)
        carry = zero + MASKED, zero, jnp.zeros((B, G, n, E), jnp.float32)
        (peak, total, out), _ = jax.lax.scan(of_keys, carry, (*keys, active))
        seeing = total > 0
        out = out / jnp.where(seeing, total, 1.0)[..., None]
        lse = jnp.where(seeing, peak + jnp.log(jnp.where(seeing, total, 1.0)), 0.0)
        return None, (out.astype(q_BLHE.dtype), lse)

    _, (out, lse) = jax.lax.scan(of_queries, None, (t.q, t.rows, t.active))
    return from_query_tiles(jnp.moveaxis(out, 0, 2), *_size(q_BLHE)), jnp.moveaxis(lse, 0, 2)


def _size(q_BLHE) -> tuple[int, int]:
    """Returns H and L."""
    return q_BLHE.shape[2], q_BLHE.shape[1]


def backward(
    q_BLHE: Float[jax.Array, "B L H E"],
    k_BMGE: Float[jax.Array, "B M G E"],
    v_BMGE: Float[jax.Array, "B M G E"],
    intervals: Intervals,
    out_BLHE: Float[jax.Array, "B L H E"],
    lse: Float32[jax.Array, "B G i n"],
    g_BLHE: Float[jax.Array, "B L H E"],
) -> tuple[Float[jax.Array, "B L H E"], Float[jax.Array, "B M G E"], Float[jax.Array, "B M G E"]]:
    """Returns the gradients of q, k and v.

    Args:
        q_BLHE, k_BMGE, v_BMGE, intervals: as in `forward`.
        out_BLHE, lse: results of `forward`.
        g_BLHE: cotangent of the output.
    """
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
        q_En, g_En = q.mT, g.mT

        def of_keys(dq, y):
            k, k_Em, v_Em, first_key, on, dk_Em, dv_Em = y

            def add(sums):
                dq, dk_Em, dv_Em = sums
                p = jnp.exp(_logits(q, k_Em, rows, first_key) - lse[..., None])
                dp = _product(g, v_Em)
                ds = (p * (dp - delta[..., None]) * scale).astype(q.dtype)
                return (
                    dq + _product(ds, k),
                    dk_Em + _product(q_En, ds),
                    dv_Em + _product(g_En, p.astype(g.dtype)),
                )

            dq, *of_tile = jax.lax.cond(on, add, lambda sums: sums, (dq, dk_Em, dv_Em))
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
