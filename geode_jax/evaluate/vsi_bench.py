"""VSI-Bench: the official score of a file of predictions, beside its baselines.

Answers are read, scored and averaged as by the benchmark's own code, vision-x-nyu/thinking-in-space
`lmms_eval/tasks/vsibench/utils.py`. Two things differ: a question type without a question is
reported, where that code crashes or counts 0 (its versions differ), and a truth that is no
positive number, which an error cannot be divided by, is refused.

A row is a question of the dataset, with the answer of a model:

| field | |
|---|---|
| `id` | whole number or string, by which files are joined |
| `question_type` | one of `QUESTION_TYPES` |
| `ground_truth` | text: an option's letter, or a positive number in items, m, cm or m2 |
| `options` | of a choice, the lines of the prompt: "A. chair" |
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
    number_accuracy,
)
from geode_jax.evaluate.row_files import (
    RowFile,
    check_prediction,
    of_no_question,
    read_rows,
    require,
)
from geode_jax.evaluate.scores import frequency_baseline, row_of
from geode_jax.exports import files, prompts
from geode_jax.exports.kinds import (
    DIRECTION_KINDS,
    KINDS,
    VSI_CHOICE_KINDS,
    VSI_NUMERIC_KINDS,
    VSI_TASKS,
)
from geode_jax.version import software

QUESTION_TYPES = (*VSI_NUMERIC_KINDS, *VSI_CHOICE_KINDS)
CHOICE_TASKS = tuple(task for task in VSI_TASKS if task not in VSI_NUMERIC_KINDS)

_LABELS = {"na": "number tasks (NA)", "mca": "choice tasks (MCA)"}


def prompt(row: dict) -> str:
    """The text that the benchmark asks for a row, which is `exports.prompts.prompt`."""
    return prompts.prompt({**row, "kind": row["question_type"]})


def rows_of(predictions: Iterable[dict]) -> list[dict]:
    """Answered question records as rows of the benchmark, its kinds only."""
    return [
        {
            "id": record["id"],
            "question_type": record["kind"],
            "ground_truth": record["answer"],
            "options": record.get("options"),
            "prediction": record["prediction"],
        }
        for record in predictions
        if record["kind"] in QUESTION_TYPES
    ]


# --- Scores ---------------------------------------------------------------------------------------


def question_score(row: dict) -> float:
    """Accuracy (choice) or mean relative accuracy (number) of one row, in [0, 1].

    Raises:
      ValueError: the question type is not VSI-Bench's.
    """
    if row["question_type"] in VSI_NUMERIC_KINDS:
        # Of the truth the official code takes all, white space included; of an answer one word.
        return number_accuracy(row["prediction"], row["ground_truth"].strip())
    if row["question_type"] in VSI_CHOICE_KINDS:
        return letter_accuracy(row["prediction"], row["ground_truth"])
    raise ValueError(f"question_type: {row['question_type']!r} is none of VSI-Bench")


def score(rows: Iterable[dict]) -> dict[str, Any]:
    """The benchmark's scores of answered questions, 0 to 100; keys as in `averages`."""
    return averages(_per_type(rows, question_score))


def averages(per_type: Mapping[str, float]) -> dict[str, Any]:
    """The benchmark's averages of the scores of its ten question types.

    What has no question has no key, never a 0; every mean is over what is there.

    Returns:
      `overall`: unweighted mean of the eight tasks (Table 1).
      `mca`, `na`: the same of the four choice tasks and of the four number tasks (Table 3).
      The tasks, `VSI_TASKS`; `object_rel_direction` is the mean of easy, medium and hard.
      `per_type`: `per_type`.
      `missing`: the question types that are not there, [] for the whole benchmark.
    """
    scores = dict(per_type)
    add_mean(scores, "object_rel_direction", DIRECTION_KINDS)
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
    """Mean of `value` over the rows of each question type, in percent."""
    found = defaultdict(list)
    for row in rows:
        found[row["question_type"]].append(value(row))
    return {kind: 100.0 * sum(values) / len(values) for kind, values in found.items()}


def frequency_score(rows: Iterable[dict]) -> dict[str, Any]:
    """The benchmark's frequency baseline: the most common truth of a type answers all of it."""
    records = [{**row, "kind": row["question_type"], "answer": row["ground_truth"]} for row in rows]
    return score(frequency_baseline(records, records))


def random_score(rows: Iterable[dict]) -> dict[str, Any]:
    """What an option picked at random scores in the mean; a number has no such baseline."""
    choices = [
        row for row in rows if row["question_type"] in VSI_CHOICE_KINDS and row.get("options")
    ]
    return averages(_per_type(choices, lambda row: 1 / len(row["options"])))


# --- Files ----------------------------------------------------------------------------------------


def check_question(row: dict, where: str) -> None:
    """Checks the fields that the dataset gives.

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
        good = isinstance(options, list) and options and all(isinstance(o, str) for o in options)
        require(good, row, "options", "a list of strings", where)
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
        raise UserError(f"{where}: ground_truth: is missing; --dataset names the file that has it")


def _kept(questions: RowFile, ids: Path, allow_missing: bool) -> tuple[RowFile, int]:
    """The questions whose ids a list has, and how many of its entries are no id of them.

    Raises:
      UserError: there is such an entry, and they are not allowed; or every entry is such.
    """
    if ids.name == "pruned_ids.txt":
        raise UserError(
            f"{ids}: the dataset's list of what VSI-Bench-Debiased removes; give the ids that stay"
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
    """The questions with their predictions, whatever else the file of predictions has."""
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


# --- The whole ------------------------------------------------------------------------------------


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
    """Scores a file of predictions, the baselines beside it, and all that a number depends on.

    Args:
      predictions: rows with `id` and `prediction`; the whole rows where `dataset` is None.
      dataset: the dataset's own rows; each needs a prediction, other predictions are left out.
      debiased_ids: a list of ids: only these questions count.
      allow_missing: entries of that list that are no question's id are a note, not refused.
      blind: rows with `id` and `prediction` of a model that saw no frames.
      revision: of the dataset, recorded as it stands, like the next two.
      frames: that the model saw of each video.
      decoding: how the text was generated.

    Returns:
      What the result file holds: `scores` (column to the keys of `averages`), `questions` (how
      many), `notes` (what a reader must know), and the recorded facts, None where not told.

    Raises:
      UserError: a file breaks its rules.
    """
    if dataset is None:
        checks = (_check_carries_truth, check_question, check_prediction)
        asked = answers = read_rows(predictions, *checks)
    else:
        asked = read_rows(dataset, check_question)
        answers = read_rows(predictions, check_prediction)
    said = {"model": answers} | ({"blind": read_rows(blind, check_prediction)} if blind else {})
    questions, notes = asked, of_no_question(asked, said)
    if debiased_ids:
        questions, missing = _kept(asked, debiased_ids, allow_missing)
        if missing:
            notes.append(f"{debiased_ids}: {missing} entries are no id of {asked.path}")

    return result(
        {name: _answered(questions, file) for name, file in said.items()},
        dataset=asked.named() | {"revision": revision},
        debiased_ids=questions.named() if debiased_ids else None,
        predictions={name: file.named() for name, file in said.items()},
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
    """What a result file holds: scores of every column and of the baselines, and recorded facts.

    Args:
      columns: "model" and what stands beside it, to the same rows with their predictions.
      dataset, predictions, debiased_ids: files, as of `RowFile.named`.
      frames, decoding: as in `evaluate`.
      notes: what a reader must know beside what the scores tell.
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
            "frequency: the most common truth of each question type, over these same questions",
            "random: an option at random; numbers have none",
        ],
    }


def _missing(model: dict[str, Any]) -> list[str]:
    if not model["missing"]:
        return []
    tasks = sum(task in model for task in VSI_TASKS)
    return [
        f"means are over what is there, {tasks} of the {len(VSI_TASKS)} tasks: no question is "
        f"{', '.join(model['missing'])}"
    ]


def table(scores: Mapping[str, Mapping[str, Any]]) -> str:
    """Scores side by side, 0 to 100 with one decimal, "-" where there is none.

    Args:
      scores: column ("model", "frequency", ...) to the keys of `averages`.
    """
    choices = dict.fromkeys(name for kind in VSI_CHOICE_KINDS for name in (KINDS[kind].task, kind))
    keys = ("overall", "na", *VSI_NUMERIC_KINDS, "mca", *choices)
    lines = [["", *scores]]
    for key in keys:
        values = [(column | column["per_type"]).get(key) for column in scores.values()]
        cells = ("-" if value is None else f"{value:.1f}" for value in values)
        lines.append([_LABELS.get(key) or row_of(key).label, *cells])
    first = max(len(line[0]) for line in lines)
    widths = [max(11, 2 + len(name)) for name in scores]
    return "\n".join(
        label.ljust(first) + "".join(map(str.rjust, cells, widths)) for label, *cells in lines
    )
