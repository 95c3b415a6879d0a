"""Packed rows, checked column by column against their questions."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from geode_jax.data.packing import lay_out, pack

PAD, BOS = -7, -8
LQ, LA = 9, 6


@st.composite
def problems(draw):
    """Draws questions of a scene, and sizes of rows."""
    n = draw(st.integers(0, 8))
    lengths = [
        draw(st.lists(st.integers(least, most), min_size=n, max_size=n))
        for least, most in ((2, LQ), (1, LA))
    ]
    order = draw(st.permutations(range(n)))
    size = {"rows": draw(st.integers(1, 4)), "columns": draw(st.integers(1, 25))}
    return (
        np.array(lengths[0], int),
        np.array(lengths[1], int),
        order,
        size,
        draw(st.integers(1, 9)),
    )


def owners(placed, question_length, answer_length, size) -> np.ndarray:
    """Returns how many segments own each flat column; fails if a segment leaves its row."""
    count = np.zeros(size["rows"] * size["columns"], int)
    for i, first in placed:
        length = question_length[i] + answer_length[i] - 1
        assert first // size["columns"] == (first + length - 1) // size["columns"]
        assert first >= 0 and first + length <= count.size
        count[first : first + length] += 1
    return count


@given(problems())
def test_no_column_has_two_owners_and_no_question_two_places(problem):
    question_length, answer_length, order, size, limit = problem
    placed = pack(order, question_length, answer_length, **size, limit=limit)
    count = owners(placed, question_length, answer_length, size)
    assert count.max(initial=0) <= 1
    chosen = [i for i, _ in placed]
    assert len(set(chosen)) == len(chosen) <= limit
    # In the order of preference.
    positions = [order.index(i) for i in chosen]
    assert positions == sorted(positions)
    # First fit: a question that was skipped had no room at that time.
    for position, i in enumerate(order):
        if i in chosen or len([j for j in positions if j < position]) == limit:
            continue
        before = [p for p in placed if order.index(p[0]) < position]
        used = owners(before, question_length, answer_length, size).reshape(size["rows"], -1)
        free = size["columns"] - used.sum(1)
        assert free.max() < question_length[i] + answer_length[i] - 1


@given(problems())
def test_in_order_takes_a_beginning(problem):
    question_length, answer_length, order, size, limit = problem
    placed = pack(order, question_length, answer_length, **size, limit=limit, in_order=True)
    assert [i for i, _ in placed] == list(order[: len(placed)])
    assert len(placed) <= limit
    if order and question_length[order[0]] + answer_length[order[0]] - 1 <= size["columns"]:
        assert placed  # otherwise `eval_batches` would not end
    if len(placed) < min(limit, len(order)):  # the next one did not fit
        again = pack(order[: len(placed) + 1], question_length, answer_length, **size, limit=limit)
        assert again == placed


@given(problems(), st.integers(0, 3))
def test_rows_hold_the_questions_and_nothing_else(problem, spare):
    question_length, answer_length, order, size, limit = problem
    n, slots = len(order), limit + spare
    rows, columns = size["rows"], size["columns"]
    ids = np.arange(n * (LQ + LA)).reshape(n, LQ + LA)  # all tokens are different
    question, answer = ids[:, :LQ].copy(), ids[:, LQ:].copy()
    question[np.arange(LQ) < LQ - question_length[:, None]] = PAD
    answer[np.arange(LA) >= answer_length[:, None]] = PAD
    placed = pack(order, question_length, answer_length, **size, limit=limit)
    out = lay_out(
        placed, question, question_length, answer, answer_length, **size, slots=slots, pad_id=PAD
    )
    tokens, position, start, of_answer = (
        out[f"packed{name}_SWT"].reshape(-1) for name in ("", "_position", "_start", "_answer")
    )
    assert out["packed_SWT"].shape == (rows, columns)
    assert out["answer_column_SQA"].shape == (slots, LA) and out["encoding_column_SQ"].shape == (
        slots,
    )
    assert [out[name].dtype for name in sorted(out)] == [np.int32] * 3 + [bool] + [np.int32] * 2

    own = owners(placed, question_length, answer_length, size) == 1
    column = np.arange(rows * columns) % columns
    assert (tokens[~own] == PAD).all() and not of_answer[~own].any() and (position[~own] == 0).all()
    assert (start[~own] == column[~own] + 1).all()  # [start, column] is empty
    assert (tokens[own] != PAD).all() and (start[own] == (column - position)[own]).all()

    kept = []
    for slot, (i, first) in enumerate(placed):
        q, a = question_length[i], answer_length[i]
        asked, answered = question[i, LQ - q :], answer[i, :a]
        segment = slice(first, first + q + a - 1)
        assert position[segment].tolist() == list(range(q + a - 1))
        assert of_answer[segment].tolist() == [False] * (q - 1) + [True] * a
        predictors = out["answer_column_SQA"][slot]
        # The column before an answer token predicts it; the first is bos, the question's last.
        assert tokens[predictors[:a]].tolist() == [asked[-1], *answered[:-1]]
        assert predictors[0] == first + q - 1 and (predictors[a:] == 0).all()
        assert tokens[out["encoding_column_SQ"][slot]] == asked[-2]
        kept += [*asked, *answered[:-1]]
    assert sorted(tokens[own]) == sorted(kept)
    assert (out["answer_column_SQA"][len(placed) :] == 0).all()
    assert (out["encoding_column_SQ"][len(placed) :] == 0).all()


def test_a_scene_by_hand():
    question = np.array([[1, 2, BOS], [PAD, 3, BOS]])
    answer = np.array([[10, 11, 12], [20, PAD, PAD]])
    lengths = np.array([3, 2]), np.array([3, 1])
    placed = pack([0, 1], *lengths, rows=2, columns=6, limit=2)
    assert placed == [(0, 0), (1, 6)]
    out = lay_out(placed, question, lengths[0], answer, lengths[1], 2, 6, 3, PAD)
    assert out["packed_SWT"].tolist() == [[1, 2, BOS, 10, 11, PAD], [3, BOS, PAD, PAD, PAD, PAD]]
    assert out["packed_position_SWT"].tolist() == [[0, 1, 2, 3, 4, 0], [0, 1, 0, 0, 0, 0]]
    assert out["packed_start_SWT"].tolist() == [[0, 0, 0, 0, 0, 6], [0, 0, 3, 4, 5, 6]]
    assert out["packed_answer_SWT"].astype(int).tolist() == [[0, 0, 1, 1, 1, 0], [0, 1, 0, 0, 0, 0]]
    assert out["answer_column_SQA"].tolist() == [[2, 3, 4], [7, 0, 0], [0, 0, 0]]
    assert out["encoding_column_SQ"].tolist() == [1, 6, 0]
