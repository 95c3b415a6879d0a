"""Contradictions inside one question: fields that are each right, and cannot be true together.

Python 3.9, the standard library alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from . import units
from .kinds import COUNT_KINDS

_LETTERED = re.compile(r"\(?([A-Z])(?:[.):]+(?:\s.*)?|\))", re.DOTALL)
_LETTER = re.compile(r"\(?([A-Z])[.):]*")
_ROUNDED = 1.001
"""By which the last digit of a written number may be off: rounded either way, or cut off."""


def contradiction(record: Mapping[str, Any], numeric: bool) -> tuple[str, str] | None:
    """The field that contradicts others and the rule that it breaks, None where all agree.

    Args:
        record: a question whose fields each have the right type.
        numeric: whether its kind is one that a number answers.
    """
    options = record.get("options")
    if options:
        if "value" in record and not numeric:
            return "value", "a choice among options has none"
        fault = options_fault(options, None if numeric else record["answer"])
        if fault:
            return fault
    fault = _unit_fault(record)
    if fault:
        return "unit", fault
    fault = _number_fault(record)
    return ("value", fault) if fault else None


def options_fault(options: Sequence[str], answer: str | None = None) -> tuple[str, str] | None:
    """The field and what is wrong with it: `options`, or `answer`, which is none of them.

    Options have the letters A, B, ... in front ("A. chair", "(A) chair"), or none has. An answer in
    words is not looked at.
    """
    found = [_LETTERED.fullmatch(option.strip()) for option in options]
    expected = [chr(ord("A") + i) for i in range(len(options))]
    if all(found):
        letters = [each[1] for each in found if each]
        if len(set(letters)) < len(letters):
            return "options", "two have the same letter"
    elif any(found):
        return "options", "some have a letter in front and some have none"
    else:
        letters = expected
    said = None if answer is None else _LETTER.fullmatch(answer.strip())
    if said is None and answer is not None and all(found):
        said = _LETTERED.fullmatch(answer.strip())
    if said and said[1] not in letters and answer not in options:
        return "answer", f"{said[1]} is the letter of none of the {len(options)} options"
    return None


def _unit_fault(record: Mapping[str, Any]) -> str:
    """What is wrong with the unit; one that is not known is left to whoever needs it."""
    usual = units.KIND_UNITS.get(record["kind"])
    unit = units.read_unit(record["unit"]) if "unit" in record else None
    if usual is None or unit is None:
        return ""
    own, asked = units.UNITS[unit].dimension, units.UNITS[usual].dimension
    return "" if own == asked else f"one of {own}, where the kind asks for one of {asked}"


def _number_fault(record: Mapping[str, Any]) -> str:
    said = units.read_quantity(record["answer"])
    value = record.get("value", said.number if said else None)
    if value is None:
        return ""
    if record["kind"] in COUNT_KINDS and (value < 0 or value != int(value)):
        return "a count must be a whole number, not negative"
    if said is None or "value" not in record or _same(record, said):
        return ""
    return "another number than that of the answer"


def _same(record: Mapping[str, Any], said: units.Quantity) -> bool:
    """Whether an answer's number is the value, rounded or in another unit of the same quantity.

    The unit of a bare number may be that of the record, of the question, or of the kind.
    """
    value, answer = float(record["value"]), record["answer"]
    decimals = re.search(r"\.([0-9]+)", answer)
    step = 10.0 ** -len(decimals[1]) if decimals else 1.0
    if "e" in answer.lower() and said.number == value:
        return True
    unit = units.read_unit(record["unit"]) if "unit" in record else None
    try:
        asked = units.asked_unit(record["question"])
    except units.UnclearUnitError:
        return True  # which unit the bare number is in cannot be told
    usual = units.KIND_UNITS.get(record["kind"])
    unit = unit or said.unit or asked or usual
    names = [said.unit] if said.unit else [unit, asked, usual]
    for name in names:
        scale = 1.0
        if name and unit:
            if units.UNITS[name].dimension != units.UNITS[unit].dimension:
                continue
            scale = units.UNITS[unit].base / units.UNITS[name].base
        if abs(value * scale - said.number) <= _ROUNDED * step + 1e-6 * abs(said.number):
            return True
    return False
