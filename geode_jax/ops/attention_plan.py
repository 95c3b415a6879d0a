"""The mask contract of `ops.attention` and what follows from it for tiles of queries and keys.

A kernel works on tiles: some queries against some keys. The plan says of every pair of tiles
whether no query sees any of the keys (it is skipped), all queries see all of them (interior: no
mask is needed) or neither (boundary), and lists the pairs that are left in the order in which a
kernel visits them: by query tile, or, for the gradients of keys and values, by key tile.

    python -m geode_jax.ops.attention_plan

prints, for the papers' sequences, which share of the FLOPs that tiles issue is of use.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

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


MASKED = -1e30
"""Logit of a hidden key. Finite, so that the difference of two is no NaN."""


def canonical(intervals: Intervals, keys: int) -> Intervals:
    """The same visible keys as two intervals that neither overlap nor touch, within [0, keys).

    An interval that holds nothing is [0, 0).
    """
    prefix, start, end = (jnp.clip(jnp.asarray(x, jnp.int32), 0, keys) for x in intervals)
    own = end > start
    joined = own & (start <= prefix)
    apart = own & ~joined
    return Intervals(
        jnp.where(joined, jnp.maximum(prefix, end), prefix),
        jnp.where(apart, start, 0),
        jnp.where(apart, end, 0),
    )


# --- Tiles ----------------------------------------------------------------------------------------

SKIP, BOUNDARY, INTERIOR = range(3)
"""Classes of a pair of tiles."""


def tile_size(length: int, most: int, multiple: int) -> int:
    """The size, a multiple of `multiple` and at most `most`, of tiles that pad a length least.

    Equal tiles: 1,374 queries are three of 512 or three of 458, which is rounded up.
    """
    count = -(-length // most)
    return -(-length // (count * multiple)) * multiple


def by_tile(intervals: Intervals, size: int) -> Intervals:
    """[B, L] -> [B, tiles, size]; queries that pad the last tile see what the last query sees."""

    def split(x):
        B, L = x.shape
        tiles = -(-L // size)
        return jnp.pad(x, ((0, 0), (0, tiles * size - L)), mode="edge").reshape(B, tiles, size)

    return Intervals(*(split(jnp.asarray(x)) for x in intervals))


def tile_classes(intervals: Intervals, keys: int, block_q: int, block_k: int) -> jax.Array:
    """The class of every pair of tiles, int32 [B, query tiles, key tiles].

    Args:
        intervals: [B, L] each.
        keys: M; keys beyond, which pad the last tile, are seen by nobody.
        block_q, block_k: queries and keys of a tile.
    """
    prefix, start, end = (
        x[..., None] for x in by_tile(canonical(intervals, keys), block_q)
    )  # [B, tiles, block_q, 1]
    first = jnp.arange(0, keys, block_k, dtype=jnp.int32)
    past = first + block_k
    some = (prefix > first) | ((start < past) & (end > first))
    every = (prefix >= past) | ((start <= first) & (end >= past))
    interior = jnp.where(jnp.all(every, axis=2), INTERIOR, BOUNDARY)
    return jnp.where(jnp.any(some, axis=2), interior, SKIP).astype(jnp.int32)


# How a kernel meets a pair of tiles: bits of `Schedule.how`.
WITH_MASK, WITHOUT_MASK, FIRST, LAST = 1, 2, 4, 8


class Schedule(NamedTuple):
    """The pairs of tiles that a kernel visits, those of one row of tiles after another.

    A row with nothing to compute is visited once, neither WITH_MASK nor WITHOUT_MASK: its result
    must be written too. Entries from `steps` on mean nothing.
    """

    row: jax.Array  # int32 [n], b * rows + row: whose result is accumulated
    column: jax.Array  # int32 [n], the other tile of the pair, of the same b
    how: jax.Array  # int32 [n], bits
    steps: jax.Array  # int32, how many


def schedule(classes: Array) -> Schedule:
    """The visits of a kernel that accumulates over the last axis.

    Args:
        classes: [B, rows, columns], of `tile_classes`; with its tile axes swapped for results of
            keys.
    """
    B, rows, columns = classes.shape
    classes = classes.reshape(B * rows, columns)
    seen = classes != SKIP
    none = ~jnp.any(seen, axis=1)
    visited = seen.at[:, 0].set(seen[:, 0] | none).reshape(-1)
    (index,) = jnp.nonzero(visited, size=visited.size, fill_value=0)
    index, steps = index.astype(jnp.int32), jnp.sum(visited, dtype=jnp.int32)
    row, column = index // columns, index % columns
    kind = classes.reshape(-1)[index]
    at = jnp.arange(index.size, dtype=jnp.int32)
    first = (at == 0) | (row != jnp.roll(row, 1))
    last = (at == steps - 1) | (row != jnp.roll(row, -1))
    how = jnp.where(kind == BOUNDARY, WITH_MASK, 0) + jnp.where(kind == INTERIOR, WITHOUT_MASK, 0)
    how = how + jnp.where(first, FIRST, 0) + jnp.where(last, LAST, 0)
    return Schedule(row, column, how.astype(jnp.int32), steps)


# --- FLOPs ----------------------------------------------------------------------------------------


_tile_classes = jax.jit(tile_classes, static_argnums=(1, 2, 3))


class Work(NamedTuple):
    """Query-key pairs, the FLOPs of one head's forward pass over 4 E: useful, and in tiles."""

    useful: int
    issued: int
    tiles: int
    boundary: int
    skipped: int


def work(intervals: Intervals, keys: int, block_q: int, block_k: int) -> Work:
    """What a kernel of such tiles computes, and what of it was asked for; on concrete arrays."""
    prefix, start, end = canonical(intervals, keys)
    classes = _tile_classes(intervals, keys, block_q, block_k)
    skipped = int(jnp.sum(classes == SKIP))
    return Work(
        useful=int(jnp.sum(prefix + end - start)),
        issued=(classes.size - skipped) * block_q * block_k,
        tiles=classes.size,
        boundary=int(jnp.sum(classes == BOUNDARY)),
        skipped=skipped,
    )


def _packed(prefix: int, thinking: int, questions: int, row: int, rows: int) -> Intervals:
    """Rows of question-answer segments of 32 to 96 tokens, a quarter of each the answer.

    A question sees the prefix's vision tokens, its answer the thinking tokens behind them too.
    """
    random = np.random.default_rng(0)
    length = random.integers(32, 97, questions)
    sees, start = np.zeros((rows, row), np.int32), np.full((rows, row), prefix + thinking)
    used = np.zeros(rows, int)
    for n in length:
        fits = np.flatnonzero(used + n <= row)
        if len(fits):
            r, at = fits[0], used[fits[0]]
            sees[r, at : at + n] = prefix
            sees[r, at + n - n // 4 : at + n] += thinking
            start[r, at : at + n] += at
            used[r] += n
    column = np.arange(row)[None] + prefix + thinking
    end = np.where(np.arange(row) < used[:, None], column + 1, 0)
    return Intervals(sees, start.astype(np.int32), end.astype(np.int32))


def papers_sequences() -> dict[str, tuple[Intervals, int]]:
    """Name -> intervals and number of keys of what the papers' systems attend over."""
    student = "student [V][T1..T8][Q][A], {} vision tokens"

    def full(queries: int, keys: int, seen: int) -> tuple[Intervals, int]:
        zero = jnp.zeros((1, queries), jnp.int32)
        return Intervals(zero, zero, zero + seen), keys

    def prefix_lm(vision: int, text: int) -> tuple[Intervals, int]:
        length = vision + 8 + text
        own = causal(1, length)
        return own._replace(prefix_end=own.prefix_end + vision), length

    return {
        student.format(1): (causal(1, 1 + 8 + 191), 200),
        student.format("2,048"): prefix_lm(2048, 184),
        "student, questions packed in rows of 1,024": (_packed(1, 8, 64, 1024, 4), 1033),
        "student, packed, 2,048 vision tokens": (_packed(2048, 8, 64, 1024, 4), 3080),
        "GEODE, questions packed in rows of 2,048": (_packed(2048, 16, 64, 2048, 2), 4112),
        "DRM cross-attention, 8 x 256 to 1,000 of 1,024 points": full(2048, 1024, 1000),
        "InternViT, 1,025 tokens": full(1025, 1025, 1025),
    }


def main() -> None:
    """Prints the table of the module's docstring."""
    print(f"{'sequence':56s} {'tile':>9s} {'useful':>8s} {'skipped':>8s} {'boundary':>8s}")
    for name, (intervals, keys) in papers_sequences().items():
        for most in (512, 128):
            size = tile_size(intervals.start.shape[1], most, 128), tile_size(keys, most, 128)
            w = work(intervals, keys, *size)
            share = [w.useful / w.issued, w.skipped / w.tiles, w.boundary / w.tiles]
            tile = "x".join(map(str, size))
            print(f"{name:56s} {tile:>9s}", *(f"{100 * x:7.1f}%" for x in share))


if __name__ == "__main__":
    main()
