"""Attention by tiles as Pallas kernels for TPUs, forward and backward.

The schedule of tile pairs (`attention_plan.schedule`) is prefetched into scalar memory. The grid is
(key heads, visits); the number of visits depends on the intervals, so skipped pairs cost nothing,
and only boundary pairs compute a mask.

Logits are computed transposed, keys x queries. So each value of a query (its intervals, the running
maximum and sum) is one row of lanes, and a maximum over keys is elementwise over vectors. Exponents
are base 2, as in the hardware.

Backward: one kernel by query tile for the gradient of the queries, one by key tile for those of
keys and values. Each result has one writer, so a step is bitwise reproducible.

Sizes as in `attention_chunked`: i tiles of queries of n rows, j tiles of m keys.
"""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Float, Float32

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
    per_query,
    schedule,
    sees,
    tile_classes,
    tile_size,
)
from geode_jax.shapes import Array
from geode_jax.sharding import platform

ROWS, KEYS = 1024, 512
"""Most rows of a query tile (all query heads of a key head together), and most keys of a tile."""

LANES = 128
"""Tiles are multiples of the vector registers' lanes."""

VMEM_BYTES = 32 * 2**20
"""Vector memory that a kernel may use: a core of v5e and v6e has 128 MiB, of v5p 64 MiB."""

LOG2_E = math.log2(math.e)


class _Plan:
    """Sizes and classes of the tiles; the arguments are those of `forward`."""

    def __init__(self, q: Array, k: Array, intervals: Intervals):
        self.B, self.L, self.H, self.E = q.shape
        self.M, self.G = k.shape[1:3]
        share = self.H // self.G
        most = max(LANES, ROWS // share // LANES * LANES)
        self.block_q = tile_size(self.L, most, LANES)
        self.block_k = tile_size(self.M, KEYS, LANES)
        self.i, self.j = -(-self.L // self.block_q), -(-self.M // self.block_k)
        self.n = share * self.block_q
        intervals = per_query(intervals, (self.B, self.L), self.M)
        rows = jnp.stack(by_tile(intervals, self.block_q), axis=2)
        self.rows = jnp.tile(rows, (1, 1, 1, share))  # [B, i, 3, n]
        self.classes = tile_classes(intervals, self.M, self.block_q, self.block_k)

    def specs(self, by_query: bool) -> dict[str, pl.BlockSpec]:
        """Returns the blocks of a visit, by kind of array."""
        rows = self.i if by_query else self.j

        def at(query: bool, head: bool):
            """Returns an index map of [B, G, tiles, ...], or [B, tiles, ...] without `head`."""

            def index(g, step, row, column, how):
                b, own = row[step] // rows, row[step] % rows
                tile = own if query == by_query else column[step]
                return (b, g, tile, 0, 0) if head else (b, tile, 0, 0)

            return index

        def block(query: bool, *shape: int, head: bool = True):
            return pl.BlockSpec((None,) * (2 + head) + shape, at(query, head))

        n, m, E = self.n, self.block_k, self.E
        return {
            "query": block(True, n, E),
            "query transposed": block(True, E, n),
            "of a query": block(True, 1, n),
            "intervals": block(True, 3, n, head=False),
            "key": block(False, m, E),
        }

    def call(
        self,
        name: str,
        kernel: Callable,
        visits: Schedule,
        by_query: bool,
        inputs: Sequence[tuple[str, Array]],
        outputs: list[tuple[str, jax.ShapeDtypeStruct]],
        scratch: list,
        products: int,
    ):
        """Runs a kernel over its visits.

        Args:
            name: of the kernel in compiled programs.
            kernel: called with references to the schedule, the inputs, the outputs, the scratch.
            visits: by query tile if `by_query`, else by key tile.
            by_query: see `visits`.
            inputs, outputs: pairs of a kind (a key of `specs`) and an array or a shape.
            scratch: buffers that are kept during a row of visits.
            products: matrix products of a pair, without those that repeat the forward pass.
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
            # The cost of a dense computation: no pair skipped, nothing recomputed.
            cost_estimate=pl.CostEstimate(
                flops=2 * products * pairs * self.E,
                transcendentals=pairs,
                bytes_accessed=sum(x.size * x.dtype.itemsize for x in arrays),
            ),
            interpret=platform() != "tpu",  # Pallas' interpreter, for tests
            name=name,
        )(visits.row, visits.column, visits.how, *arrays)


def _dot(a, b, contract: tuple[int, int]) -> jax.Array:
    """Returns the product over one axis of each operand, accumulated in float32."""
    return jax.lax.dot_general(
        a, b, (((contract[0],), (contract[1],)), ((), ())), preferred_element_type=jnp.float32
    )


def _scores(q, k, rows, key_tile, masked: bool) -> jax.Array:
    """Returns logits [m, n] in base 2; hidden keys are at MASKED."""
    s = _dot(k, q, (1, 1)) * (q.shape[1] ** -0.5 * LOG2_E)
    if not masked:
        return s
    key = key_tile * k.shape[0] + jax.lax.broadcasted_iota(jnp.int32, s.shape, 0)
    return jnp.where(sees(key, *(rows[i : i + 1] for i in range(3))), s, MASKED)


def _visit(how, step, begin: Callable, compute: Callable, finish: Callable) -> None:
    """Runs the parts of a visit that its bits of `Schedule.how` name; compute takes `masked`."""
    bits = how[step]
    pl.when(bits & FIRST != 0)(begin)
    pl.when(bits & WITH_MASK != 0)(lambda: compute(True))
    pl.when(bits & WITHOUT_MASK != 0)(lambda: compute(False))
    pl.when(bits & LAST != 0)(finish)


# --- Forward --------------------------------------------------------------------------------------


def forward(
    q_BLHE: Float[jax.Array, "B L H E"],
    k_BMGE: Float[jax.Array, "B M G E"],
    v_BMGE: Float[jax.Array, "B M G E"],
    intervals: Intervals,
) -> tuple[Float[jax.Array, "B L H E"], Float32[jax.Array, "B G i 1 n"]]:
    """Returns the output [B, L, H, E] and log2 of each query's sum, float32 [B, G, i, 1, n].

    Args:
        q_BLHE, k_BMGE, v_BMGE, intervals: as in `attention.attention`.
    """
    p = _Plan(q_BLHE, k_BMGE, intervals)
    tiles, f32 = (p.B, p.G, p.i), jnp.float32
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
            ("query transposed", jax.ShapeDtypeStruct((*tiles, p.E, p.n), q_BLHE.dtype)),
            ("of a query", jax.ShapeDtypeStruct((*tiles, 1, p.n), f32)),
        ],
        [pltpu.VMEM((1, p.n), f32), pltpu.VMEM((1, p.n), f32), pltpu.VMEM((p.E, p.n), f32)],
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
        # Before the first visible key, MASKED - 0 gives weights of 0; MASKED - MASKED would give 1.
        weights = jnp.exp2(s - (jnp.where(new > MASKED, new, 0.0) if masked else new))
        decay = jnp.exp2(old - new)
        peak[...] = new
        total[...] = total[...] * decay + jnp.sum(weights, axis=0, keepdims=True)
        sums[...] = sums[...] * decay + _dot(v[...], weights.astype(v.dtype), (0, 0))

    def finish():
        seeing = total[...] > 0
        count = jnp.where(seeing, total[...], 1.0)
        out[...] = (sums[...] / count).astype(out.dtype)
        lse[...] = jnp.where(seeing, peak[...] + jnp.log2(count), 0.0)

    _visit(how, step, begin, compute, finish)


# --- Backward -------------------------------------------------------------------------------------


def backward(
    q_BLHE: Float[jax.Array, "B L H E"],
    k_BMGE: Float[jax.Array, "B M G E"],
    v_BMGE: Float[jax.Array, "B M G E"],
    intervals: Intervals,
    out_BLHE: Float[jax.Array, "B L H E"],
    lse: Float32[jax.Array, "B G i 1 n"],
    g_BLHE: Float[jax.Array, "B L H E"],
) -> tuple[Float[jax.Array, "B L H E"], Float[jax.Array, "B M G E"], Float[jax.Array, "B M G E"]]:
    """Returns the gradients of q, k and v; see `attention_chunked.backward`."""
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
        [("query transposed", jax.ShapeDtypeStruct((p.B, p.G, p.i, p.E, p.n), q_BLHE.dtype))],
        [pltpu.VMEM((p.E, p.n), jnp.float32)],
        products=2,
    )
    keys = jax.ShapeDtypeStruct((p.B, p.G, p.j, p.block_k, p.E), k_BMGE.dtype)
    dk, dv = p.call(
        "attention_backward_keys",
        functools.partial(_keys_kernel, p.j),
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
    """Returns the weights and the gradient of the logits of a pair of tiles, float32 [m, n]."""
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
