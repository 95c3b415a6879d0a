"""Attention with one mask contract: every query sees keys [0, prefix_end) and [start, end).

This form covers causal masks, prefixes, padding, cross-attention, a KV cache that is not full yet,
and many questions of a scene that share its vision and thinking tokens as their prefix. So one
contract and one tile plan (`attention_plan`) serve all uses:

| use | prefix_end | start | end |
|---|---|---|---|
| causal, row padded on the left by p | 0 | p | i + 1 |
| question of a scene, vision tokens in keys [0, n) | n | first column of the question | i + 1 |
| its answer, vision and thinking tokens in keys [0, m) | m | first column of the question | i + 1 |
| cross-attention to k valid vision tokens | 0 | 0 | k |

`attention` chooses among a dense computation, which is fast for few logits, and computations by
tiles, whose memory is linear in the length: plain XLA (`attention_chunked`), Pallas kernels for
TPUs (`attention_tpu`), and kernels for Hopper GPUs (`attention_gpu`; within
`gpu.use_kernels(True)` only).
"""

import functools
import logging
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Float

from geode_jax import sharding
from geode_jax.ops import gpu
from geode_jax.ops.attention_plan import MASKED, Intervals, causal, visible
from geode_jax.shapes import Array

__all__ = ["IMPLEMENTATIONS", "Intervals", "attention", "cache_columns", "causal", "visible"]


class _Passes(NamedTuple):
    """A computation by tiles and its derivative."""

    forward: Callable
    backward: Callable


# Imported when they are used: Pallas takes most of a second.


def _chunked() -> _Passes:
    from geode_jax.ops.attention_chunked import backward, forward

    return _Passes(forward, backward)


def _tpu() -> _Passes:
    from geode_jax.ops.attention_tpu import backward, forward

    return _Passes(forward, backward)


def _gpu() -> _Passes:
    from geode_jax.ops.attention_gpu import backward, forward

    return _Passes(forward, backward)


_BY_TILES = {"chunked": _chunked, "tpu": _tpu, "gpu": _gpu}

IMPLEMENTATIONS = ("dense", *_BY_TILES)

DENSE_LOGITS = 512 * 512
"""With fewer logits per head, dense is about as fast as by tiles; see `choose`."""

SPLIT_KEYS = 1024
"""With at least so many keys, GPUs with the kernels split the keys of a single query."""

_log = logging.getLogger(__name__)


def attention(
    q_BLHE: Float[Array, "B L H E"],
    k_BMGE: Float[Array, "B M G E"],
    v_BMGE: Float[Array, "B M G E"],
    intervals: Intervals,
    *,
    implementation: str | None = None,
) -> Float[jax.Array, "B L H E"]:
    """Computes scaled dot-product attention under the interval contract.

    Under a mesh (`jax.set_mesh`) each device computes the tiles of its own rows and heads.

    Args:
        q_BLHE: queries, H heads of width E.
        k_BMGE: keys; G divides H (grouped-query attention: head h reads key head h * G // H).
        v_BMGE: values.
        intervals: visible keys of each query, [B, L] each; [B, 1] if all queries see the same keys.
        implementation: one of `IMPLEMENTATIONS`; None: by `choose`. Other platforms run "tpu" in
            Pallas' interpreter. "gpu" needs a Hopper GPU, half precision, and a head width of 64 or
            128.

    Returns:
        [B, L, H, E] in the dtype of the queries; zero for a query that sees no key.

    Raises:
        ValueError: the implementation does not exist or does not support the width or dtype.
    """
    mesh = jax.sharding.get_abstract_mesh()
    platform = sharding.platform()
    L, _, E = q_BLHE.shape[1:]
    M, dtype = k_BMGE.shape[1], jnp.result_type(q_BLHE, k_BMGE, v_BMGE)
    if implementation is None:
        implementation = choose(platform, L, M, E, dtype)
        _log_choice(implementation, platform, L, M)
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"attention: {implementation!r} is none of {', '.join(IMPLEMENTATIONS)}")
    if implementation == "gpu" and not _gpu_supports(E, dtype):
        raise ValueError(f"attention: no GPU kernel for heads of width {E} in {dtype}")
    if implementation == "dense":
        return _dense(q_BLHE, k_BMGE, v_BMGE, intervals)
    q, k, v = (jnp.asarray(x, dtype) for x in (q_BLHE, k_BMGE, v_BMGE))
    intervals = Intervals(*(jnp.asarray(x, jnp.int32) for x in intervals))
    if mesh.empty or mesh.size == 1 or mesh.manual_axes:
        return _by_tiles(implementation, None, q, k, v, intervals).astype(q_BLHE.dtype)
    # With more devices for heads than key heads, each device holds the key head that it needs.
    G, parts = k.shape[2], mesh.shape["model"]
    if parts % G == 0 and q.shape[2] % parts == 0:
        k, v = (jnp.repeat(x, parts // G, axis=2) for x in (k, v))
    return _by_tiles(implementation, mesh, q, k, v, intervals).astype(q_BLHE.dtype)


def choose(platform: str, queries: int, keys: int, width: int, dtype) -> str:
    """Returns the implementation for a number of queries and keys, a head width and a dtype.

    Few logits, as in decoding, are computed densely, without a loop. The kernels for GPUs, where
    they are used, also decode from many keys. On a CPU of 2 cores, with 8 heads of 64, float32,
    causal, forward and backward: 5.2 ms dense and 5.1 by tiles for 256 queries and keys, 13.8 and
    15.1 for 512, 29.5 and 28.5 for 768, 52.5 and 42.9 for 1,024; 97 and 97 for 16 rows of 256.
    """
    many = queries * keys >= DENSE_LOGITS
    if platform not in gpu.PLATFORMS:
        kernels = "tpu" if platform == "tpu" else "chunked"
        return kernels if many else "dense"
    wanted = many or (queries == 1 and keys >= SPLIT_KEYS)
    wanted = wanted and gpu.kernels_wanted(platform) and _gpu_supports(width, dtype)
    return "gpu" if wanted else "dense"


def cache_columns(keys: int) -> int:
    """Returns the number of columns of a cache of so many keys.

    The kernels for GPUs read whole tiles. A cache of another size would be copied, to pad it, for
    every token.
    """
    if not gpu.kernels_wanted(sharding.platform()):
        return keys
    from geode_jax.ops.attention_gpu import TILE

    return -(-keys // TILE) * TILE


def _gpu_supports(width: int, dtype) -> bool:
    from geode_jax.ops.attention_gpu import supports

    return supports(width, dtype)


@functools.cache
def _log_choice(implementation: str, platform: str, queries: int, keys: int) -> None:
    _log.info(
        "attention of %d queries to %d keys on %s: %s", queries, keys, platform, implementation
    )


def _dense(q_BLHE: Array, k_BMGE: Array, v_BMGE: Array, intervals: Intervals) -> jax.Array:
    """Computes attention with all logits [B, H, L, M] in memory."""
    B, L, H, E = q_BLHE.shape
    M, G = k_BMGE.shape[1:3]
    q = (q_BLHE * E**-0.5).reshape(B, L, G, H // G, E).transpose(0, 2, 3, 1, 4)
    k, v = k_BMGE.transpose(0, 2, 1, 3), v_BMGE.transpose(0, 2, 1, 3)
    # The softmax runs in float32: bfloat16 sums over hundreds of keys lose the small weights. The
    # mask is added once for all heads. The output is normalized, which is smaller than the weights.
    logits = jnp.einsum("bgrle,bgme->bgrlm", q, k, preferred_element_type=jnp.float32)
    logits = logits + jnp.where(visible(intervals, M), 0.0, MASKED)[:, None, None]
    peak = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    weights = jnp.exp(logits - peak)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    out = jnp.einsum(
        "bgrlm,bgme->bgrle", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
    )
    seeing = (intervals.end > intervals.start) | (intervals.prefix_end > 0)
    out = jnp.where(seeing[:, None, None, :, None], out / total, 0.0)
    return out.transpose(0, 3, 1, 2, 4).reshape(B, L, H, E).astype(q_BLHE.dtype)


# --- By tiles -------------------------------------------------------------------------------------


# The derivative is defined outside of `shard_map`, which is then never transposed: its transpose
# would sum, over devices, gradients that are complete on each device.


def _output(implementation, mesh, q, k, v, intervals: Intervals) -> jax.Array:
    return _forward(implementation, mesh, q, k, v, intervals)[0]


_by_tiles = jax.custom_vjp(_output, nondiff_argnums=(0, 1))


def _forward(implementation, mesh, q, k, v, intervals: Intervals) -> tuple[jax.Array, tuple]:
    function = _BY_TILES[implementation]().forward
    if mesh is not None:
        row, heads, sums = _specs(mesh, q, k)
        function = jax.shard_map(
            function,
            mesh=mesh,
            in_specs=(heads, heads, heads, row),
            out_specs=(heads, sums),
            check_vma=False,
        )
    out, lse = function(q, k, v, intervals)
    return out, (q, k, v, intervals, out, lse)


def _backward(implementation, mesh, saved, g):
    function = _BY_TILES[implementation]().backward
    if mesh is not None:
        row, heads, sums = _specs(mesh, *saved[:2])
        function = jax.shard_map(
            function,
            mesh=mesh,
            in_specs=(heads, heads, heads, row, heads, sums, heads),
            out_specs=heads,
            check_vma=False,
        )
    return *function(*saved, g), None


_by_tiles.defvjp(_forward, _backward)


def _specs(mesh, q, k) -> tuple[PartitionSpec, PartitionSpec, PartitionSpec]:
    """Returns the specs of intervals [B, L], arrays [B, L, heads, E] and saved sums [B, G, ...]."""
    (rows,) = sharding.spec(("batch",), q.shape[:1], mesh.shape)
    parts = [sharding.spec(("heads",), x.shape[2:3], mesh.shape)[0] for x in (q, k)]
    heads = parts[0] if parts[0] == parts[1] else None
    return (
        PartitionSpec(rows),
        PartitionSpec(rows, None, heads),
        PartitionSpec(rows, heads),
    )
