"""Contradictions inside a question: fields that are each valid but cannot be true together.

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
_POWER_OF_TEN = re.compile(r"[0-9.]e[+-]?[0-9]", re.IGNORECASE)
_ROUNDED = 1.001
"""Largest error of a written number, which may be truncated, in units of its last digit."""


def contradiction(record: Mapping[str, Any], numeric: bool) -> tuple[str, str] | None:
    """Returns (field that contradicts the others, rule that it breaks), or None.

    Args:
        record: a question whose fields have valid types.
        numeric: whether questions of its kind are answered by a number.
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


def option_text(option: str) -> str:
    """Returns an option without the letter in front: "chair" for "A. chair" and "(A) chair"."""
    found = _LETTERED.fullmatch(option.strip())
    return option.strip()[found.end(1) :].lstrip(".):").strip() if found else option.strip()


def options_fault(options: Sequence[str], answer: str | None = None) -> tuple[str, str] | None:
    """Returns (field, rule that it breaks) of options and an answer, or None.

    Either all options begin with the letters A, B, ... ("A. chair", "(A) chair") or none does. The
    answer may not be the letter of a missing option; an answer in words is not checked.
    """
    found = [_LETTERED.fullmatch(option.strip()) for option in options]
    expected = [chr(ord("A") + i) for i in range(len(options))]
    if all(found):
        letters = [each[1] for each in found if each]
        if len(set(letters)) < len(letters):
            return "options", "two have the same letter"
    elif any(found):
        return "options", "some begin with a letter and some do not"
    else:
        letters = expected
    letter = None if answer is None else _LETTER.fullmatch(answer.strip())
    if letter is None and answer is not None and all(found):
        letter = _LETTERED.fullmatch(answer.strip())
    if letter and letter[1] not in letters and answer not in options:
        return "answer", f"{letter[1]} is the letter of none of the {len(options)} options"
    return None


def _unit_fault(record: Mapping[str, Any]) -> str:
    """Returns the rule that the unit breaks, or ""; an unknown unit breaks none."""
    usual = units.KIND_UNITS.get(record["kind"])
    unit = units.read_unit(record["unit"]) if "unit" in record else None
    if usual is None or unit is None:
        return ""
    own, asked = units.UNITS[unit].dimension, units.UNITS[usual].dimension
    return "" if own == asked else f"a unit of {own}, but the kind asks for one of {asked}"


def _number_fault(record: Mapping[str, Any]) -> str:
    answer = units.read_quantity(record["answer"])
    value = record.get("value", answer.number if answer else None)
    if value is None:
        return ""
    if record["kind"] in COUNT_KINDS and (value < 0 or value != int(value)):
        return "a count must be a whole number, not negative"
    if answer is None or "value" not in record or _same(record, answer):
        return ""
    return "differs from the number in the answer"


def _same(record: Mapping[str, Any], quantity: units.Quantity) -> bool:
    """Returns whether an answer's number is the value, rounded or in another unit of its dimension.

    A number without a unit may have the unit of the record, of the question or of the kind.
    """
    value, answer = float(record["value"]), record["answer"]
    decimals = re.search(r"\.([0-9]+)", answer)
    step = 10.0 ** -len(decimals[1]) if decimals else 1.0
    if _POWER_OF_TEN.search(answer) and quantity.number == value:
        return True
    unit = units.read_unit(record["unit"]) if "unit" in record else None
    try:
        asked = units.asked_unit(record["question"])
    except units.UnclearUnitError:
        return True  # the unit of the number is unknown
    usual = units.KIND_UNITS.get(record["kind"])
    unit = unit or quantity.unit or asked or usual
    names = [quantity.unit] if quantity.unit else [unit, asked, usual]
    for name in names:
        scale = 1.0
        if name and unit:
            if units.UNITS[name].dimension != units.UNITS[unit].dimension:
                continue
            scale = units.UNITS[unit].base / units.UNITS[name].base
        if abs(value * scale - quantity.number) <= _ROUNDED * step + 1e-6 * abs(quantity.number):
            return True
    return False
