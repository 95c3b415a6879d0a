"""Accuracy of spatial answers: the paper's four relations and VSI-Bench's eight tasks.

Every question is scored in [0, 1] from its generated text by one of four rules:

| rule | questions | score |
|---|---|---|
| relation | proximity, contact, size_comparison, orientation and other short answers | equal text |
| letter | multiple choice | VSI-Bench: equal letter; equal text where the answer has none |
| number | `value` without a choice, or a numeric kind | VSI-Bench: mean relative accuracy |
| text | scene_description | ROUGE-1 F1 |

"Equal text" means after lower-casing, collapsing white space and dropping a final ".". The rules of
VSI-Bench are those of vision-x-nyu/thinking-in-space, `lmms_eval/tasks/vsibench/utils.py`.
"""

import re
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from geode_jax.evaluate.metrics import text as text_metrics
from geode_jax.exports.kinds import (
    COUNT_KINDS,
    DIRECTION_KINDS,
    DIRECTION_TASK,
    KINDS,
    NUMERIC_KINDS,
    RELATION_KINDS,
    SENTENCE,
    VSI_CHOICE_KINDS,
    VSI_NUMERIC_KINDS,
    VSI_TASKS,
)

_CONFIDENCES = np.linspace(0.5, 0.95, 10)


def normalise(text: str) -> str:
    """Returns the text in lower case, white space collapsed, without a final full stop."""
    return " ".join(text.lower().split()).rstrip(".").rstrip()


def relation_accuracy(prediction: str, targets: Sequence[str]) -> float:
    """Returns 1.0 if the answer equals one of the references after `normalise`, else 0.0."""
    return float(normalise(prediction) in {normalise(target) for target in targets})


def fuzzy_matching(prediction: str) -> str:
    """Returns the text up to the first space, without a final full stop: VSI-Bench's parser.

    Only a space separates words: "A. chair" becomes "A", but "B) chair" becomes "B)", and a newline
    does not separate.
    """
    return prediction.split(" ")[0].rstrip(".").strip()


def letter_accuracy(prediction: str, target: str) -> float:
    """Returns VSI-Bench's score of a multiple choice: 1.0 if the letters are equal up to case."""
    return float(fuzzy_matching(prediction).lower() == target.lower())


_LETTER = re.compile(r"\(?([A-Z])(?:[.):]+(?:\s.*)?|\))|([A-Za-z])\.?", re.DOTALL)
"""A letter alone ("A", "b."), or an option with its letter in front ("A. chair", "(A) chair")."""


def letter_of(target: str) -> str | None:
    """Returns the letter of an option: "A" for "A", "A. chair" and "(A) chair"; None for words."""
    found = _LETTER.fullmatch(target.strip())
    return (found[1] or found[2]) if found else None


def choice_accuracy(prediction: str, target: str) -> float:
    """Returns 1.0 if an answer is the option that the target names, else 0.0.

    A target with a letter is compared by VSI-Bench's rule. One in words is compared as a whole,
    since the first words of two options may be equal ("dining table", "dining chair").
    """
    letter = letter_of(target)
    if letter is None:
        return relation_accuracy(prediction, [target])
    same = fuzzy_matching(target) != letter and relation_accuracy(prediction, [target])
    return max(letter_accuracy(prediction, letter), float(same))


def mean_relative_accuracy(prediction: float, target: float) -> float:
    """Returns VSI-Bench's MRA: the share of 10 thresholds c with |p - t| / |t| <= 1 - c.

    c runs over 0.5, 0.55, ..., 0.95. The benchmark's code has "<=" where its paper writes "<".

    Args:
      prediction: may be NaN or infinite, which scores 0.
      target: a target of 0 scores 1.0 if hit exactly, else 0.0 (upstream divides by zero).

    Returns:
      A multiple of 0.1 in [0, 1].
    """
    if target == 0:
        return float(prediction == 0)
    error = abs(prediction - target) / abs(target)
    return float(np.mean(error <= 1 - _CONFIDENCES))


def number_accuracy(prediction: str, target: str) -> float:
    """Returns the MRA of the first word of an answer; 0 if it is no number ("three", "1,200")."""
    try:
        value, truth = float(fuzzy_matching(prediction)), float(fuzzy_matching(target))
    except ValueError:
        return 0.0
    return mean_relative_accuracy(value, truth)


def rule(record: dict) -> str:
    """Returns the name of the rule of the module docstring that scores this question."""
    kind = record["kind"]
    if kind in RELATION_KINDS:
        return "relation"
    if kind in KINDS and KINDS[kind].form == SENTENCE:
        return "text"
    if kind in VSI_NUMERIC_KINDS:
        return "number"
    has_value = record.get("value") is not None
    chooses = record.get("options") and not (has_value and kind in NUMERIC_KINDS)
    if kind in VSI_CHOICE_KINDS or chooses:
        return "letter"
    return "number" if has_value or kind in NUMERIC_KINDS else "relation"


def question_score(record: dict, reference: str = "truth") -> float:
    """Returns the score in [0, 1] of one prediction by its rule, the best over its references.

    Raises:
      ValueError: the record has no reference of this sort.
    """
    targets = text_metrics.references(record, reference)
    if not targets:
        raise ValueError(f"question {record.get('id')}: no {reference} answer")
    text = record["prediction"]
    match rule(record):
        case "relation":
            return relation_accuracy(text, targets)
        case "letter":
            # A teacher may answer "A. chair" where the truth is "A": both are parsed alike.
            return max(choice_accuracy(text, target) for target in targets)
        case "number":
            # VSI-Bench cannot parse some truths ("1,900 mm"); `value` has their number.
            if reference == "truth" and record.get("value") is not None:
                targets = [*targets, str(record["value"])]
            return max(number_accuracy(text, target) for target in targets)
        case _:
            return text_metrics.rouge(text, tuple(targets))["rouge1"][2]


def per_kind_scores(predictions: Sequence[dict], reference: str = "truth") -> dict[str, float]:
    """Returns the mean score of each kind of question, in order of first appearance."""
    found = defaultdict(list)
    for record in text_metrics.with_reference(predictions, reference):
        found[record["kind"]].append(question_score(record, reference))
    return {kind: sum(values) / len(values) for kind, values in found.items()}


def add_mean(scores: dict[str, float], key: str, members: Sequence[str]) -> None:
    """Sets `key` to the mean of those `members` that occur in `scores`, if any does."""
    values = [scores[member] for member in members if member in scores]
    if values:
        scores[key] = sum(values) / len(values)


def spatial_scores(predictions: Sequence[dict], reference: str = "truth") -> dict[str, float]:
    """Returns per-kind scores and their means; a mean over kinds that do not occur is left out.

    Keys besides the kinds:
      `spatial_accuracy`: mean of the accuracies of the four relations that occur.
      `spatial_relations`: number of the four relations that occur, where it is not all.
      `mra`: mean over the numeric kinds of the kind's MRA.
      `metric_mra`: the same without `COUNT_KINDS`, over the kinds that measure something.
      `object_rel_direction`: mean of its easy, medium and hard accuracies (of those that occur).
      `vsi_overall`: unweighted mean over the VSI-Bench tasks that occur; it is the benchmark's
        overall score (times 100 there) only if all eight occur.
      `vsi_tasks`: number of the eight tasks that occur.

    Raises:
      ValueError: no predictions.
      UserError: no prediction has such a reference.
    """
    kinds = per_kind_scores(predictions, reference)
    numeric = {record["kind"] for record in predictions if rule(record) == "number"}
    scores = dict(kinds)
    add_mean(scores, "spatial_accuracy", RELATION_KINDS)
    occur = sum(kind in scores for kind in RELATION_KINDS)
    if 0 < occur < len(RELATION_KINDS):
        scores["spatial_relations"] = float(occur)
    add_mean(scores, "mra", sorted(numeric))
    add_mean(scores, "metric_mra", sorted(numeric.difference(COUNT_KINDS)))
    add_mean(scores, DIRECTION_TASK, DIRECTION_KINDS)
    add_mean(scores, "vsi_overall", VSI_TASKS)
    if "vsi_overall" in scores:
        scores["vsi_tasks"] = float(sum(task in scores for task in VSI_TASKS))
    return scores
