"""From a data set's texts to the fields of a question: options, values, units.

Data sets made for VSI-Bench store its whole prompt; the contract stores the question and the
options, and `exports.prompts` puts the prompt together again.
"""

import math
import re
from typing import Any

from geode_jax.data.datasets.questions import MisfitError
from geode_jax.exports import NUMERIC_KINDS
from geode_jax.exports.prompts import (
    CHOICE_POST_PROMPT,
    NUMERIC_POST_PROMPT,
    PRE_PROMPT,
    VSI_CHOICE_KINDS,
)

KIND_UNITS = {
    "object_counting": "items",
    "object_abs_distance": "m",
    "object_size_estimation": "cm",
    "room_size_estimation": "m2",
}
"""VSI-Bench's unit of a kind, where the question does not name one."""

_UNITS = {
    r"square met(?:er|re)s?": "m2",
    r"square (?:feet|foot)": "ft2",
    r"centimet(?:er|re)s?|cm": "cm",
    r"met(?:er|re)s?": "m",
    r"feet|foot": "ft",
    r"inch(?:es)?": "in",
}
_UNIT = re.compile("|".join(rf"\bin ({words})\b" for words in _UNITS), re.IGNORECASE)
_MEDIA_TAG = re.compile(r"<(?:image|video)>\s*")
_PLACEHOLDER = re.compile(r"<[A-Za-z_][\w-]*>")
_OPTION = re.compile(r"\(?([A-Z])[.):]\s*(\S.*)")


def text_of(value: Any, what: str) -> str:
    """A text, stripped.

    Raises:
        MisfitError: it is none, or empty.
    """
    if not isinstance(value, str) or not value.strip():
        raise MisfitError(f"has no {what}")
    return value.strip()


def read_prompt(text: str) -> tuple[str, list[str]]:
    """Question and options ("A. chair") of a prompt, without the words around them.

    Raises:
        MisfitError: no question is left, or it has a placeholder for something that is not text.
    """
    lines = [line.strip() for line in _MEDIA_TAG.sub("", text).split("\n")]
    around = ("", PRE_PROMPT, NUMERIC_POST_PROMPT, CHOICE_POST_PROMPT)
    lines = [line for line in lines if line not in around]
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
    """The fields of a question with its answer.

    Args:
        kind: the project's name of the task, or the data set's own.
        question: without the words of a prompt.
        answer: as the data set has it: a text, a number, an option or its letter.
        options: "A. chair" and so on.

    Returns:
        `kind`, `question`, `answer` and where they apply `options`, `value` and `unit`. An answer
        with options is the letter. The value of a number stands in the unit that the question
        names. A kind of VSI-Bench that is answered in words is another task: `<kind>_open`.

    Raises:
        MisfitError: the answer is none of the options.
    """
    fields: dict[str, Any] = {"kind": kind, "question": question, "answer": answer}
    if options:
        return fields | {"options": options, "answer": _letter(answer, options)}
    value, unit = _number(answer), _unit_of(question)
    if value is not None and (unit or kind in KIND_UNITS):
        return fields | {"value": value, "unit": unit or KIND_UNITS[kind]}
    if kind in VSI_CHOICE_KINDS or (kind in NUMERIC_KINDS and value is None):
        fields["kind"] = f"{kind}_open"
    return fields


def referenced(
    kind: str, question: str, answers: Any, options: list[str] | None = None
) -> dict[str, Any]:
    """`question_fields` of the first answer, and `answers`, all different ones if several.

    Raises:
        MisfitError: there are no answers, or the first is none of the options.
    """
    if not isinstance(answers, list) or not answers:
        raise MisfitError("has no answers")
    texts = list(dict.fromkeys(text_of(answer, "answer") for answer in answers))
    fields = question_fields(kind, question, texts[0], options)
    return fields | ({"answers": texts} if len(texts) > 1 and not options else {})


def _letter(answer: str, options: list[str]) -> str:
    found = _OPTION.fullmatch(answer)
    said = (found[1] if found else answer.rstrip(".")).strip()
    for option in options:
        if said in (option[0], option) or answer.lower() == option[3:].lower():
            return option[0]
    raise MisfitError("has an answer that is none of its options")


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) and abs(value) <= 1e300 else None


def _unit_of(question: str) -> str | None:
    """The unit that a question names last: "measured in feet"."""
    unit = None
    for found in _UNIT.finditer(question):
        group = next(i for i, text in enumerate(found.groups()) if text)
        unit = list(_UNITS.values())[group]
    return unit
