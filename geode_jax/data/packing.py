"""Packing: the questions of a scene share a few short rows instead of one padded row each.

A question contributes two segments to its scene's M rows of R columns:

    [Q][A without its last token]   sees [V][T] and, causally, itself; its columns predict A
    [Q]                             its own copy, which never sees [V][T]: the task heads read it

Padding every question to the longest would compute three columns for each real one; the interval
mask of `ops.attention` keeps the segments of a row apart.
"""

from collections.abc import Iterable

import numpy as np


def pack(
    candidates: Iterable[int],
    question_length: np.ndarray,
    answer_length: np.ndarray,
    rows: int,
    columns: int,
    limit: int,
    *,
    in_order: bool = False,
) -> list[tuple[int, int, int]]:
    """Places questions first-fit.

    Args:
        candidates: indices of questions, in order of preference.
        question_length, answer_length: tokens of every question, > 0.
        rows, columns: M and R.
        limit: at most this many questions.
        in_order: stop at the first question that does not fit, instead of trying the next.

    Returns:
        (question, flat column of [Q][A], flat column of its copy) of every question placed.
    """
    used = np.zeros(rows, int)

    def place(length: int) -> int | None:
        fits = np.flatnonzero(used + length <= columns)
        if not len(fits):
            return None
        row = int(fits[0])
        used[row] += length
        return row * columns + int(used[row]) - length

    placed: list[tuple[int, int, int]] = []
    for question in candidates:
        if len(placed) == limit:
            break
        q, a = int(question_length[question]), int(answer_length[question])
        before = used.copy()
        text, copy = place(q + a - 1), place(q)
        if text is None or copy is None:
            used[:] = before
            if in_order:
                break
            continue
        placed.append((int(question), text, copy))
    return placed


def lay_out(
    placed: list[tuple[int, int, int]],
    question: np.ndarray,
    question_length: np.ndarray,
    answer: np.ndarray,
    answer_length: np.ndarray,
    rows: int,
    columns: int,
    slots: int,
    pad_id: int,
) -> dict[str, np.ndarray]:
    """The rows of a scene whose questions were placed by `pack`.

    Args:
        placed: of `pack`; the i-th fills question slot i.
        question: [n, Lq] ids, left-padded; `question_length` [n].
        answer: [n, La] ids, right-padded; `answer_length` [n].
        rows, columns: M and R.
        slots: Q.
        pad_id: fills what is left.

    Returns:
        `packed` [M, R] ids; `packed_position` [M, R] position in its segment; `packed_start` [M, R]
        first column of its segment (past itself for padding, which so sees nothing);
        `packed_prefix` [M, R] whether it sees [V][T]; `answer_column` [Q, La] flat column that
        predicts each answer token; `encoding_column` [Q] flat column of the copy's last token.
    """
    size = rows * columns
    tokens = np.full(size, pad_id, np.int32)
    position = np.zeros(size, np.int32)
    start = np.arange(size, dtype=np.int32) % columns + 1
    prefix = np.zeros(size, bool)
    answer_column = np.zeros((slots, answer.shape[1]), np.int32)
    encoding_column = np.zeros(slots, np.int32)
    for slot, (i, text, copy) in enumerate(placed):
        q, a = int(question_length[i]), int(answer_length[i])
        ids = question[i, question.shape[1] - q :]
        for first, segment, sees in (
            (text, np.concatenate([ids, answer[i, : a - 1]]), True),
            (copy, ids, False),
        ):
            own = slice(first, first + len(segment))
            tokens[own], prefix[own] = segment, sees
            position[own] = np.arange(len(segment))
            start[own] = first % columns
        answer_column[slot, :a] = text + q - 1 + np.arange(a)
        encoding_column[slot] = copy + q - 1
    shape = (rows, columns)
    return {
        "packed": tokens.reshape(shape),
        "packed_position": position.reshape(shape),
        "packed_start": start.reshape(shape),
        "packed_prefix": prefix.reshape(shape),
        "answer_column": answer_column,
        "encoding_column": encoding_column,
    }
