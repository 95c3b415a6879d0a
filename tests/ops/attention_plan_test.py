"""The tile plan against the dense mask."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geode_jax.ops import attention_plan as plan
from geode_jax.ops.attention_plan import Intervals, causal, visible

B, L, M = 2, 11, 13
column = st.integers(-2, M + 2)
rows = st.lists(st.tuples(column, column, column), min_size=B * L, max_size=B * L)
# Runs of equal queries, so that whole tiles are seen or not; few values, so that ends meet.
runs = st.lists(st.tuples(column, column, column), min_size=B * 3, max_size=B * 3).map(
    lambda few: [few[3 * b + min(2, i // 4)] for b in range(B) for i in range(L)]
)
blocks = st.sampled_from([(4, 4), (3, 5), (11, 13), (16, 2), (1, 1)])


def intervals_of(triples) -> Intervals:
    return Intervals(*np.array(triples, np.int32).reshape(B, L, 3).transpose(2, 0, 1))


@given(rows)
def test_canonical_intervals_show_the_same_keys_and_do_not_touch(triples):
    intervals = intervals_of(triples)
    canonical = plan.canonical(intervals, M)
    np.testing.assert_array_equal(visible(canonical, M), visible(intervals, M))
    prefix, start, end = (np.asarray(x) for x in canonical)
    own = end > start
    assert (start[own] > prefix[own]).all() and (end[own] <= M).all()
    assert (start[~own] == 0).all() and (end[~own] == 0).all()
    assert ((prefix >= 0) & (prefix <= M)).all()


@given(st.one_of(rows, runs), blocks)
@settings(max_examples=100)
def test_classes_are_those_of_the_dense_mask(triples, block):
    intervals = intervals_of(triples)
    classes = np.asarray(plan.tile_classes(intervals, M, *block))
    mask = np.asarray(visible(intervals, M))
    # Queries that pad are copies of the last; keys that pad are seen by nobody.
    block_q, block_k = block
    mask = np.pad(mask, ((0, 0), (0, -L % block_q), (0, 0)), mode="edge")
    mask = np.pad(mask, ((0, 0), (0, 0), (0, -M % block_k)))
    tiles = mask.reshape(B, -(-L // block_q), block_q, -(-M // block_k), block_k)
    some, every = tiles.any((2, 4)), tiles.all((2, 4))
    expected = np.where(every, plan.INTERIOR, np.where(some, plan.BOUNDARY, plan.SKIP))
    np.testing.assert_array_equal(classes, expected)


@given(st.one_of(rows, runs), blocks, st.booleans())
@settings(max_examples=100)
def test_a_schedule_visits_what_is_seen_row_after_row(triples, block, inverse):
    classes = np.asarray(plan.tile_classes(intervals_of(triples), M, *block))
    if inverse:
        classes = classes.swapaxes(1, 2)
    visits = jax.jit(plan.schedule)(classes)
    steps = int(visits.steps)
    row, column, how = (np.asarray(x)[:steps] for x in visits[:3])
    wanted = []
    for b, i in np.ndindex(*classes.shape[:2]):
        seen = np.flatnonzero(classes[b, i])
        for j in seen if len(seen) else [0]:
            bits = [0, plan.WITH_MASK, plan.WITHOUT_MASK][classes[b, i, j]]
            bits += plan.FIRST * (len(seen) == 0 or j == seen[0])
            bits += plan.LAST * (len(seen) == 0 or j == seen[-1])
            wanted.append((b * classes.shape[1] + i, j, bits))
    np.testing.assert_array_equal(np.stack([row, column, how], axis=1), wanted)


@pytest.mark.parametrize(
    ("length", "most", "size"),
    [(1374, 512, 512), (1025, 512, 384), (1024, 512, 512), (130, 512, 256), (100, 512, 128)],
)
def test_tiles_pad_as_little_as_their_number_allows(length, most, size):
    assert plan.tile_size(length, most, 128) == size


def test_work_of_a_causal_row():
    w = plan.work(causal(1, 1024), 1024, 256, 128)
    assert w.useful == 1024 * 1025 // 2
    # Of 8 key tiles the i-th of 4 query tiles sees 2 i + 2, the last two of them in part.
    assert (w.tiles, w.skipped, w.boundary) == (32, 12, 8)
    assert w.issued == 20 * 256 * 128


def test_what_the_papers_sequences_ask_of_tiles(capsys):
    plan.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 2 * len(plan.papers_sequences())
    for line in lines[1:]:
        useful = float(line.split()[-3].rstrip("%"))
        assert 0 < useful <= 100, line
    intervals, keys = plan.papers_sequences()["student, questions packed in rows of 1,024"]
    assert plan.work(intervals, keys, 512, 512).useful == np.asarray(visible(intervals, keys)).sum()
