"""VSI-Bench: the official scores of a file of predictions, and baselines.

Answers are parsed, scored and averaged as in the benchmark's own code, `lmms_eval/tasks/vsibench/
utils.py` of vision-x-nyu/thinking-in-space. Two things differ: a question type without questions is
reported, where that code crashes or counts 0 (its versions differ); and a numeric truth that is not
positive is refused, since the relative error divides by it.

A row is a question of the dataset with the answer of a model:

| field | |
|---|---|
| `id` | whole number or string; joins questions and predictions |
| `question_type` | one of `QUESTION_TYPES` |
| `ground_truth` | text: the letter of an option, or a positive number in items, m, cm or m2 |
| `options` | lines of the prompt of a multiple choice: "A. chair" |
| `prediction` | the generated text |
"""

import hashlib
import math
import reprlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from geode_jax.errors import UserError
from geode_jax.evaluate.metrics.spatial import (
    add_mean,
    letter_accuracy,
    letter_of,
    number_accuracy,
)
from geode_jax.evaluate.scores import VSI_CHOICES, frequency_baseline, row_of
from geode_jax.evaluate.text_table import text_table
from geode_jax.exports import files, prompts
from geode_jax.exports.kinds import (
    DIRECTION_KINDS,
    DIRECTION_TASK,
    VSI_CHOICE_KINDS,
    VSI_NUMERIC_KINDS,
    VSI_TASKS,
)
from geode_jax.row_files import (
    RowFile,
    check_prediction,
    read_rows,
    require,
    unmatched_notes,
)
from geode_jax.version import software

QUESTION_TYPES = (*VSI_NUMERIC_KINDS, *VSI_CHOICE_KINDS)
CHOICE_TASKS = tuple(task for task in VSI_TASKS if task not in VSI_NUMERIC_KINDS)

_LABELS = {"na": "number tasks (NA)", "mca": "choice tasks (MCA)"}


def prompt(row: dict) -> str:
    """Returns the benchmark's prompt for a row, which is `exports.prompts.prompt`."""
    return prompts.prompt({**row, "kind": row["question_type"]})


def rows_of(predictions: Iterable[dict]) -> list[dict]:
    """Returns the question records of the benchmark's kinds, with predictions, as its rows.

    A truth that its parser cannot read ("1,900 mm", "A. chair") becomes its number or its letter.
    """
    return [
        {
            "id": record["id"],
            "question_type": record["kind"],
            "ground_truth": _truth(record),
            "options": record.get("options"),
            "prediction": record["prediction"],
        }
        for record in predictions
        if record["kind"] in QUESTION_TYPES
    ]


def _truth(record: dict) -> str:
    answer = record["answer"].strip()
    if record["kind"] in VSI_CHOICE_KINDS:
        return letter_of(answer) or answer
    value = record.get("value")
    return answer if value is None or _is_positive(answer) else str(value)


# --- Scores ---------------------------------------------------------------------------------------


def question_score(row: dict) -> float:
    """Returns the accuracy (choice) or mean relative accuracy (number) of one row, in [0, 1].

    Raises:
      ValueError: VSI-Bench has no such question type.
    """
    if row["question_type"] in VSI_NUMERIC_KINDS:
        # The official code parses the first word of an answer, but the whole truth.
        return number_accuracy(row["prediction"], row["ground_truth"].strip())
    if row["question_type"] in VSI_CHOICE_KINDS:
        return letter_accuracy(row["prediction"], row["ground_truth"])
    raise ValueError(f"question_type: {row['question_type']!r} is none of VSI-Bench")


def score(rows: Iterable[dict]) -> dict[str, Any]:
    """Returns the benchmark's scores of answered questions, 0 to 100; keys as in `averages`."""
    return averages(_per_type(rows, question_score))


def averages(per_type: Mapping[str, float]) -> dict[str, Any]:
    """Returns the benchmark's averages of the scores of its ten question types.

    A type or task without questions has no key, and is left out of the means.

    Returns:
      `overall`: unweighted mean of the eight tasks (Table 1).
      `mca`, `na`: the same over the four choice tasks and the four number tasks (Table 3).
      Every task of `VSI_TASKS`; `object_rel_direction` is the mean of easy, medium and hard.
      `per_type`: the argument.
      `missing`: the question types that do not occur, [] for the whole benchmark.
    """
    scores = dict(per_type)
    add_mean(scores, DIRECTION_TASK, DIRECTION_KINDS)
    add_mean(scores, "overall", VSI_TASKS)
    add_mean(scores, "mca", CHOICE_TASKS)
    add_mean(scores, "na", VSI_NUMERIC_KINDS)
    shown = ("overall", "mca", "na", *VSI_TASKS)
    return {
        **{key: scores[key] for key in shown if key in scores},
        "per_type": dict(per_type),
        "missing": [kind for kind in QUESTION_TYPES if kind not in per_type],
    }


def _per_type(rows: Iterable[dict], value: Callable[[dict], float]) -> dict[str, float]:
    """Returns the mean of `value` over the rows of each question type, in percent."""
    found = defaultdict(list)
    for row in rows:
        found[row["question_type"]].append(value(row))
    return {kind: 100.0 * sum(values) / len(values) for kind, values in found.items()}


def frequency_score(rows: Iterable[dict]) -> dict[str, Any]:
    """Returns the score of answering every question with the most common truth of its type."""
    records = [
        {**row, "kind": row["question_type"], "answer": row["ground_truth"].strip()} for row in rows
    ]
    return score(frequency_baseline(records, records))


def random_score(rows: Iterable[dict]) -> dict[str, Any]:
    """Returns the expected score of options picked at random; numbers have no such baseline."""
    choices = [
        row for row in rows if row["question_type"] in VSI_CHOICE_KINDS and row.get("options")
    ]
    return averages(_per_type(choices, lambda row: 1 / len(row["options"])))


# --- Files ----------------------------------------------------------------------------------------


def check_question(row: dict, where: str) -> None:
    """Checks the fields that come from the dataset.

    Raises:
      UserError: `where: field: rule`.
    """
    kind, truth, options = (row.get(key) for key in ("question_type", "ground_truth", "options"))
    one_of = f"one of {', '.join(QUESTION_TYPES)}"
    require(kind in QUESTION_TYPES, row, "question_type", one_of, where)
    if kind in VSI_NUMERIC_KINDS:
        require(_is_positive(truth), row, "ground_truth", "a positive number as a string", where)
        return
    if options is not None:
        good = isinstance(options, list) and all(isinstance(o, str) for o in options)
        require(good and bool(options), row, "options", "a list of strings", where)
    letters = list(ascii_uppercase[: len(options) if options else None])
    good = isinstance(truth, str) and truth.upper() in letters
    require(good, row, "ground_truth", f"a letter from A to {letters[-1]}", where)


def _is_positive(text: Any) -> bool:
    try:
        return isinstance(text, str) and 0 < float(text) < math.inf
    except ValueError:
        return False


def _check_carries_truth(row: dict, where: str) -> None:
    if "ground_truth" not in row:
        raise UserError(f"{where}: ground_truth: is missing; give the file of truths as --dataset")


def _selected(questions: RowFile, ids: Path, allow_missing: bool) -> tuple[RowFile, int]:
    """Returns the questions whose ids are listed, and the number of entries that match no question.

    Raises:
      UserError: an entry matches no question and `allow_missing` is False, or no entry matches.
    """
    if ids.name == "pruned_ids.txt":
        raise UserError(
            f"{ids}: lists the questions that VSI-Bench-Debiased removes; give the ids that stay"
        )
    entries = files.read_list(ids)
    rows = {key: questions.rows[key] for _, (key,) in entries if key in questions.rows}
    missing = len(entries) - len(rows)
    if missing and not (allow_missing and rows):
        where, (key,) = next(entry for entry in entries if entry.fields[0] not in rows)
        others = f", nor are {missing - 1} more entries" if missing > 1 else ""
        raise UserError(f"{where}: {reprlib.repr(key)} is no id of {questions.path}{others}")
    return RowFile(ids, hashlib.sha256(files.read_bytes(ids)).hexdigest(), rows), missing


def _answered(questions: RowFile, answers: RowFile) -> list[dict]:
    """Returns the questions with their predictions; other predictions are ignored.

    Raises:
      UserError: a question has no prediction.
    """
    absent = [key for key in questions.rows if key not in answers.rows]
    if absent:
        raise UserError(
            f"{answers.path}: no prediction for {len(absent)} of {len(questions.rows)} questions "
            f"of {questions.path}, the first is id {reprlib.repr(absent[0])}"
        )
    return [
        {**question, "prediction": answers.rows[key]["prediction"]}
        for key, question in questions.rows.items()
    ]


# --- Evaluation -----------------------------------------------------------------------------------


def evaluate(
    predictions: Path,
    *,
    dataset: Path | None = None,
    debiased_ids: Path | None = None,
    allow_missing: bool = False,
    blind: Path | None = None,
    revision: str | None = None,
    frames: int | None = None,
    decoding: str | None = None,
) -> dict[str, Any]:
    """Scores a file of predictions and the baselines, and records what the scores depend on.

    Args:
      predictions: rows with `id` and `prediction`, and the fields of a question if `dataset` is
        None.
      dataset: the rows of the dataset, each with a prediction; other predictions are ignored.
      debiased_ids: file of the ids of the questions that count; None: all count.
      allow_missing: True to note entries of `debiased_ids` that match no question, not refuse them.
      blind: rows with `id` and `prediction` of a model that saw no frames.
      revision: of the dataset; copied into the result, as are the next two.
      frames: number of frames of each video that the model saw.
      decoding: how the text was generated.

    Returns:
      The content of the result file: `scores` (column to the keys of `averages`), `questions`
      (their number), `notes` for the reader, and the copied facts, None where not given.

    Raises:
      UserError: a file breaks its rules.
    """
    if dataset is None:
        checks = (_check_carries_truth, check_question, check_prediction)
        questions = answers = read_rows(predictions, *checks)
    else:
        questions = read_rows(dataset, check_question)
        answers = read_rows(predictions, check_prediction)
    columns = {"model": answers}
    if blind:
        columns["blind"] = read_rows(blind, check_prediction)
    source = questions.source() | {"revision": revision}
    notes = unmatched_notes(questions, columns.values())
    if debiased_ids:
        questions, missing = _selected(questions, debiased_ids, allow_missing)
        if missing:
            notes.append(f"{debiased_ids}: {missing} entries are no id of {source['file']}")

    return result(
        {name: _answered(questions, file) for name, file in columns.items()},
        dataset=source,
        debiased_ids=questions.source() if debiased_ids else None,
        predictions={name: file.source() for name, file in columns.items()},
        frames=frames,
        decoding=decoding,
        notes=notes,
    )


def result(
    columns: Mapping[str, list[dict]],
    *,
    dataset: dict[str, Any],
    predictions: dict[str, dict],
    debiased_ids: dict[str, str] | None = None,
    frames: int | None,
    decoding: str | None,
    notes: Iterable[str] = (),
) -> dict[str, Any]:
    """Returns the content of a result file: scores of columns and baselines, and recorded facts.

    Args:
      columns: "model" and any other column to the same rows with its own predictions.
      dataset, predictions, debiased_ids: files, as `RowFile.source` describes them.
      frames, decoding: as in `evaluate`.
      notes: further notes for the reader.
    """
    rows = columns["model"]
    scores = {name: score(answered) for name, answered in columns.items()}
    scores |= {"frequency": frequency_score(rows), "random": random_score(rows)}
    return {
        "benchmark": "VSI-Bench",
        "evaluator": software(),
        "dataset": dataset,
        "debiased_ids": debiased_ids,
        "predictions": predictions,
        "frames": frames,
        "decoding": decoding,
        "questions": len(rows),
        "scores": scores,
        "notes": [
            *_missing(scores["model"]),
            *notes,
            "frequency: the most common truth of each question type among these same questions",
            "random: the expected score of a random option; numbers have no such baseline",
        ],
    }


def _missing(model: dict[str, Any]) -> list[str]:
    if not model["missing"]:
        return []
    tasks = sum(task in model for task in VSI_TASKS)
    return [
        f"the means are over {tasks} of the {len(VSI_TASKS)} tasks: there are no questions of "
        f"{', '.join(model['missing'])}"
    ]


def table(scores: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns the scores side by side as a text table, 0 to 100, "-" where a score is missing.

    Args:
      scores: column ("model", "frequency", ...) to the keys of `averages`.
    """
    keys = ("overall", "na", *VSI_NUMERIC_KINDS, "mca", *VSI_CHOICES)
    rows = []
    for key in keys:
        values = [(column | column["per_type"]).get(key) for column in scores.values()]
        cells = ("-" if value is None else f"{value:.1f}" for value in values)
        rows.append([_LABELS.get(key) or row_of(key).label, *cells])
    return text_table(rows, ["", *scores])
