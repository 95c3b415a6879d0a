"""Makes the question rows of a `Batch` from question records: tokens, targets, packed text."""

import bisect
import contextlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from geode_jax.data.control import BOX, REG, NoNumberError, control_of, number_of
from geode_jax.data.packing import lay_out
from geode_jax.data.tokens import Tokenizer
from geode_jax.exports import question_rules
from geode_jax.exports.kinds import CANDIDATES, KINDS, RELATIONS, ROUTE
from geode_jax.exports.prompts import prompt
from geode_jax.geometry.upright_boxes import box_gaps
from geode_jax.shapes import MAX_OBJECTS
from geode_jax.targets import held_boxes

TEACHER_LOGITS = (
    "teacher/answer_question",
    "teacher/answer_id",
    "teacher/topk_id",
    "teacher/topk_logprob",
)
"""Tensors of a scene that `add_teacher_logits` reads."""
_TEACHER_COLUMN = {"left_right": 0, "above_below": 2}
"""Columns of `teacher/relations` with P(left) and P(above)."""

_TURN = (0, 1, 0, 2)
"""Objects (a, b, c, d) that define the turn of a question: the heading is from a to b, and the turn
at c is to face d. This order is for "stand by object 0 and face object 1"."""
_ROUTE_TURN = {3: (0, 1, 1, 2), 4: (0, 1, 0, 3)}
"""The same for the first turn of a route, by the number of named objects: start, object faced,
destination and, if the first turn is on the spot, the stop before the destination."""


def stack_questions(
    records: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    question_length: int,
    answer_length: int,
    answer_field: str,
    controls: tuple[int, int] | None = None,
    asks: bool = True,
) -> dict[str, np.ndarray]:
    """Returns n question records as arrays [n, ...] under the names of the fields of `Batch`.

    Objects are in the record's order, except that the object that distances are measured from
    comes first. Three arrays are not in `Batch`: `object_place` [n, O], position in the question
    of the last token of an object's name, at its first occurrence; `object_row` [n, O], row of the
    object in `target/boxes`; `pair` [n, 2], the rows of the record's first two objects. Unknown
    entries are -1, and so are those of `object_place` and `pair` for a name that several objects
    of the record share.

    Args:
        records: n question records whose prompts and answers fit.
        tokenizer: tokenizer of the run.
        question_length, answer_length: L and A.
        answer_field: "answer", "teacher_answer" or "rationale".
        controls: ids of REG and BOX, which replace an "answer" that is a number or a box.
        asks: whether the question precedes its answer; without it there is the bos alone.
    """
    n, lq, la = len(records), question_length, answer_length
    arrays = {
        "question_SQL": np.full((n, lq), tokenizer.pad_id, np.int32),
        "question_length_SQ": np.zeros(n, np.int32),
        "answer_SQA": np.full((n, la), tokenizer.pad_id, np.int32),
        "answer_length_SQ": np.zeros(n, np.int32),
        "objects_SQO7": np.zeros((n, MAX_OBJECTS, 7), np.float32),
        "objects_mask_SQO": np.zeros((n, MAX_OBJECTS), bool),
        "gaps_SQO": np.zeros((n, MAX_OBJECTS), np.float32),
        "angle_SQ2": np.zeros((n, 2), np.float32),
        "angle_mask_SQ": np.zeros(n, bool),
        "pair": np.full((n, 2), -1, np.int32),
        "object_place": np.full((n, MAX_OBJECTS), -1, np.int32),
        "object_row": np.full((n, MAX_OBJECTS), -1, np.int32),
        "relations_SQr": np.zeros((n, len(RELATIONS)), np.float32),
        "relations_mask_SQr": np.zeros((n, len(RELATIONS)), bool),
        "teacher_relations_SQr": np.zeros((n, len(RELATIONS)), np.float32),
        "teacher_relations_mask_SQr": np.zeros((n, len(RELATIONS)), bool),
        "value_SQ": np.zeros(n, np.float32),
        "value_mask_SQ": np.zeros(n, bool),
        "base_unit_SQ": np.ones(n, np.float32),
        "box_SQ7": np.zeros((n, 7), np.float32),
        "box_mask_SQ": np.zeros(n, bool),
        "topk_id_SQAk": np.zeros((n, la, 0), np.int32),
        "topk_logprob_SQAk": np.zeros((n, la, 0), np.float32),
        "topk_mask_SQA": np.zeros((n, la), bool),
    }
    texts = [prompt(record) if asks else "" for record in records]
    prompts = tokenizer.encode_with_ends(texts)
    answers = tokenizer.encode_answers([record[answer_field] for record in records])
    if controls and answer_field == "answer":
        token: dict[str, int] = dict(zip((REG, BOX), controls, strict=True))
        for i, record in enumerate(records):
            if control_of(record):
                answers[i] = [token[control_of(record)]]
    # The questions of a scene name the same few boxes.
    rows: dict[tuple, int] = {}
    for record in records:
        for item in filter(_is_held, record.get("objects", ())):
            rows.setdefault(tuple(item["box"]), len(rows))
    gaps = box_gaps(*2 * [np.array([*rows], np.float64)]) if rows else np.zeros((0, 0))
    for i, record in enumerate(records):
        ids, ends = prompts[i]
        ids = [*ids, tokenizer.bos_id]
        arrays["question_SQL"][i, lq - len(ids) :] = ids
        arrays["question_length_SQ"][i] = len(ids)
        ids = [*answers[i], tokenizer.eos_id]
        arrays["answer_SQA"][i, : len(ids)] = ids
        arrays["answer_length_SQ"][i] = len(ids)
        objects = _anchor_first(record)[:MAX_OBJECTS]
        names = [item["name"] for item in record.get("objects", ())]
        for j, item in enumerate(record.get("objects", ())[:2]):
            if names.count(item["name"]) == 1:
                arrays["pair"][i, j] = item.get("index", -1)
        for j, item in enumerate(objects):
            arrays["object_row"][i, j] = item.get("index", -1)
            if _is_held(item):
                arrays["objects_SQO7"][i, j] = item["box"]
                arrays["objects_mask_SQO"][i, j] = True
            found = re.search(rf"\b{re.escape(item['name'])}\b", texts[i])
            if found and names.count(item["name"]) == 1:
                arrays["object_place"][i, j] = bisect.bisect_left(ends, found.end())
        turn = _ROUTE_TURN.get(len(objects)) if _roles(record) == ROUTE else _TURN
        if turn and max(turn) < len(objects) and (arrays["object_place"][i, [*turn]] >= 0).all():
            angle = _turn([objects[j] for j in turn])
            if angle is not None:
                arrays["angle_SQ2"][i], arrays["angle_mask_SQ"][i] = angle, True
        if objects and _is_held(objects[0]):
            own = {j: rows[tuple(o["box"])] for j, o in enumerate(objects) if _is_held(o)}
            arrays["gaps_SQO"][i, [*own]] = gaps[own[0], [*own.values()]]
        for field, of in (("relation", "relations"), ("teacher_relation", "teacher_relations")):
            for name, probability in record.get(field, {}).items():
                arrays[f"{of}_SQr"][i, RELATIONS.index(name)] = probability
                arrays[f"{of}_mask_SQr"][i, RELATIONS.index(name)] = True
        if control_of(record) == REG:
            with contextlib.suppress(NoNumberError):  # the pipeline has counted it
                arrays["value_SQ"][i], arrays["base_unit_SQ"][i] = number_of(record)
                arrays["value_mask_SQ"][i] = True
        if controls and "box" in record and held_boxes(record["box"]):
            arrays["box_SQ7"][i] = record["box"]
            arrays["box_mask_SQ"][i] = True
    return arrays


def _roles(record: Mapping[str, Any]) -> str:
    """Returns the roles of the named objects of a question, see `kinds.Kind.objects`."""
    kind = KINDS.get(record["kind"])
    return kind.objects if kind else ""


def _anchor_first(record: Mapping[str, Any]) -> list[dict]:
    """Returns the objects of a question; the object that distances are measured from comes first.

    In "which of these is the closest to ..." it is the one object that is not an option. The result
    is empty where no object, or more than one, is no option: the distances would be wrong.
    """
    objects = list(record.get("objects", ()))
    if _roles(record) == CANDIDATES:
        options = {_bare(question_rules.option_text(text)) for text in record.get("options", ())}
        objects.sort(key=lambda item: _bare(item["name"]) in options)
        if sum(_bare(item["name"]) not in options for item in objects) != 1:
            return []
    return objects


def _bare(name: str) -> str:
    """Returns the name of an object in lower case, without an article or a final full stop."""
    return re.sub(r"^(?:the|an?) ", "", " ".join(name.lower().split())).rstrip(".")


def _turn(objects: Sequence[Mapping[str, Any]]) -> tuple[float, float] | None:
    """Returns (sin, cos) of the turn at the third of four objects to face the fourth.

    The heading before the turn is from the first object to the second. Angles are seen from above
    (z up), counter-clockwise positive: sin > 0 is to the left. Returns None if one of the two
    directions has no length or if the box of an object cannot be learned.
    """
    if not all(map(_is_held, objects)):
        return None
    start, end, here, there = (complex(*item["box"][:2]) for item in objects)
    turn = (there - here) * (end - start).conjugate()
    return (turn.imag / abs(turn), turn.real / abs(turn)) if turn else None


def _is_held(item: Mapping[str, Any]) -> bool:
    """Returns whether the box of a named object can be learned."""
    return bool(held_boxes(item["box"]))


def add_teacher_logits(
    arrays: dict[str, np.ndarray], tensors: Mapping[str, np.ndarray], rows: np.ndarray, topk: int
) -> None:
    """Fills `topk_id`, `topk_logprob` [n, A, k] and `topk_mask` [n, A] of `stack_questions`.

    Questions whose teacher answer differs from the learned answer in any id are left masked: the
    logits then belong to another continuation.

    Args:
        arrays: result of `stack_questions`, which is changed.
        tensors: the scene's `TEACHER_LOGITS`; without them every mask stays False.
        rows: [n] number of each question among those of the scene, in the order of
            questions.jsonl.
        topk: k.
    """
    n, la = arrays["answer_SQA"].shape
    arrays["topk_id_SQAk"] = np.zeros((n, la, topk), np.int32)
    arrays["topk_logprob_SQAk"] = np.zeros((n, la, topk), np.float32)
    if "teacher/topk_id" not in tensors:
        return
    question = tensors["teacher/answer_question"]
    for i, row in enumerate(rows):
        own = slice(*np.searchsorted(question, [row, row + 1]))
        answer = tensors["teacher/answer_id"][own]
        length = arrays["answer_length_SQ"][i]
        if len(answer) and np.array_equal(answer, arrays["answer_SQA"][i, :length]):
            arrays["topk_id_SQAk"][i, :length] = tensors["teacher/topk_id"][own]
            arrays["topk_logprob_SQAk"][i, :length] = tensors["teacher/topk_logprob"][own]
            arrays["topk_mask_SQA"][i, :length] = True


def lay_out_questions(
    arrays: dict[str, np.ndarray],
    placed: list[tuple[int, int]],
    tensors: Mapping[str, np.ndarray],
    slots: int,
    rows: int,
    columns: int,
    pad_id: int,
) -> dict[str, np.ndarray]:
    """Returns the rows of Q questions of a scene: {field of `Batch`: array without the axis S}.

    Unused slots hold empty questions. An object whose category has several instances in the scene
    has no column: a question may specify the instance ("the chair that is nearest to the lamp")
    only after the category.

    Args:
        arrays: result of `stack_questions`.
        placed: result of `packing.pack`.
        tensors: tensors of the scene.
        slots: Q.
        rows, columns: W and T of the packed text.
        pad_id: id of padding.
    """
    chosen = [question for question, _ in placed]
    first = np.array([first for _, first in placed], np.int32)
    place = np.where(
        _shared(tensors, arrays["object_row"][chosen]), -1, arrays["object_place"][chosen]
    )
    object_column = np.full((slots, MAX_OBJECTS), -1, np.int32)
    object_column[: len(chosen)] = np.where(place < 0, -1, first[:, None] + place)
    fields: dict[str, np.ndarray] = {"object_column_SQO": object_column}
    # Padding questions have base unit 1, because values are divided by it.
    fills = {"question_SQL": pad_id, "answer_SQA": pad_id, "base_unit_SQ": 1}
    for name, array in arrays.items():
        if name in ("object_place", "object_row"):
            continue
        fill = fills.get(name, 0)
        field = np.full((slots, *array.shape[1:]), fill, array.dtype)
        field[: len(chosen)] = array[chosen]
        fields[name] = field
    pairs = fields.pop("pair")
    pairs[len(chosen) :] = -1
    _add_pair_relations(fields, tensors, pairs)
    packed = lay_out(
        placed,
        arrays["question_SQL"],
        arrays["question_length_SQ"],
        arrays["answer_SQA"],
        arrays["answer_length_SQ"],
        rows,
        columns,
        slots,
        pad_id,
    )
    return fields | packed


def _shared(tensors: Mapping[str, np.ndarray], rows: np.ndarray) -> np.ndarray:
    """Returns which rows of `target/boxes` (-1: unknown) share their category with other boxes."""
    labels = tensors.get("target/labels")
    if labels is None or not len(labels):
        return np.zeros(rows.shape, bool)
    return (rows >= 0) & (np.bincount(labels)[labels[rows]] > 1)


def _add_pair_relations(
    fields: dict[str, np.ndarray], tensors: Mapping[str, np.ndarray], pairs: np.ndarray
) -> None:
    """Adds the teacher's relations of the first two objects of every record to `fields`.

    Args:
        fields: `teacher_relations_SQr` and its mask, with what the teacher answered.
        tensors: tensors of a scene; row i * N + j of `teacher/relations` is box i relative to j.
        pairs: [Q, 2] rows of `target/boxes`, -1 unknown.
    """
    relations = tensors.get("teacher/relations")
    if relations is not None:
        known = (pairs >= 0).all(axis=1)
        n = len(tensors["target/boxes"])
        of_pair = relations[pairs[known, 0] * n + pairs[known, 1]]
        for name, column in _TEACHER_COLUMN.items():
            fields["teacher_relations_SQr"][known, RELATIONS.index(name)] = of_pair[:, column]
            fields["teacher_relations_mask_SQr"][known, RELATIONS.index(name)] = True
