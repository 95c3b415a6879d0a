"""Packs the questions of a scene into a few shared rows instead of one padded row each.

A question and its answer form one segment, [prompt][bos][answer without its last token]. It attends
to the vision tokens and, causally, to itself. From bos on, which begins the answer, it also attends
to the thinking tokens. The task heads must not see these, so they read the columns of the prompt;
bos and answer columns predict the answer.

Padding every question to the longest would compute several columns for each real one. The interval
mask of `ops.attention` separates the segments of a row. Sizes are those of `geode_jax.shapes`: W
rows of T columns.
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
) -> list[tuple[int, int]]:
    """Places questions in the rows of a scene, first-fit.

    Args:
        candidates: indices of questions, in order of preference.
        question_length, answer_length: tokens of every question with its bos (> 1) and of every
            answer (> 0).
        rows, columns: W and T.
        limit: largest number of questions.
        in_order: stop at the first question that does not fit instead of trying the next one.

    Returns:
        (question, first flat column of its segment) of every placed question.
    """
    used = np.zeros(rows, int)
    placed: list[tuple[int, int]] = []
    for question in candidates:
        if len(placed) == limit:
            break
        length = int(question_length[question]) + int(answer_length[question]) - 1
        fits = np.flatnonzero(used + length <= columns)
        if len(fits):
            row = int(fits[0])
            placed.append((int(question), row * columns + int(used[row])))
            used[row] += length
        elif in_order:
            break
    return placed


def lay_out(
    placed: list[tuple[int, int]],
    question: np.ndarray,
    question_length: np.ndarray,
    answer: np.ndarray,
    answer_length: np.ndarray,
    rows: int,
    columns: int,
    slots: int,
    pad_id: int,
) -> dict[str, np.ndarray]:
    """Fills the rows of a scene whose questions were placed by `pack`.

    Args:
        placed: result of `pack`; entry i fills question slot i.
        question: [n, L] ids, bos last, left-padded; `question_length` [n].
        answer: [n, A] ids, right-padded; `answer_length` [n].
        rows, columns: W and T.
        slots: Q.
        pad_id: id of padding.

    Returns:
        Rows of one scene under the names of the fields of `Batch`, without the axis S:
        `packed_SWT` [W, T] ids; `packed_position_SWT` [W, T] position in its segment;
        `packed_start_SWT` [W, T] first column of its segment (for padding the column after itself,
        so that padding sees no text); `packed_answer_SWT` [W, T] True for bos and answer tokens,
        which see the thinking tokens; `answer_column_SQA` [Q, A] flat column that predicts each
        answer token; `encoding_column_SQ` [Q] flat column of the prompt's last token.
    """
    size = rows * columns
    tokens = np.full(size, pad_id, np.int32)
    position = np.zeros(size, np.int32)
    start = np.arange(size, dtype=np.int32) % columns + 1
    of_answer = np.zeros(size, bool)
    answer_column = np.zeros((slots, answer.shape[1]), np.int32)
    encoding_column = np.zeros(slots, np.int32)
    for slot, (i, first) in enumerate(placed):
        q, a = int(question_length[i]), int(answer_length[i])
        bos, own = first + q - 1, slice(first, first + q + a - 1)
        tokens[own] = *question[i, question.shape[1] - q :], *answer[i, : a - 1]
        position[own] = np.arange(q + a - 1)
        start[own] = first % columns
        of_answer[bos : own.stop] = True
        answer_column[slot, :a] = bos + np.arange(a)
        encoding_column[slot] = bos - 1
    shape = (rows, columns)
    return {
        "packed_SWT": tokens.reshape(shape),
        "packed_position_SWT": position.reshape(shape),
        "packed_start_SWT": start.reshape(shape),
        "packed_answer_SWT": of_answer.reshape(shape),
        "answer_column_SQA": answer_column,
        "encoding_column_SQ": encoding_column,
    }
