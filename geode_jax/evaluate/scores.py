"""All scores of a run under one set of keys, their table, and the frequency baseline."""

import dataclasses
import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

from geode_jax.errors import one_line
from geode_jax.evaluate.metrics import spatial as spatial_metrics
from geode_jax.evaluate.metrics import text as text_metrics
from geode_jax.evaluate.text_table import text_table
from geode_jax.exports.kinds import (
    KINDS,
    RELATION,
    RELATION_KINDS,
    VSI_CHOICE_KINDS,
    VSI_NUMERIC_KINDS,
)


@dataclasses.dataclass(frozen=True)
class Row:
    """How one score is shown in tables and in the report.

    Attributes:
      key: of the score.
      label: in tables.
      group: heading under which it stands.
      better: "higher", "lower", or "" where neither is better.
      bounded: True for scores in [0, 1].
    """

    key: str
    label: str
    group: str
    better: str = "higher"
    bounded: bool = True


VSI_CHOICES = tuple(
    dict.fromkeys(name for kind in VSI_CHOICE_KINDS for name in (KINDS[kind].task, kind))
)
"""Scores of VSI-Bench's choices in the order of its tables; the mean of a task stands before its
kinds."""

_SPATIAL = "Spatial relations"
_VSI = "Numbers and VSI-Bench tasks"
_OTHER = "Other questions"
_TEXT = "Text"
_DEPTH = "Depth and detection"
_RUN = "Validation"
_TEACHER = "Percent of teacher"

ROWS = (
    Row("spatial_accuracy", "spatial accuracy (mean)", _SPATIAL),
    Row("spatial_relations", "relations in that mean (of 4)", _SPATIAL, better="", bounded=False),
    *(Row(kind, KINDS[kind].label, _SPATIAL) for kind in RELATION_KINDS),
    Row("mra", "mean relative accuracy (mean)", _VSI),
    Row("metric_mra", "mean relative accuracy without counting", _VSI),
    *(Row(kind, KINDS[kind].label, _VSI) for kind in VSI_NUMERIC_KINDS),
    *(
        Row(name, KINDS[name].label if name in KINDS else "relative direction (mean)", _VSI)
        for name in VSI_CHOICES
    ),
    Row("vsi_overall", "VSI-Bench overall (macro)", _VSI),
    Row("vsi_tasks", "VSI-Bench tasks present (of 8)", _VSI, better="", bounded=False),
    *(
        Row(name, kind.label, _OTHER)
        for name, kind in KINDS.items()
        if kind.label and not kind.task and kind.form != RELATION
    ),
    Row("rouge1", "ROUGE-1 F", _TEXT),
    Row("rouge1_precision", "ROUGE-1 precision", _TEXT),
    Row("rouge1_recall", "ROUGE-1 recall", _TEXT),
    Row("rouge2", "ROUGE-2 F", _TEXT),
    Row("rouge2_precision", "ROUGE-2 precision", _TEXT),
    Row("rouge2_recall", "ROUGE-2 recall", _TEXT),
    Row("rougeL", "ROUGE-L F", _TEXT),
    Row("rougeL_precision", "ROUGE-L precision", _TEXT),
    Row("rougeL_recall", "ROUGE-L recall", _TEXT),
    Row("bleu1", "BLEU-1", _TEXT),
    Row("bleu2", "BLEU-2", _TEXT),
    Row("bleu3", "BLEU-3", _TEXT),
    Row("bleu4", "BLEU-4", _TEXT),
    Row("meteor", "METEOR (exact + stem)", _TEXT),
    Row("rouge1_per_word", "ROUGE-1 F per word", _TEXT, bounded=False),
    Row("answer_words", "words per answer", _TEXT, better="", bounded=False),
    Row("reference_words", "words per reference", _TEXT, better="", bounded=False),
    Row("length_ratio", "answer / reference length", _TEXT, better="", bounded=False),
    Row("depth_rmse", "depth RMSE", _DEPTH, better="lower", bounded=False),
    Row("depth_mae", "depth MAE", _DEPTH, better="lower", bounded=False),
    Row("depth_delta1", "depth delta < 1.25", _DEPTH),
    *(
        Row(f"detection_{key}_{iou}", f"detection {label} at IoU 0.{iou}", _DEPTH)
        for iou in ("25", "50")
        for key, label in (
            ("precision", "precision"),
            ("recall", "recall"),
            ("f1", "F1"),
            ("map", "mAP"),
        )
    ),
    Row("val_loss", "validation loss", _RUN, better="lower", bounded=False),
    Row("val_text_loss", "validation loss, text only", _RUN, better="lower", bounded=False),
    Row("questions", "questions scored", _RUN, better="", bounded=False),
)
"""Every known score in the order of the table; an unknown kind is shown under its key."""

PERCENT_PREFIX = "percent_of_teacher/"
"""Prefix of the key of a score that is given as "% of teacher"."""

PERCENT_KEYS = (
    *("spatial_accuracy", *RELATION_KINDS, "mra"),
    *("rouge1", "rougeL", "bleu1", "meteor"),
)
"""The scores that Sec. IV-B prints as "% of teacher", and the MRA of numbers."""

_KNOWN = {row.key: row for row in ROWS}

_TAKEN = _KNOWN.keys() - KINDS.keys()
_OWN_KIND = "kind/"
"""Prefix of the score of an export's own kind of questions whose name is that of a score."""

COLUMN_TITLES = {"vision_removed": "vision removed"}


def frequency_baseline(
    train_records: Iterable[dict], eval_records: Sequence[dict], reference: str = "truth"
) -> list[dict]:
    """Answers every question with the most common training answer of its kind.

    Ties are broken by string order, so the result does not depend on the order of the records. A
    kind that does not occur in training is answered with "".

    Args:
      train_records: question records.
      eval_records: question records to be answered.
      reference: the answers to count, "truth" or "teacher".

    Returns:
      `eval_records`, copied, each with its "prediction".
    """
    counts = defaultdict(Counter)
    for record in train_records:
        targets = text_metrics.references(record, reference)
        if targets:
            counts[record["kind"]][targets[0]] += 1
    common = {
        kind: min(counter.items(), key=lambda item: (-item[1], item[0]))[0]
        for kind, counter in counts.items()
    }
    return [{**record, "prediction": common.get(record["kind"], "")} for record in eval_records]


def score(predictions: Sequence[dict], reference: str = "truth") -> dict[str, float]:
    """Returns spatial and text scores of generated answers; `ROWS` has their keys.

    A score without questions has no key. `questions` is the number of answers scored. With
    reference "teacher" every accuracy is agreement with the teacher, as in the paper.

    Args:
      predictions: question records with the generated text under "prediction".
      reference: "truth" or "teacher"; records without such an answer are left out.

    Raises:
      ValueError: no predictions.
      UserError: none of them has such an answer.
    """
    kept = text_metrics.with_reference(predictions, reference)
    named = [{**r, "kind": _OWN_KIND + r["kind"]} if _is_taken(r["kind"]) else r for r in kept]
    return {
        **spatial_metrics.spatial_scores(named, reference),
        **text_metrics.text_scores(kept, reference),
        "questions": float(len(kept)),
    }


def _is_taken(kind: str) -> bool:
    """Returns whether a kind's score would stand under the key of another score."""
    return kind in _TAKEN or kind.startswith((_OWN_KIND, PERCENT_PREFIX))


def percent_of_teacher(predictions: Sequence[dict]) -> dict[str, float]:
    """Returns the paper's "% of teacher": scores against the teacher's answers, times 100.

    The teacher scores 100 against itself by definition (Sec. IV-B), except for METEOR, which is
    below 1 for equal texts.

    Returns:
      Those of `PERCENT_KEYS` that occur; empty if no question has a teacher's answer.
    """
    if not any(text_metrics.references(record, "teacher") for record in predictions):
        return {}
    found = score(predictions, "teacher")
    return {key: 100.0 * found[key] for key in PERCENT_KEYS if key in found}


def row_of(key: str) -> Row:
    """Returns how a score is shown; an unknown key is the accuracy of a kind of question.

    A key may begin with `PERCENT_PREFIX`.
    """
    if key.startswith(PERCENT_PREFIX):
        label = row_of(key.removeprefix(PERCENT_PREFIX)).label
        return Row(key, label, _TEACHER, bounded=False)
    return _KNOWN.get(key) or Row(key, one_line(key.replace("_", " "), 80), _OTHER)


def rows_of(scores: Mapping[str, Mapping[str, float]]) -> list[Row]:
    """Returns the rows of all scores that occur in any column, in the order of `ROWS`."""
    keys = {key: None for column in scores.values() for key in column}
    rows = [row_of(key) for key in keys]
    groups = [*dict.fromkeys(row.group for row in ROWS), _TEACHER]
    order = {row.key: i for i, row in enumerate(ROWS)}

    def place(row: Row) -> tuple[int, int]:
        key = row.key.removeprefix(PERCENT_PREFIX)
        return groups.index(row.group), order.get(key, len(order))

    return sorted(rows, key=place)


def format_score(value: float | None, row: Row) -> str:
    """Returns a score as text: three decimals, counts without decimals, "-" for None."""
    if value is None:
        return "-"
    if not math.isfinite(value):
        return str(value)
    if row.group == _TEACHER:
        return f"{value:.1f} %"
    if row.key in ("questions", "spatial_relations", "vsi_tasks"):
        return f"{value:,.0f}"
    return f"{value:.4f}" if row.key == "rouge1_per_word" else f"{value:.3f}"


def score_table(
    scores: Mapping[str, Mapping[str, float]], notes: Mapping[str, str] | None = None
) -> str:
    """Returns the scores side by side as an aligned text table.

    Args:
      scores: column name ("model", "vision_removed", "frequency", ...) to its scores.
      notes: score key to a remark beside its label, such as "input contains depth".

    Raises:
      ValueError: no column has any score.
    """
    rows = rows_of(scores)
    if not rows:
        raise ValueError("no scores to show")
    notes = notes or {}
    titles = [COLUMN_TITLES.get(name, name) for name in scores]

    def label(row: Row) -> str:
        marks = ["lower is better"] if row.better == "lower" else []
        if row.key in notes:
            marks.append(notes[row.key])
        return f"  {row.label}" + (f" ({', '.join(marks)})" if marks else "")

    lines: list[list[str]] = []
    for group, grouped in itertools.groupby(rows, key=lambda row: row.group):
        lines.append([group])
        for row in grouped:
            cells = (format_score(column.get(row.key), row) for column in scores.values())
            lines.append([label(row), *cells])
    return text_table(lines, ["", *titles])


def loss_table(losses: Mapping[str, float]) -> str:
    """Returns losses by name as an aligned text table."""
    return text_table([[name, f"{loss:.3f}"] for name, loss in sorted(losses.items())])
