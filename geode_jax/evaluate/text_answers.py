"""Scores the answers of any model to ScanQA or SQA3D, beside a frequency baseline.

The questions come from the data set's own file, or from `questions.jsonl` of an export:

| file | id | references |
|---|---|---|
| `ScanQA_v1.0_val.json` | `question_id` | `answers` |
| `v1_balanced_sqa_annotations_test_scannetv2.json` | `question_id` | `answers[].answer` |
| `questions.jsonl` | `id` | `answer` and `answers` |

Predictions are JSON lines with `id` and `prediction`; `predictions.jsonl` of a run is such a file,
and contains the questions too. The ids that `geode-jax prepare` makes ("scanqa-val-scene0011-0")
are accepted in place of the data set's own ("val-scene0011-0"). A question without a prediction is
scored as an empty answer, and reported.
"""

import dataclasses
import hashlib
import reprlib
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from geode_jax.errors import UserError
from geode_jax.evaluate.metrics.coco import coco_scores, exact_match
from geode_jax.evaluate.metrics.text import references
from geode_jax.evaluate.scores import frequency_baseline
from geode_jax.evaluate.text_table import text_table
from geode_jax.exports import files
from geode_jax.row_files import RowFile, check_prediction, read_rows, unmatched_notes
from geode_jax.version import software

LABELS = {
    "em1": "EM@1",
    "em1_refined": "EM@1, refined",
    **{f"coco_bleu{n}": f"BLEU-{n} (COCO)" for n in (1, 2, 3, 4)},
    "coco_rouge_l": "ROUGE-L (COCO)",
    "coco_cider": "CIDEr (COCO)",
    "meteor_exact_stem": "METEOR, exact + stem only",
}
"""Score key -> label in tables."""


def read_questions(path: Path) -> RowFile:
    """Reads the questions of a file, each with `id`, `kind`, `answer` and `answers`.

    Raises:
      UserError: the file has none of the forms of the module docstring, or a question has no
        answer.
    """
    if path.suffix == ".jsonl":
        return read_rows(path, _check_question)
    data = files.read_bytes(path)
    content = files.parse_json(path, data)
    situated = isinstance(content, dict) and isinstance(content.get("annotations"), list)
    records = content["annotations"] if situated else content
    if not isinstance(records, list) or not records:
        raise UserError(f"{path}: must be a file of questions of ScanQA, of SQA3D or of an export")
    rows: dict[str, dict] = {}
    for number, record in enumerate(records):
        where = f"{path}: record {number}"
        if not isinstance(record, dict) or not isinstance(record.get("question_id"), int | str):
            raise UserError(f"{where}: question_id: must be a whole number or a string")
        answers = record.get("answers")
        if situated and isinstance(answers, list):
            answers = [a.get("answer") if isinstance(a, dict) else None for a in answers]
        row = {"id": record["question_id"], "kind": "sqa3d" if situated else "scanqa"}
        row["answers"] = answers
        row["answer"] = answers[0] if isinstance(answers, list) and answers else None
        _check_question(row, where)
        if str(row["id"]) in rows:
            raise UserError(f"{where}: question_id: duplicate {row['id']!r}")
        rows[str(row["id"])] = row
    return RowFile(path, hashlib.sha256(data).hexdigest(), rows)


def _check_question(row: dict, where: str) -> None:
    for field in ("kind", "answer"):
        if not isinstance(row.get(field), str):
            found = reprlib.repr(row.get(field))
            raise UserError(f"{where}: {field}: must be a string, is {found}")
    answers = row.get("answers", [])
    if not isinstance(answers, list) or not all(isinstance(text, str) for text in answers):
        raise UserError(f"{where}: answers: must be a list of strings")


def evaluate(
    predictions: Path,
    *,
    dataset: Path | None = None,
    revision: str | None = None,
    frames: int | None = None,
    decoding: str | None = None,
) -> dict[str, Any]:
    """Scores a file of predictions and the frequency baseline.

    Args:
      predictions: rows with `id` and `prediction`, and the fields of a question if `dataset` is
        None.
      dataset: the file of questions.
      revision: of the data set; copied into the result, as are the next two.
      frames: number of frames that the model saw.
      decoding: how the text was generated.

    Returns:
      The content of the result file: `scores` (column to the keys of `coco.coco_scores`, and
      `em1/KIND` of every kind if there are several), `questions` (their number), `missing` (ids
      without a prediction), `notes`, and the copied facts, None where not given.

    Raises:
      UserError: a file breaks its rules, or no prediction belongs to a question.
    """
    if dataset is None:
        questions = answers = read_rows(predictions, _check_question, check_prediction)
    else:
        questions = read_questions(dataset)
        answers = _with_own_ids(questions, read_rows(predictions, check_prediction))
    missing = [key for key in questions.rows if key not in answers.rows]
    if len(missing) == len(questions.rows):
        first = reprlib.repr(missing[0])
        raise UserError(
            f"{predictions}: no prediction for a question of {dataset}, such as {first}"
        )
    rows = [
        {**row, "prediction": answers.rows.get(key, {"prediction": ""})["prediction"]}
        for key, row in questions.rows.items()
    ]
    notes = [
        *(
            [
                f"{len(missing)} of {len(rows)} questions have no prediction and count as wrong, "
                f"the first is id {reprlib.repr(missing[0])}"
            ]
            if missing
            else []
        ),
        *unmatched_notes(questions, [answers]),
        "frequency: the most common first answer of each kind, counted over these same questions",
        "BLEU, ROUGE-L and CIDEr: the COCO formulas; the tokenizer imitates COCO's Java tokenizer",
        "METEOR: exact and stem matches, no synonyms or paraphrases; not COCO's METEOR 1.5",
    ]
    return {
        "benchmark": "text",
        "evaluator": software(),
        "dataset": questions.source() | {"revision": revision},
        "predictions": answers.source(),
        "frames": frames,
        "decoding": decoding,
        "questions": len(rows),
        "missing": missing,
        "scores": {
            "model": _scores(rows),
            "frequency": _scores(frequency_baseline(rows, rows)),
        },
        "notes": notes,
    }


def _with_own_ids(questions: RowFile, answers: RowFile) -> RowFile:
    """Returns the answers with the ids of a prepared export replaced by the data set's own ids.

    Raises:
      UserError: a question is answered under both of its ids.
    """
    own = {f"{row['kind']}-{key}": key for key, row in questions.rows.items()}
    rows: dict[str, dict] = {}
    for key, row in answers.rows.items():
        if own.get(key, key) in rows:
            raise UserError(
                f"{answers.path}: question {own.get(key, key)!r} has two predictions, one under "
                "the id of a prepared export"
            )
        rows[own.get(key, key)] = row
    return dataclasses.replace(answers, rows=rows)


def _scores(rows: list[dict]) -> dict[str, float]:
    """Returns `coco_scores` of answered questions, and EM@1 per kind if there are several kinds."""
    targets = [references(row) for row in rows]
    scores = coco_scores([row["prediction"] for row in rows], targets)
    matched: defaultdict[str, float] = defaultdict(float)
    for row, texts in zip(rows, targets, strict=True):
        matched[row["kind"]] += exact_match(row["prediction"], texts)
    counts = Counter(row["kind"] for row in rows)
    if len(counts) > 1:
        scores |= {f"em1/{kind}": 100.0 * matched[kind] / n for kind, n in sorted(counts.items())}
    return scores


def table(scores: Mapping[str, Mapping[str, float]]) -> str:
    """Returns the scores side by side as a text table with one decimal.

    Args:
      scores: column ("model", "frequency") to its scores, with the same keys in every column.
    """
    keys = list(next(iter(scores.values())))
    labels = {key: LABELS.get(key) or f"EM@1, {key.removeprefix('em1/')}" for key in keys}
    rows = [[labels[key], *(f"{column[key]:.1f}" for column in scores.values())] for key in keys]
    return text_table(rows, ["", *scores])
