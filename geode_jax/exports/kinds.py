"""Kinds of questions: the one table from which units, prompts, metrics and labels are derived.

A new kind that an export may carry needs no row: its questions are scored by their own fields. A
row gives a kind an answer form, a unit, a benchmark task and a label in tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

NUMBER, OPTION, RELATION, BOX, SENTENCE, TEXT = (
    *("number", "option", "relation", "box", "sentence", "text"),
)
"""Forms of an answer: a number with a unit, an option's letter, one of two or three words that
name a relation, a 3D box, one descriptive sentence, other text."""


ROUTE, CANDIDATES = "route", "candidates"
"""What the `objects` of a question are: the places of a route in order (start, object faced, stops,
destination), or the candidates of a choice and the one object that distances are measured from."""

DIRECTION_TASK = "object_rel_direction"
"""The one task of VSI-Bench that has several kinds; its score is their mean."""

OPEN = "_open"
"""Suffix of a kind whose question is put without options or is answered by no number. VSI-590K
asks some tasks of VSI-Bench so."""


class Kind(NamedTuple):
    """One kind of question.

    Attributes:
        form: form of the answer, one of the six above.
        label: label of its score in tables; "" for a kind that is shown under its name.
        unit: unit of the answer where neither question nor answer names one; a key of
            `units.UNITS`.
        task: the task of VSI-Bench (Yang et al., 2024, Table 1) that the kind counts towards.
        objects: what the named objects are, `ROUTE` or `CANDIDATES`; "" for no fixed roles.
    """

    form: str
    label: str = ""
    unit: str = ""
    task: str = ""
    objects: str = ""


KINDS: dict[str, Kind] = {
    # Hidden-CoT paper, Sec. IV-B, "Specialized 3D Spatial Reasoning".
    "proximity": Kind(RELATION, "proximity"),
    "contact": Kind(RELATION, "contact"),
    "size_comparison": Kind(RELATION, "size comparison"),
    "orientation": Kind(RELATION, "orientation"),
    # VSI-Bench.
    "object_counting": Kind(NUMBER, "object counting (MRA)", "items", "object_counting"),
    "object_abs_distance": Kind(NUMBER, "absolute distance (MRA)", "m", "object_abs_distance"),
    "object_size_estimation": Kind(NUMBER, "object size (MRA)", "cm", "object_size_estimation"),
    "room_size_estimation": Kind(NUMBER, "room size (MRA)", "m2", "room_size_estimation"),
    "object_rel_distance": Kind(
        OPTION, "relative distance", task="object_rel_distance", objects=CANDIDATES
    ),
    "object_rel_direction_easy": Kind(OPTION, "relative direction, easy", task=DIRECTION_TASK),
    "object_rel_direction_medium": Kind(OPTION, "relative direction, medium", task=DIRECTION_TASK),
    "object_rel_direction_hard": Kind(OPTION, "relative direction, hard", task=DIRECTION_TASK),
    "route_planning": Kind(OPTION, "route planning", task="route_planning", objects=ROUTE),
    "obj_appearance_order": Kind(OPTION, "appearance order", task="obj_appearance_order"),
    # Rooms.
    "scene_description": Kind(SENTENCE, "scene description (ROUGE-1 F)"),
    "object_box": Kind(BOX),
    # RGB-D folders.
    "surface_distance": Kind(NUMBER, unit="m"),
    "nearer_view": Kind(TEXT),
    "camera_motion": Kind(NUMBER, unit="m"),
    "space_size": Kind(NUMBER, unit="m"),
    "left_right": Kind(TEXT),
    "above_below": Kind(TEXT),
    # Data sets.
    "scanqa": Kind(TEXT),
    "caption": Kind(TEXT),
    "instruction": Kind(TEXT),
    "ssr_cot": Kind(TEXT),
    "vica_thinking": Kind(TEXT),
    **{f"sqa3d_{word}": Kind(TEXT) for word in ("what", "is", "how", "can", "which", "other")},
}
KINDS.update(
    {f"{name}{OPEN}": Kind(TEXT) for name, kind in KINDS.items() if kind.form in (NUMBER, OPTION)}
)

COUNT_KINDS = tuple(name for name, kind in KINDS.items() if kind.unit == "items")
"""Kinds whose answer is a whole number of things; all other numeric kinds measure something."""

RELATIONS = (
    "left_right",
    "above_below",
    "proximity",
    "contact",
    "size_comparison",
    "orientation",
)
"""Keys of a question's `relation`; each value is the probability of the first alternative. The
spatial head has one output for each, in this order."""


def _of(form: str, *, benchmark: bool = False) -> tuple[str, ...]:
    return tuple(
        name for name, kind in KINDS.items() if kind.form == form and (kind.task or not benchmark)
    )


NUMERIC_KINDS = _of(NUMBER)
"""Kinds whose answer is a number: a record has `value`, or an answer that reads as a number."""

VSI_NUMERIC_KINDS = _of(NUMBER, benchmark=True)
"""VSI-Bench types answered by a number."""

VSI_CHOICE_KINDS = _of(OPTION, benchmark=True)
"""VSI-Bench types answered by an option's letter."""

RELATION_KINDS = _of(RELATION)
"""The four relations; their mean is the Hidden-CoT paper's spatial accuracy (Sec. IV-B)."""

_ANSWERS = {"contact": ("yes", "no"), "orientation": ("left", "right")}
_NAMED = {"proximity": (1, 2), "size_comparison": (0, 1)}
"""Relation -> its two answers, or the named objects whose nouns they are."""


def alternatives(record: Mapping[str, Any]) -> tuple[str, str] | None:
    """Returns the two answers of a question about one of the four relations, None for others.

    The record's `relation` is the probability of the first.
    """
    kind = record["kind"]
    if kind in _NAMED:
        objects = record.get("objects", ())
        if len(objects) <= max(_NAMED[kind]):
            return None
        first, second = (objects[n]["name"] for n in _NAMED[kind])
        return first, second
    return _ANSWERS.get(kind)


DIRECTION_KINDS = tuple(name for name, kind in KINDS.items() if kind.task == DIRECTION_TASK)
"""The kinds of `DIRECTION_TASK`: easy, medium and hard."""

VSI_TASKS = tuple(dict.fromkeys(kind.task for kind in KINDS.values() if kind.task))
"""The eight tasks of VSI-Bench, in the order of its tables."""
