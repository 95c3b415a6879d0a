"""Attention by tiles as Pallas kernels for TPUs, forward and backward.

The plan's schedule of tile pairs (`attention_plan.schedule`) is fetched ahead into scalar memory;
the grid is (key heads, visits), its second size known only when the intervals are: pairs that
nobody sees cost nothing, and only boundary pairs pay for a mask.

Logits are computed transposed, keys x queries, so that what belongs to a query (its intervals, the
running maximum and sum) is one row of lanes, and a maximum over keys is elementwise over vectors.
Exponents are base 2, which is what the hardware has.

Backward: one kernel by query tile for the queries' gradient, one by key tile for those of keys and
values; each result is written by one visitor, so that a step can be repeated bit for bit.

Letters as in `attention_chunked`: I tiles of queries, J of keys; N = R * queries of a tile, the
R = H // G query heads of a key head one after the other; K keys of a tile.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from geode_jax.ops.attention_chunked import (
    from_key_tiles,
    from_query_tiles,
    key_tiles,
    query_tiles,
)
from geode_jax.ops.attention_plan import (
    FIRST,
    LAST,
    MASKED,
    WITH_MASK,
    WITHOUT_MASK,
    Intervals,
    Schedule,
    by_tile,
    schedule,
    tile_classes,
    tile_size,
)
from geode_jax.shapes import Array
from geode_jax.sharding import platform

ROWS, KEYS = 1024, 512
"""At most so many queries (of all heads of a key head together), and keys, in a tile."""

LANES = 128
"""Tiles are multiples of the vector registers' lanes."""

VMEM_BYTES = 32 * 2**20
"""What a kernel may take of a core's vector memory: v5e and v6e have 128 MiB, v5p 64."""

LOG2_E = math.log2(math.e)


class _Plan:
    """Sizes of the tiles and both schedules; see `forward` for the arguments."""

    def __init__(self, q: Array, k: Array, intervals: Intervals):
        self.B, self.L, self.H, self.E = q.shape
        self.M, self.G = k.shape[1:3]
        share = self.H // self.G
        most = max(LANES, ROWS // share // LANES * LANES)
        self.block_q = tile_size(self.L, most, LANES)
        self.block_k = tile_size(self.M, KEYS, LANES)
        self.I, self.J = -(-self.L // self.block_q), -(-self.M // self.block_k)
        self.N = share * self.block_q
        intervals = Intervals(*(jnp.broadcast_to(x, (self.B, self.L)) for x in intervals))
        ends = (jnp.clip(x, 0, self.M) for x in intervals)  # hides the keys of the padding
        rows = jnp.stack(by_tile(Intervals(*ends), self.block_q), axis=2)
        self.rows = jnp.tile(rows, (1, 1, 1, share))  # [B, I, 3, N]
        self.classes = tile_classes(intervals, self.M, self.block_q, self.block_k)

    def specs(self, by_query: bool) -> dict[str, pl.BlockSpec]:
        """Where a visit finds its blocks, by kind of array."""
        rows = self.I if by_query else self.J

        def at(query: bool, head: bool):
            """Index map of an array [B, G, tiles, ...], or [B, tiles, ...] without heads."""

            def index(g, step, row, column, how):
                b, own = row[step] // rows, row[step] % rows
                tile = own if query == by_query else column[step]
                return (b, g, tile, 0, 0) if head else (b, tile, 0, 0)

            return index

        def block(query: bool, *shape: int, head: bool = True):
            return pl.BlockSpec((None,) * (2 + head) + shape, at(query, head))

        N, K, E = self.N, self.block_k, self.E
        return {
            "query": block(True, N, E),
            "query transposed": block(True, E, N),
            "of a query": block(True, 1, N),
            "intervals": block(True, 3, N, head=False),
            "key": block(False, K, E),
        }

    def call(
        self,
        name: str,
        kernel: Callable,
        visits: Schedule,
        by_query: bool,
        inputs: list[tuple[str, Array]],
        outputs: list[tuple[str, jax.ShapeDtypeStruct]],
        scratch: list,
        products: int,
    ):
        """Runs a kernel over its visits.

        Args:
            name: of the kernel in compiled programs.
            kernel: gets the schedule's references, those of the inputs, outputs and scratch.
            visits: in the order of query tiles where `by_query`, else of key tiles.
            inputs, outputs: kind (a key of `specs`) and array or shape.
            scratch: buffers that live through a row of visits.
            products: matrix products of each pair, without those of the forward pass again.
        """
        specs = self.specs(by_query)
        pairs = self.B * self.H * self.L * self.M
        arrays = [x for _, x in inputs]
        return pl.pallas_call(
            kernel,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=3,
                grid=(self.G, visits.steps),
                in_specs=[specs[kind] for kind, _ in inputs],
                out_specs=[specs[kind] for kind, _ in outputs],
                scratch_shapes=scratch,
            ),
            out_shape=[shape for _, shape in outputs],
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
            ),
            # As if everything were seen and nothing computed again: what a dense computation has.
            cost_estimate=pl.CostEstimate(
                flops=2 * products * pairs * self.E,
                transcendentals=pairs,
                bytes_accessed=sum(x.size * x.dtype.itemsize for x in arrays),
            ),
            interpret=platform() != "tpu",  # in Pallas' interpreter, for tests
            name=name,
        )(visits.row, visits.column, visits.how, *arrays)


def _dot(a, b, contract: tuple[int, int]) -> jax.Array:
    """Product over one axis of each, accumulated in fp32."""
    return jax.lax.dot_general(
        a, b, (((contract[0],), (contract[1],)), ((), ())), preferred_element_type=jnp.float32
    )


def _scores(q, k, rows, key_tile, masked: bool) -> jax.Array:
    """Logits [K, N] in base 2; hidden keys are at MASKED."""
    s = _dot(k, q, (1, 1)) * (q.shape[1] ** -0.5 * LOG2_E)
    if not masked:
        return s
    key = key_tile * k.shape[0] + jax.lax.broadcasted_iota(jnp.int32, s.shape, 0)
    prefix, start, end = (rows[i : i + 1] for i in range(3))
    return jnp.where((key < prefix) | ((key >= start) & (key < end)), s, MASKED)


def _visit(how, step, begin: Callable, compute: Callable, finish: Callable) -> None:
    """What a visit does, by the bits of `Schedule.how`; compute(masked) for one pair of tiles."""
    bits = how[step]
    pl.when(bits & FIRST != 0)(begin)
    pl.when(bits & WITH_MASK != 0)(lambda: compute(True))
    pl.when(bits & WITHOUT_MASK != 0)(lambda: compute(False))
    pl.when(bits & LAST != 0)(finish)


# --- Forward --------------------------------------------------------------------------------------


def forward(
    q_BLHE: Array, k_BMGE: Array, v_BMGE: Array, intervals: Intervals
) -> tuple[jax.Array, jax.Array]:
    """Output [B, L, H, E], and log2 of each query's sum, fp32 [B, G, I, 1, N].

    Args:
        q_BLHE, k_BMGE, v_BMGE, intervals: as of `attention.attention`.
    """
    p = _Plan(q_BLHE, k_BMGE, intervals)
    tiles, f32 = (p.B, p.G, p.I), jnp.float32
    out, lse = p.call(
        "attention_forward",
        _forward_kernel,
        schedule(p.classes),
        True,
        [
            ("query", query_tiles(q_BLHE, p.G, p.block_q)),
            ("key", key_tiles(k_BMGE, p.block_k)),
            ("key", key_tiles(v_BMGE, p.block_k)),
            ("intervals", p.rows),
        ],
        [
            ("query transposed", jax.ShapeDtypeStruct((*tiles, p.E, p.N), q_BLHE.dtype)),
            ("of a query", jax.ShapeDtypeStruct((*tiles, 1, p.N), f32)),
        ],
        [pltpu.VMEM((1, p.N), f32), pltpu.VMEM((1, p.N), f32), pltpu.VMEM((p.E, p.N), f32)],
        products=2,
    )
    return from_query_tiles(out.swapaxes(3, 4), p.H, p.L), lse


def _forward_kernel(row, column, how, q, k, v, rows, out, lse, peak, total, sums):
    step = pl.program_id(1)

    def begin():
        peak[...] = jnp.full_like(peak, MASKED)
        total[...] = jnp.zeros_like(total)
        sums[...] = jnp.zeros_like(sums)

    def compute(masked: bool):
        s = _scores(q[...], k[...], rows[...], column[step], masked)
        old = peak[...]
        new = jnp.maximum(old, jnp.max(s, axis=0, keepdims=True))
        # Where a query has seen no key yet, MASKED - 0 makes weights of 0, MASKED - MASKED of 1.
        weights = jnp.exp2(s - (jnp.where(new > MASKED, new, 0.0) if masked else new))
        decay = jnp.exp2(old - new)
        peak[...] = new
        total[...] = total[...] * decay + jnp.sum(weights, axis=0, keepdims=True)
        sums[...] = sums[...] * decay + _dot(v[...], weights.astype(v.dtype), (0, 0))

    def finish():
        sees = total[...] > 0
        count = jnp.where(sees, total[...], 1.0)
        out[...] = (sums[...] / count).astype(out.dtype)
        lse[...] = jnp.where(sees, peak[...] + jnp.log2(count), 0.0)

    _visit(how, step, begin, compute, finish)


# --- Backward -------------------------------------------------------------------------------------


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
    p = _Plan(q_BLHE, k_BMGE, intervals)
    delta = jnp.sum(
        g_BLHE.astype(jnp.float32) * out_BLHE.astype(jnp.float32), axis=-1, keepdims=True
    )
    inputs = [
        ("query", query_tiles(q_BLHE, p.G, p.block_q)),
        ("key", key_tiles(k_BMGE, p.block_k)),
        ("key", key_tiles(v_BMGE, p.block_k)),
        ("intervals", p.rows),
        ("query", query_tiles(g_BLHE, p.G, p.block_q)),
        ("of a query", lse),
        ("of a query", query_tiles(delta, p.G, p.block_q).swapaxes(3, 4)),
    ]
    (dq,) = p.call(
        "attention_backward_queries",
        _queries_kernel,
        schedule(p.classes),
        True,
        inputs,
        [("query transposed", jax.ShapeDtypeStruct((p.B, p.G, p.I, p.E, p.N), q_BLHE.dtype))],
        [pltpu.VMEM((p.E, p.N), jnp.float32)],
        products=2,
    )
    keys = jax.ShapeDtypeStruct((p.B, p.G, p.J, p.block_k, p.E), k_BMGE.dtype)
    dk, dv = p.call(
        "attention_backward_keys",
        functools.partial(_keys_kernel, p.J),
        schedule(p.classes.swapaxes(1, 2)),
        False,
        inputs,
        [("key", keys), ("key", keys)],
        [pltpu.VMEM((p.block_k, p.E), jnp.float32)] * 2,
        products=2,
    )
    dq = from_query_tiles(dq.swapaxes(3, 4), p.H, p.L)
    return dq, from_key_tiles(dk, p.M), from_key_tiles(dv, p.M)


def _weights_and_slopes(q, k, v, rows, g, lse, delta, key_tile, masked: bool):
    """Weights and the gradient of the logits, both [K, N] fp32, of one pair of tiles."""
    weights = jnp.exp2(_scores(q[...], k[...], rows[...], key_tile, masked) - lse[...])
    slopes = weights * (_dot(v[...], g[...], (1, 1)) - delta[...]) * q.shape[1] ** -0.5
    return weights, slopes


def _queries_kernel(row, column, how, q, k, v, rows, g, lse, delta, dq, sums):
    step = pl.program_id(1)

    def begin():
        sums[...] = jnp.zeros_like(sums)

    def compute(masked: bool):
        _, slopes = _weights_and_slopes(q, k, v, rows, g, lse, delta, column[step], masked)
        sums[...] += _dot(k[...], slopes.astype(k.dtype), (0, 0))

    def finish():
        dq[...] = sums[...].astype(dq.dtype)

    _visit(how, step, begin, compute, finish)


def _keys_kernel(
    key_tiles_of_a_row, row, column, how, q, k, v, rows, g, lse, delta, dk, dv, sum_k, sum_v
):
    step = pl.program_id(1)
    key_tile = row[step] % key_tiles_of_a_row

    def begin():
        sum_k[...] = jnp.zeros_like(sum_k)
        sum_v[...] = jnp.zeros_like(sum_v)

    def compute(masked: bool):
        weights, slopes = _weights_and_slopes(q, k, v, rows, g, lse, delta, key_tile, masked)
        sum_v[...] += _dot(weights.astype(g.dtype), g[...], (1, 0))
        sum_k[...] += _dot(slopes.astype(q.dtype), q[...], (1, 0))

    def finish():
        dk[...] = sum_k[...].astype(dk.dtype)
        dv[...] = sum_v[...].astype(dv.dtype)

    _visit(how, step, begin, compute, finish)
