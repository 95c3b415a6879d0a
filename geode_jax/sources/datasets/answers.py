"""Converts a data set's texts to the fields of a question: options, values, units.

Data sets made for VSI-Bench store its whole prompt. The array contract stores the question and the
options, from which `exports.prompts` composes the prompt.
"""

import re
from typing import Any

from geode_jax.exports import NUMERIC_KINDS, question_rules, units
from geode_jax.exports.kinds import OPEN, VSI_CHOICE_KINDS
from geode_jax.exports.prompts import CHOICE_POST_PROMPT, NUMERIC_POST_PROMPT, PRE_PROMPT
from geode_jax.exports.units import BASE_UNIT
from geode_jax.sources.datasets.questions import MisfitError
from geode_jax.targets import plausible

NO_VALUE = "no_value"
"""Additional key of a question's fields: why an answer that should be a number has no value."""

_MEDIA_TAG = re.compile(r"<(?:image|video)>\s*")
_PLACEHOLDER = re.compile(r"<[A-Za-z_][\w-]*>")
_OPTION = re.compile(r"\(?([A-Z])[.):]\s*(\S.*)")


def text_of(value: Any, what: str) -> str:
    """Returns a text without surrounding white space.

    Args:
        value: any JSON value.
        what: the text's name in messages.

    Raises:
        MisfitError: the value is no text, or empty.
    """
    if not isinstance(value, str) or not value.strip():
        raise MisfitError(f"has no {what}")
    return value.strip()


def read_prompt(text: str) -> tuple[str, list[str]]:
    """Returns the question and the options ("A. chair") of a prompt, without VSI-Bench's frame.

    Raises:
        MisfitError: no question is left, or it has a placeholder for something other than text.
    """
    lines = [line.strip() for line in _MEDIA_TAG.sub("", text).split("\n")]
    frame = ("", PRE_PROMPT, NUMERIC_POST_PROMPT, CHOICE_POST_PROMPT)
    lines = [line for line in lines if line not in frame]
    options: list[str] = []
    while lines and (found := _OPTION.fullmatch(lines[-1])):
        options.insert(0, f"{found[1]}. {found[2]}")
        del lines[-1]
    letters = [option[0] for option in options]
    if letters != [chr(ord("A") + i) for i in range(len(options))] or len(options) == 1:
        raise MisfitError("has options that are not A, B, ...")
    if lines and options and lines[-1] in ("Options:", "Options"):
        del lines[-1]
    question = text_of("\n".join(lines), "question")
    if _PLACEHOLDER.search(question):
        raise MisfitError("has a placeholder in its question")
    return question, options


def question_fields(
    kind: str, question: str, answer: str, options: list[str] | None = None
) -> dict[str, Any]:
    """Returns the fields of a question with its answer.

    Args:
        kind: the project's name of the task, or the data set's own.
        question: without the frame of a prompt.
        answer: as in the data set: a text, a number, an option or its letter.
        options: "A. chair" and so on.

    Returns:
        `kind`, `question`, `answer` and, where they apply, `options`, `value` and `unit`. An answer
        with options is the letter. A number's unit is the one that the answer names, else the one
        that the question names, else that of the kind. If none is clear, or no room can have that
        number, there is no value, and `NO_VALUE` holds the reason. A VSI-Bench kind with an answer
        in words is a different task and becomes `<kind>_open`.

    Raises:
        MisfitError: the answer is not among the options, or two options have the same letter.
    """
    fields: dict[str, Any] = {"kind": kind, "question": question, "answer": answer}
    if options:
        if fault := question_rules.options_fault(options):
            raise MisfitError(f"has {fault[0]} of which {fault[1]}")
        return fields | {"options": options, "answer": _letter(answer, options)}
    try:
        measured = _measured(kind, question, answer)
    except units.UnclearUnitError as unclear:
        fields[NO_VALUE] = str(unclear)
    else:
        if measured:
            return fields | {"value": measured.number, "unit": measured.unit}
    if kind in VSI_CHOICE_KINDS or kind in NUMERIC_KINDS:
        fields["kind"] = f"{kind}{OPEN}"
    return fields


def referenced(
    kind: str, question: str, answers: Any, options: list[str] | None = None
) -> dict[str, Any]:
    """Returns `question_fields` of the first answer, and all of several in `answers`.

    Repeated answers are kept, because CIDEr is a mean over the references.

    Raises:
        MisfitError: there are no answers, or the first is not among the options.
    """
    if not isinstance(answers, list) or not answers:
        raise MisfitError("has no answers")
    texts = [text_of(answer, "answer") for answer in answers]
    fields = question_fields(kind, question, texts[0], options)
    return fields | ({"answers": texts} if len(texts) > 1 and not options else {})


def learned_before_stage_2(fields: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields of a question whose answer GEODE's stages 0 and 1 learn.

    These stages learn the text of `rationale`; a data set decides whether that is its answer.
    """
    return fields | {"rationale": fields["answer"]}


def _letter(answer: str, options: list[str]) -> str:
    """Returns the letter of the option that an answer names; raises MisfitError if none is."""
    found = _OPTION.fullmatch(answer)
    named = (found[1] if found else answer.rstrip(".")).strip()
    for option in options:
        if named in (option[0], option) or answer.lower() == option[3:].lower():
            return option[0]
    quantity = _in_base_units(answer)
    if quantity:
        same = [option[0] for option in options if _in_base_units(option[3:]) == quantity]
        if len(same) == 1:
            return same[0]
    raise MisfitError("has an answer that is none of its options")


def _in_base_units(text: str) -> tuple[str, float] | None:
    """Returns dimension and size of a quantity, the same for "1.9 m" and "190 cm"."""
    quantity = units.read_quantity(text)
    if quantity is None or quantity.unit is None:
        return None
    unit = units.UNITS[quantity.unit]
    return unit.dimension, float(f"{quantity.number * unit.base:.9g}")


def _measured(kind: str, question: str, answer: str) -> units.Quantity | None:
    """Returns an answer's number and unit, None if it is not a measurement.

    Raises:
        UnclearUnitError: the kind needs a number and there is none, its unit is unclear or of
            another quantity than the question's, or no room can have that number.
    """
    usual = units.KIND_UNITS.get(kind)
    asked, unclear = None, None
    try:
        asked = units.asked_unit(question, units.UNITS[usual].dimension if usual else None)
    except units.UnclearUnitError as error:
        unclear = error
    quantity = units.read_quantity(answer, asked)
    if quantity is None:
        if kind in NUMERIC_KINDS:
            raise units.UnclearUnitError("its answer is no single number in a known unit")
        return None
    if unclear and quantity.unit is None:
        raise unclear
    if unclear is None and not (asked or usual):
        return None
    named = [name for name in (quantity.unit, asked, usual) if name]
    if len({units.UNITS[name].dimension for name in named}) > 1:
        raise units.UnclearUnitError("its answer is in a unit of another quantity")
    unit = named[0]
    if unit not in BASE_UNIT:
        return None  # angles have no base unit and stay words
    if not plausible(quantity.number, units.UNITS[unit].dimension, BASE_UNIT[unit]):
        raise units.UnclearUnitError("its number is impossible for a room")
    return units.Quantity(quantity.number, unit)
