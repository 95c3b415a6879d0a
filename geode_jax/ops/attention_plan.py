"""The mask contract of `ops.attention` and what follows from it for tiles of queries and keys.

A kernel works on pairs of tiles: some queries against some keys. A pair is skipped if no query sees
any of the keys, interior if all queries see all of them (no mask is needed), and boundary
otherwise. The schedule lists the pairs that are not skipped in the order in which a kernel visits
them: by query tile, or by key tile for the gradients of keys and values.

    python -m geode_jax.ops.attention_plan

prints which share of the tiles' FLOPs is useful for the papers' sequences.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int, Int32

from geode_jax.shapes import Array


class Intervals(NamedTuple):
    """Visible keys of each query: [0, prefix_end) and [start, end). All int32 [B, L]."""

    prefix_end: Array
    start: Array
    end: Array


def causal(
    batch: int,
    length: int,
    *,
    start: Int[Array, " {batch}"] | Int[Array, ""] | int = 0,
    prefix_end: int = 0,
) -> Intervals:
    """Returns causal intervals of `length` queries whose own keys begin at column `prefix_end`.

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


def sees(
    key: Int[Array, "*#axes"],
    prefix_end: Int[Array, "*#axes"],
    start: Int[Array, "*#axes"],
    end: Int[Array, "*#axes"],
) -> Bool[Array, "*#axes"]:
    """Returns the mask contract, elementwise: whether a query sees a key."""
    return (key < prefix_end) | ((key >= start) & (key < end))


def visible(intervals: Intervals, keys: int) -> Bool[Array, "B L {keys}"]:
    """Returns the contract as a dense mask, bool [B, L, keys]."""
    key = jnp.arange(keys, dtype=jnp.int32)
    return sees(key, *(jnp.asarray(x)[..., None] for x in intervals))


def per_query(intervals: Intervals, queries: tuple[int, int], keys: int) -> Intervals:
    """Returns intervals [B, L] within [0, keys), so that keys that pad a tile are hidden.

    Args:
        intervals: [B, L] or [B, 1] each.
        queries: (B, L).
        keys: M.
    """
    return Intervals(*(jnp.clip(jnp.broadcast_to(x, queries), 0, keys) for x in intervals))


MASKED = -1e30
"""Logit of a hidden key. It is finite, because the difference of two infinities is NaN."""


def canonical(intervals: Intervals, keys: int) -> Intervals:
    """Returns intervals of the same keys that neither overlap nor touch, within [0, keys).

    An empty interval is [0, 0).
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
    """Returns the size of equal tiles that cover a length with the least padding.

    For example, 1,374 queries in tiles of at most 512 are three tiles of 458, rounded up.

    Args:
        length: to cover.
        most: largest size of a tile.
        multiple: the size is a multiple of this.
    """
    count = -(-length // most)
    return -(-length // (count * multiple)) * multiple


def by_tile(intervals: Intervals, size: int) -> Intervals:
    """Returns [B, tiles, size] of [B, L]; padding queries see what the last query sees."""

    def split(x):
        B, L = x.shape
        tiles = -(-L // size)
        return jnp.pad(x, ((0, 0), (0, tiles * size - L)), mode="edge").reshape(B, tiles, size)

    return Intervals(*(split(jnp.asarray(x)) for x in intervals))


def tile_classes(
    intervals: Intervals, keys: int, block_q: int, block_k: int
) -> Int32[jax.Array, "B i j"]:
    """Returns the class of every pair of tiles, int32 [B, i query tiles, j key tiles].

    Args:
        intervals: [B, L] each.
        keys: M; no query sees the keys from M on, which pad the last tile.
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


# What a kernel does with a pair of tiles: bits of `Schedule.how`.
WITH_MASK, WITHOUT_MASK, FIRST, LAST = 1, 2, 4, 8


class Schedule(NamedTuple):
    """The pairs of tiles that a kernel visits, row of tiles by row of tiles.

    A row with nothing to compute is visited once, with neither WITH_MASK nor WITHOUT_MASK, to write
    its result. Entries from `steps` on are undefined.
    """

    row: jax.Array  # int32 [n], b * rows + row, of the result that is accumulated
    column: jax.Array  # int32 [n], the other tile of the pair, in the same b
    how: jax.Array  # int32 [n], bits
    steps: jax.Array  # int32, the number of visits


def schedule(classes: Int[Array, "B rows columns"]) -> Schedule:
    """Returns the visits of a kernel that accumulates over the last axis.

    Args:
        classes: [B, rows, columns] from `tile_classes`; with both tile axes swapped for results by
            key tile.
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
    """Query-key pairs (the FLOPs of one head's forward pass, divided by 4 E) and tiles.

    Attributes:
        useful: visible pairs.
        issued: pairs in the tiles that are computed.
        tiles, boundary, skipped: pairs of tiles: all, those with a mask, those not computed.
    """

    useful: int
    issued: int
    tiles: int
    boundary: int
    skipped: int


def work(intervals: Intervals, keys: int, block_q: int, block_k: int) -> Work:
    """Returns how much a kernel with such tiles computes; needs concrete arrays."""
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
    """Returns rows packed with segments of 32 to 96 tokens, of which the last quarter is an answer.

    A question sees the vision tokens of the prefix; its answer also sees the thinking tokens.
    """
    random = np.random.default_rng(0)
    length = random.integers(32, 97, questions)
    seen, start = np.zeros((rows, row), np.int32), np.full((rows, row), prefix + thinking)
    used = np.zeros(rows, int)
    for n in length:
        fits = np.flatnonzero(used + n <= row)
        if len(fits):
            r, at = fits[0], used[fits[0]]
            seen[r, at : at + n] = prefix
            seen[r, at + n - n // 4 : at + n] += thinking
            start[r, at : at + n] += at
            used[r] += n
    column = np.arange(row)[None] + prefix + thinking
    end = np.where(np.arange(row) < used[:, None], column + 1, 0)
    return Intervals(seen, start.astype(np.int32), end.astype(np.int32))


def papers_sequences() -> dict[str, tuple[Intervals, int]]:
    """Returns name -> (intervals, number of keys) of the attentions in the papers' systems."""
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
    """Prints the table that the module's docstring describes."""
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
