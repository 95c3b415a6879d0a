"""Attention by tiles as Mosaic GPU kernels for Hopper, forward and backward.

Two warpgroups each compute 64 rows of a tile of 128; a third prefetches the tiles of the other side
into a ring of buffers in shared memory. Each row of tiles visits its interior tiles first, in a
loop without a mask, then its boundary tiles in a loop with one.

`online_softmax` and `weights_and_slopes` hold the arithmetic of one pair of tiles, which the
kernels and the tests' simulator share; newer JAX interprets whole kernels, barriers and copies
included. The kernels have never run on a GPU, so they are off by default (`gpu.use_kernels`).

Sizes beside those of `shapes`: n queries and m keys in a warpgroup's part of a pair of tiles.
"""

import functools
import inspect
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Float, Float32, Int

from geode_jax.ops.attention_plan import (
    INTERIOR,
    MASKED,
    SKIP,
    Intervals,
    by_tile,
    per_query,
    sees,
    tile_classes,
    visible,
)
from geode_jax.shapes import Array

TILE, PART, WARPGROUPS = 128, 64, 2
"""Rows of a tile, and of a warpgroup's part of it: Hopper's matrix instruction has 64."""

PARTS = 16
"""Most parts into which the keys of a single query are split."""

STAGES = 2
"""Tiles in shared memory at a time: with head width 128 they take 2 x 64 KiB of 227."""

WIDTHS, DTYPES = (64, 128), ("bfloat16", "float16")

LOG2_E = math.log2(math.e)


# --- The arithmetic of a pair of tiles ------------------------------------------------------------


def hide(
    s: Float[Array, "*pair"], key: Int[Array, "*pair"], rows: Intervals, axis: int
) -> Float[jax.Array, "*pair"]:
    """Returns the logits with those of hidden keys at MASKED.

    Args:
        s: logits [n, m] or [m, n].
        key: int32 like s, the number of each logit's key.
        rows: the queries' intervals, [n] each.
        axis: the axis of s along which queries lie.
    """
    rows = Intervals(*(jax.lax.broadcast_in_dim(x, s.shape, [axis]) for x in rows))
    return jnp.where(sees(key, *rows), s, MASKED)


def online_softmax(
    s: Float[Array, "n m"], peak: Float[Array, " n"], total: Float[Array, " n"]
) -> tuple[Float[Array, "n m"], Float[Array, " n"], Float[Array, " n"], Float[Array, " n"]]:
    """Adds a tile of keys to the running softmax, with exponents base 2.

    Args:
        s: logits [n, m]; hidden keys at MASKED.
        peak, total: [n], the largest logit so far (MASKED before the first) and the sum so far.

    Returns:
        Weights [n, m] relative to the new peak, the factor [n] of older sums, peak and total.
    """
    new = jnp.maximum(peak, jnp.max(s, axis=1))
    # Before the first visible key, MASKED - 0 gives weights of 0; MASKED - MASKED would give 1.
    level = jnp.where(new > MASKED, new, jnp.zeros_like(new))
    weights = jnp.exp2(s - jax.lax.broadcast_in_dim(level, s.shape, [0]))
    decay = jnp.exp2(peak - new)
    return weights, decay, new, total * decay + jnp.sum(weights, axis=1)


def finish(
    out: Float[Array, "n E"], peak: Float[Array, " n"], total: Float[Array, " n"]
) -> tuple[Float[Array, "n E"], Float[Array, " n"]]:
    """Returns the output [n, E] and log2 of each query's sum; both are 0 if it sees no key."""
    seeing = total > 0
    count = jnp.where(seeing, total, jnp.ones_like(total))
    lse = jnp.where(seeing, peak + jnp.log(count) * LOG2_E, jnp.zeros_like(peak))
    return out / jax.lax.broadcast_in_dim(count, out.shape, [0]), lse


def weights_and_slopes(
    s: Float[Array, "*pair"],
    slope_of_weights: Float[Array, "*pair"],
    lse: Float[Array, " n"],
    delta: Float[Array, " n"],
    axis: int,
) -> tuple[Float[Array, "*pair"], Float[Array, "*pair"]]:
    """Returns the weights and the gradient of the scaled logits, like s; queries along `axis`."""
    lse, delta = (jax.lax.broadcast_in_dim(x, s.shape, [axis]) for x in (lse, delta))
    weights = jnp.exp2(s - lse)
    return weights, weights * (slope_of_weights - delta)


# --- The visits -----------------------------------------------------------------------------------


class Visits(NamedTuple):
    """The columns that each row of tiles visits.

    Attributes:
        column: int32 [B * rows * columns], of each row the interior columns, then the boundary
            columns; the rest is undefined.
        interior: int32 [B * rows], the number of interior columns.
        some: int32 [B * rows], the number of interior and boundary columns.
    """

    column: jax.Array
    interior: jax.Array
    some: jax.Array


def visits(classes: Int[Array, "B rows columns"]) -> Visits:
    """Returns the visits for classes [B, rows, columns] of `tile_classes`, or its transpose."""
    rank = jnp.where(classes == INTERIOR, 0, jnp.where(classes == SKIP, 2, 1))
    column = jnp.argsort(rank, axis=2, stable=True).astype(jnp.int32)
    return Visits(
        column.reshape(-1),
        jnp.sum(rank == 0, axis=2, dtype=jnp.int32).reshape(-1),
        jnp.sum(rank < 2, axis=2, dtype=jnp.int32).reshape(-1),
    )


def supports(width: int, dtype) -> bool:
    """Returns whether the kernels support this head width and dtype of activations."""
    return width in WIDTHS and jnp.dtype(dtype).name in DTYPES


def _pad(x: Array, axis: int = 1) -> jax.Array:
    """Pads an axis with zeros to whole tiles."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % TILE)
    return jnp.pad(x, widths)


def _rows(q: Array, k: Array, intervals: Intervals) -> tuple[Intervals, jax.Array]:
    """Returns intervals [B, padded L], and the classes of all pairs of tiles."""
    B, L = q.shape[:2]
    intervals = per_query(intervals, (B, L), k.shape[1])
    rows = (x.reshape(B, -1) for x in by_tile(intervals, TILE))
    return Intervals(*rows), tile_classes(intervals, k.shape[1], TILE, TILE)


# --- Kernels --------------------------------------------------------------------------------------


def _kernel(body, name: str, out_type, grid: tuple[int, int, int], scratch: list):
    """Builds a kernel of two computing and one fetching warpgroup on a grid (heads, tiles, B)."""
    return plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=scratch,
        grid=grid,
        grid_names=("head", "tile", "batch"),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
    )


def _buffer(dtype, *shape: int):
    """Returns shared memory for tiles [..., rows, E] in the layout of the matrix instruction."""
    transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def _full(*, arrivals: int = 1, number: int = STAGES):
    return plgpu.Barrier(num_arrivals=arrivals, num_barriers=number)


# Exported, but not in the module's `__all__` for type checkers.
_ACC = plgpu.ACC  # pyright: ignore[reportPrivateImportUsage]


def _matmul(shape: tuple[int, int], a, b):
    """Returns a @ b in float32; b is in shared memory, a in shared memory or registers."""

    def multiply(acc):
        plgpu.wgmma(acc, a, b)
        return acc[...]

    return pl.run_scoped(multiply, _ACC(shape, jnp.float32))


def matmul_add(sums, a, b):
    """Returns sums + a @ b."""
    return pl.run_state(lambda acc: plgpu.wgmma(acc, a, b))(_ACC.init(sums))


def _transposed(ref):
    return ref.transpose((1, 0))


WHOLE = ((),) if "idx" in inspect.signature(plgpu.load).parameters else ()
"""The index that `plgpu.load` requires beside the reference up to jax 0.10."""


def _vector(ref, index, axis: int):
    """Loads a value for each row (axis 0) or column (axis 1) of a product from global memory."""
    layout = plgpu.Layout.WGMMA.reduce(1 - axis)
    return plgpu.load(ref.at[index], *WHOLE, layout=layout, optimized=False)


def _iota(shape: tuple[int, int], axis: int):
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)


def _constant(value: float, *shape: int):
    layout = plgpu.Layout.WGMMA if len(shape) == 2 else plgpu.Layout.WGMMA.reduce(1)
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def _fetch(steps, source, rings) -> None:
    """Runs the third warpgroup: fills each ring's next buffer once both others have released it.

    Args:
        steps: number of steps.
        source: step -> index of the tile in the arrays.
        rings: (array, buffers [STAGES, ...], barriers "full", barriers "free") each.
    """
    plgpu.set_max_registers(40, action="decrease")

    @pl.loop(0, steps)
    def _(step):
        slot = jax.lax.rem(step, jnp.int32(STAGES))
        for array, buffers, full, free in rings:

            @pl.when(step >= STAGES)
            def _(free=free):
                plgpu.barrier_wait(free.at[slot])

            plgpu.copy_gmem_to_smem(array.at[source(step)], buffers.at[slot], full.at[slot])


def _fetch_keys(visit, some, column, head, share, rings) -> None:
    """Prefetches the key tiles of a query tile; see `_fetch`.

    Args:
        visit: row of the batch, row of tiles, index of its first column.
        some, column: see `Visits`.
        head: query head; `share` of them share a key head.
        rings: as in `_fetch`.
    """
    batch, at, first = visit

    def source(step):
        keys = pl.ds(column[first + step] * TILE, TILE)
        return batch, keys, jax.lax.div(head, jnp.int32(share))

    _fetch(some[at], source, rings)


def _over_pairs(pair, interior, some, carry):
    """Runs pair(step, carry, masked) over the interior pairs of tiles, then the boundary pairs."""
    plain, masked = (functools.partial(pair, masked=m) for m in (False, True))
    carry = jax.lax.fori_loop(0, interior, plain, carry)
    return jax.lax.fori_loop(interior, some, masked, carry)


def _place():
    """Returns this program's head, tile, row of the batch and warpgroup."""
    return tuple(jax.lax.axis_index(name) for name in ("head", "tile", "batch", "warpgroup"))


def forward(
    q_BLHE: Float[Array, "B L H E"],
    k_BMGE: Float[Array, "B M G E"],
    v_BMGE: Float[Array, "B M G E"],
    intervals: Intervals,
) -> tuple[Float[jax.Array, "B L H E"], Float32[jax.Array, "B H _"]]:
    """Returns the output [B, L, H, E] and log2 of each query's sum, float32 [B, H, padded L].

    Args:
        q_BLHE, k_BMGE, v_BMGE, intervals: as in `attention.attention`; width and dtype must satisfy
            `supports`.
    """
    rows, classes = _rows(q_BLHE, k_BMGE, intervals)
    q, k, v = (_pad(x) for x in (q_BLHE, k_BMGE, v_BMGE))
    L, M = q_BLHE.shape[1], k_BMGE.shape[1]
    if L == 1:
        return _in_parts(q_BLHE, k, v, rows, classes, visible(intervals, M))
    out, lse = forward_tiles(q, k, v, rows, classes)
    return out[:, :L], lse


def _in_parts(
    q_BLHE: Array, k: Array, v: Array, rows: Intervals, classes: Array, visible_B1M: Array
) -> tuple[jax.Array, jax.Array]:
    """Computes `forward` for one query a row, with the keys split into parts (split-K).

    One program per head and row would leave most of a GPU idle. So the heads that share a key head
    form the queries of a tile, and several programs each take some tiles of keys. Their softmaxes
    are combined at the end.
    """
    B, _, H, E = q_BLHE.shape
    G, columns = k.shape[2], classes.shape[2]
    share, parts = H // G, min(PARTS, columns)
    own = jnp.arange(columns) * parts // columns == jnp.arange(parts)[:, None]  # [parts, columns]
    q = _pad(q_BLHE.reshape(B, G, share, E).swapaxes(1, 2))
    out, lse = forward_tiles(
        jnp.tile(q, (1, parts, 1, 1)),
        k,
        v,
        Intervals(*(jnp.tile(x, (1, parts)) for x in rows)),
        jnp.where(own, classes, SKIP),
    )
    out = out.reshape(B, parts, TILE, G, E)[:, :, :share]
    seen = _pad(visible_B1M, axis=2).reshape(B, 1, columns, TILE).any(3)
    seeing = jnp.any(own & seen, axis=2)[:, None, :, None]  # [B, 1, parts, 1]
    lse = jnp.where(seeing, lse.reshape(B, G, parts, TILE)[..., :share], -jnp.inf)
    peak = jnp.max(lse, axis=2, keepdims=True)
    peak = jnp.where(peak > -jnp.inf, peak, 0.0)
    weights = jnp.exp2(lse - peak)
    total = jnp.sum(weights, axis=2)  # [B, G, share]
    count = jnp.where(total > 0, total, 1.0)
    out = jnp.einsum("bgps,bpsge->bgse", weights, out.astype(jnp.float32)) / count[..., None]
    lse = (peak[:, :, 0] + jnp.log2(count)).reshape(B, H, 1)
    return out.reshape(B, 1, H, E).astype(q_BLHE.dtype), _pad(lse, axis=2)


def forward_tiles(
    q: Float[Array, "B L H E"],
    k: Float[Array, "B M G E"],
    v: Float[Array, "B M G E"],
    rows: Intervals,
    classes: Int[Array, "B rows columns"],
) -> tuple[Float[jax.Array, "B L H E"], Float[jax.Array, "B H L"]]:
    """Computes `forward` for whole tiles of queries and keys with the classes of their pairs."""
    B, padded, H, E = q.shape
    tiles = _buffer(q.dtype, STAGES, TILE, E)
    out, lse = _kernel(
        functools.partial(_forward_kernel, H // k.shape[2], classes.shape[1:]),
        "attention_forward",
        [
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((B, H, padded), jnp.float32),
        ],
        (H, padded // TILE, B),
        [
            _buffer(q.dtype, WARPGROUPS, PART, E),
            plgpu.SMEM((WARPGROUPS, PART), jnp.float32),
            tiles,
            tiles,
            _full(number=WARPGROUPS),
            _full(),
            _full(),
            _full(arrivals=WARPGROUPS),
            _full(arrivals=WARPGROUPS),
        ],
    )(q, k, v, *rows, *visits(classes))
    return out, lse


def _forward_kernel(
    share, shape, q, k, v, prefix, start, end, column, interior, some, out, lse,
    q_buffer, lse_buffer, k_ring, v_ring, q_full, k_full, v_full, k_free, v_free,
):  # fmt: skip
    head, tile, batch, warpgroup = _place()
    at = batch * shape[0] + tile
    E = q_buffer.shape[-1]

    @pl.when(warpgroup == WARPGROUPS)
    def _():
        rings = [(k, k_ring, k_full, k_free), (v, v_ring, v_full, v_free)]
        _fetch_keys((batch, at, at * shape[1]), some, column, head, share, rings)

    @pl.when(warpgroup < WARPGROUPS)
    def _():
        plgpu.set_max_registers(232, action="increase")
        own = pl.ds(tile * TILE + warpgroup * PART, PART)
        mine = q_buffer.at[warpgroup]
        plgpu.copy_gmem_to_smem(q.at[batch, own, head], mine, q_full.at[warpgroup])
        rows = Intervals(*(_vector(x, (batch, own), 0) for x in (prefix, start, end)))
        plgpu.barrier_wait(q_full.at[warpgroup])

        def pair(step, carry, masked: bool):
            sums, peak, total = carry
            slot = jax.lax.rem(step, jnp.int32(STAGES))
            plgpu.barrier_wait(k_full.at[slot])
            s = _matmul((PART, TILE), mine, _transposed(k_ring.at[slot])) * (E**-0.5 * LOG2_E)
            plgpu.barrier_arrive(k_free.at[slot])
            if masked:
                key = _iota(s.shape, 1) + column[at * shape[1] + step] * TILE
                s = hide(s, key, rows, 0)
            weights, decay, peak, total = online_softmax(s, peak, total)
            sums = sums * jax.lax.broadcast_in_dim(decay, sums.shape, [0])
            plgpu.barrier_wait(v_full.at[slot])
            sums = matmul_add(sums, weights.astype(v.dtype), v_ring.at[slot])
            plgpu.barrier_arrive(v_free.at[slot])
            return sums, peak, total

        carry = _constant(0.0, PART, E), _constant(MASKED, PART), _constant(0.0, PART)
        result, sums = finish(*_over_pairs(pair, interior[at], some[at], carry))
        mine[...] = result.astype(out.dtype)
        lse_buffer[warpgroup] = sums
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(mine, out.at[batch, own, head])
        plgpu.copy_smem_to_gmem(lse_buffer.at[warpgroup], lse.at[batch, head, own])
        plgpu.wait_smem_to_gmem(0)


def backward(
    q_BLHE: Float[Array, "B L H E"],
    k_BMGE: Float[Array, "B M G E"],
    v_BMGE: Float[Array, "B M G E"],
    intervals: Intervals,
    out_BLHE: Float[Array, "B L H E"],
    lse: Float32[Array, "B H _"],
    g_BLHE: Float[Array, "B L H E"],
) -> tuple[Float[jax.Array, "B L H E"], Float[jax.Array, "B M G E"], Float[jax.Array, "B M G E"]]:
    """Returns the gradients of q, k and v; see `attention_chunked.backward`."""
    L, M = q_BLHE.shape[1], k_BMGE.shape[1]
    rows, classes = _rows(q_BLHE, k_BMGE, intervals)
    delta = jnp.sum(g_BLHE.astype(jnp.float32) * out_BLHE.astype(jnp.float32), axis=-1)
    delta = _pad(delta.swapaxes(1, 2), axis=2)  # [B, H, padded L]
    q, k, v, g = (_pad(x) for x in (q_BLHE, k_BMGE, v_BMGE, g_BLHE))
    B, padded, H, E = q.shape
    keys, G = k.shape[1:3]
    inputs = (q, k, v, g, lse, delta, *rows)
    own, tiles = _buffer(q.dtype, WARPGROUPS, PART, E), _buffer(q.dtype, STAGES, TILE, E)
    barriers = [_full(number=WARPGROUPS)] * 2 + [_full()] * 2 + [_full(arrivals=WARPGROUPS)] * 2
    dq = _kernel(
        functools.partial(_queries_kernel, H // G, classes.shape[1:]),
        "attention_backward_queries",
        jax.ShapeDtypeStruct(q.shape, q.dtype),
        (H, padded // TILE, B),
        [own, own, tiles, tiles, *barriers],
    )(*inputs, *visits(classes))
    parts = _buffer(q.dtype, STAGES, PART, E)
    dk, dv = _kernel(
        functools.partial(_keys_kernel, H // G, classes.shape[:0:-1]),
        "attention_backward_keys",
        [jax.ShapeDtypeStruct(k.shape, k.dtype)] * 2,
        (G, keys // TILE, B),
        [own, own, parts, parts, *barriers],
    )(*inputs, *visits(classes.swapaxes(1, 2)))
    return dq[:, :L], dk[:, :M], dv[:, :M]


def _queries_kernel(
    share, shape, q, k, v, g, lse, delta, prefix, start, end, column, interior, some, dq,
    q_buffer, g_buffer, k_ring, v_ring, q_full, g_full, k_full, v_full, k_free, v_free,
):  # fmt: skip
    head, tile, batch, warpgroup = _place()
    at = batch * shape[0] + tile
    E = q_buffer.shape[-1]

    @pl.when(warpgroup == WARPGROUPS)
    def _():
        rings = [(k, k_ring, k_full, k_free), (v, v_ring, v_full, v_free)]
        _fetch_keys((batch, at, at * shape[1]), some, column, head, share, rings)

    @pl.when(warpgroup < WARPGROUPS)
    def _():
        plgpu.set_max_registers(232, action="increase")
        own = pl.ds(tile * TILE + warpgroup * PART, PART)
        my_q, my_g = q_buffer.at[warpgroup], g_buffer.at[warpgroup]
        plgpu.copy_gmem_to_smem(q.at[batch, own, head], my_q, q_full.at[warpgroup])
        plgpu.copy_gmem_to_smem(g.at[batch, own, head], my_g, g_full.at[warpgroup])
        rows = Intervals(*(_vector(x, (batch, own), 0) for x in (prefix, start, end)))
        my_lse, my_delta = (_vector(x, (batch, head, own), 0) for x in (lse, delta))
        plgpu.barrier_wait(q_full.at[warpgroup])
        plgpu.barrier_wait(g_full.at[warpgroup])

        def pair(step, sums, masked: bool):
            slot = jax.lax.rem(step, jnp.int32(STAGES))
            plgpu.barrier_wait(k_full.at[slot])
            s = _matmul((PART, TILE), my_q, _transposed(k_ring.at[slot])) * (E**-0.5 * LOG2_E)
            if masked:
                key = _iota(s.shape, 1) + column[at * shape[1] + step] * TILE
                s = hide(s, key, rows, 0)
            plgpu.barrier_wait(v_full.at[slot])
            of_weights = _matmul((PART, TILE), my_g, _transposed(v_ring.at[slot]))
            plgpu.barrier_arrive(v_free.at[slot])
            _, slopes = weights_and_slopes(s, of_weights, my_lse, my_delta, 0)
            sums = matmul_add(sums, slopes.astype(k.dtype), k_ring.at[slot])
            plgpu.barrier_arrive(k_free.at[slot])
            return sums

        sums = _over_pairs(pair, interior[at], some[at], _constant(0.0, PART, E))
        my_q[...] = (sums * E**-0.5).astype(dq.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(my_q, dq.at[batch, own, head])
        plgpu.wait_smem_to_gmem(0)


def _keys_kernel(
    share, shape, q, k, v, g, lse, delta, prefix, start, end, column, interior, some, dk, dv,
    k_buffer, v_buffer, q_ring, g_ring, k_full, v_full, q_full, g_full, q_free, g_free,
):  # fmt: skip
    """Computes products keys x queries; a step is one part of a query tile and one head."""
    kv_head, tile, batch, warpgroup = _place()
    at = batch * shape[0] + tile
    E = k_buffer.shape[-1]
    parts = TILE // PART
    each = share * parts

    def place(step):
        """Returns the queries and the query head of a step."""
        first = column[at * shape[1] + jax.lax.div(step, jnp.int32(each))] * TILE
        rest = jax.lax.rem(step, jnp.int32(each))
        head = kv_head * share + jax.lax.div(rest, jnp.int32(parts))
        return pl.ds(first + jax.lax.rem(rest, jnp.int32(parts)) * PART, PART), head

    @pl.when(warpgroup == WARPGROUPS)
    def _():
        def source(step):
            queries, head = place(step)
            return batch, queries, head

        rings = [(q, q_ring, q_full, q_free), (g, g_ring, g_full, g_free)]
        _fetch(some[at] * each, source, rings)

    @pl.when(warpgroup < WARPGROUPS)
    def _():
        plgpu.set_max_registers(232, action="increase")
        first_key = tile * TILE + warpgroup * PART
        own = pl.ds(first_key, PART)
        my_k, my_v = k_buffer.at[warpgroup], v_buffer.at[warpgroup]
        plgpu.copy_gmem_to_smem(k.at[batch, own, kv_head], my_k, k_full.at[warpgroup])
        plgpu.copy_gmem_to_smem(v.at[batch, own, kv_head], my_v, v_full.at[warpgroup])
        plgpu.barrier_wait(k_full.at[warpgroup])
        plgpu.barrier_wait(v_full.at[warpgroup])

        def pair(step, carry, masked: bool):
            sum_k, sum_v = carry
            queries, head = place(step)
            slot = jax.lax.rem(step, jnp.int32(STAGES))
            plgpu.barrier_wait(q_full.at[slot])
            s = _matmul((PART, PART), my_k, _transposed(q_ring.at[slot])) * (E**-0.5 * LOG2_E)
            if masked:
                rows = (_vector(x, (batch, queries), 1) for x in (prefix, start, end))
                s = hide(s, _iota(s.shape, 0) + first_key, Intervals(*rows), 1)
            plgpu.barrier_wait(g_full.at[slot])
            of_weights = _matmul((PART, PART), my_v, _transposed(g_ring.at[slot]))
            own_lse, own_delta = (_vector(x, (batch, head, queries), 1) for x in (lse, delta))
            weights, slopes = weights_and_slopes(s, of_weights, own_lse, own_delta, 1)
            sum_v = matmul_add(sum_v, weights.astype(g.dtype), g_ring.at[slot])
            plgpu.barrier_arrive(g_free.at[slot])
            sum_k = matmul_add(sum_k, slopes.astype(q.dtype), q_ring.at[slot])
            plgpu.barrier_arrive(q_free.at[slot])
            return sum_k, sum_v

        zero = _constant(0.0, PART, E)
        sums = _over_pairs(pair, interior[at] * each, some[at] * each, (zero, zero))
        my_k[...] = (sums[0] * E**-0.5).astype(dk.dtype)
        my_v[...] = sums[1].astype(dv.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(my_k, dk.at[batch, own, kv_head])
        plgpu.copy_smem_to_gmem(my_v, dv.at[batch, own, kv_head])
        plgpu.wait_smem_to_gmem(0)
