"""Question records as the question rows of a `Batch`: tokens, targets, packed text."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from geode_jax.data.exports import NUMERIC_KINDS, RELATIONS
from geode_jax.data.packing import lay_out
from geode_jax.data.prompts import prompt
from geode_jax.data.tokens import Tokenizer
from geode_jax.shapes import MAX_OBJECTS

_TEACHER_COLUMN = {"left_right": 0, "above_below": 2}  # P(left) and P(above), contract section 3


def stack_questions(
    records: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    question_length: int,
    answer_length: int,
    answer_field: str,
) -> dict[str, np.ndarray]:
    """Question records as arrays [n, ...], named as the question fields of `Batch`.

    `object_index` [n, O] beside them is the row of `target/boxes` of every named object, -1 where
    it is unknown.

    Args:
        records: n question records whose prompts and answers fit.
        tokenizer: of the run.
        question_length, answer_length: Lq and La.
        answer_field: "answer" or "teacher_answer".
    """
    n, lq, la = len(records), question_length, answer_length
    arrays = {
        "question": np.full((n, lq), tokenizer.pad_id, np.int32),
        "question_length": np.zeros(n, np.int32),
        "answer": np.full((n, la), tokenizer.pad_id, np.int32),
        "answer_length": np.zeros(n, np.int32),
        "objects": np.zeros((n, MAX_OBJECTS, 7), np.float32),
        "objects_mask": np.zeros((n, MAX_OBJECTS), bool),
        "object_index": np.full((n, MAX_OBJECTS), -1, np.int32),
        "relations": np.zeros((n, len(RELATIONS)), np.float32),
        "relations_mask": np.zeros((n, len(RELATIONS)), bool),
        "value": np.zeros(n, np.float32),
        "value_mask": np.zeros(n, bool),
        "topk_id": np.zeros((n, la, 0), np.int32),
        "topk_logprob": np.zeros((n, la, 0), np.float32),
        "topk_mask": np.zeros((n, la), bool),
    }
    prompts = tokenizer.encode_batch([prompt(record) for record in records])
    answers = tokenizer.encode_batch([" " + record[answer_field] for record in records])
    for i, record in enumerate(records):
        ids = [tokenizer.bos_id, *prompts[i]]
        arrays["question"][i, lq - len(ids) :] = ids
        arrays["question_length"][i] = len(ids)
        ids = [*answers[i], tokenizer.eos_id]
        arrays["answer"][i, : len(ids)] = ids
        arrays["answer_length"][i] = len(ids)
        for j, item in enumerate(record.get("objects", ())[:MAX_OBJECTS]):
            arrays["objects"][i, j] = item["box"]
            arrays["objects_mask"][i, j] = True
            arrays["object_index"][i, j] = item.get("index", -1)
        for name, probability in record.get("relation", {}).items():
            arrays["relations"][i, RELATIONS.index(name)] = probability
            arrays["relations_mask"][i, RELATIONS.index(name)] = True
        if "value" in record or record["kind"] in NUMERIC_KINDS:
            arrays["value"][i] = record.get("value", record["answer"])
            arrays["value_mask"][i] = True
    return arrays


def lay_out_questions(
    arrays: dict[str, np.ndarray],
    placed: list[tuple],
    tensors: Mapping[str, np.ndarray],
    slots: int,
    rows: int,
    columns: int,
    pad_id: int,
) -> dict[str, np.ndarray]:
    """Rows of Q questions of a scene, padded with empty ones, without shape suffixes.

    Args:
        arrays: of `stack_questions`.
        placed: of `packing.pack`.
        tensors: the scene's.
        slots: Q.
        rows, columns: M and R of the packed text.
        pad_id: fills what is left.
    """
    chosen = [question for question, _, _ in placed]
    fields = {}
    for name, array in arrays.items():
        fill = pad_id if name in ("question", "answer") else 0
        field = np.full((slots, *array.shape[1:]), fill, array.dtype)
        field[: len(chosen)] = array[chosen]
        fields[name] = field
    pairs = fields.pop("object_index")[:, :2]
    pairs[len(chosen) :] = -1
    teacher, mask = _teacher_relations(tensors, pairs)
    packed = lay_out(
        placed,
        arrays["question"],
        arrays["question_length"],
        arrays["answer"],
        arrays["answer_length"],
        rows,
        columns,
        slots,
        pad_id,
    )
    return fields | packed | {"teacher_relations": teacher, "teacher_relations_mask": mask}


def _teacher_relations(
    tensors: Mapping[str, np.ndarray], pairs: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The teacher's relations of the first two objects of every question.

    Args:
        tensors: a scene's; `teacher/relations` has row i * N + j for box i relative to box j.
        pairs: [Q, 2] rows of `target/boxes`, -1 unknown.

    Returns:
        Probabilities and mask [Q, R].
    """
    target = np.zeros((len(pairs), len(RELATIONS)), np.float32)
    mask = np.zeros(target.shape, bool)
    relations = tensors.get("teacher/relations")
    if relations is not None:
        known = (pairs >= 0).all(axis=1)
        n = len(tensors["target/boxes"])
        of_pair = relations[pairs[known, 0] * n + pairs[known, 1]]
        for name, column in _TEACHER_COLUMN.items():
            target[known, RELATIONS.index(name)] = of_pair[:, column]
            mask[known, RELATIONS.index(name)] = True
    return target, mask
