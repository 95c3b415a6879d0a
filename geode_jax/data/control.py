"""Control tokens: the questions that GEODE answers by regression (Sec. 2.2), and the values."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from geode_jax.exports import NUMERIC_KINDS, units
from geode_jax.exports.units import BASE_UNIT
from geode_jax.targets import LOG_VALUES, held_boxes, plausible

REG, BOX = "<REG>", "<3DBBOX>"
"""The tokens of a number and of a box. The hidden state there is regressed, see `models.drh`."""


class NoNumberError(ValueError):
    """A question has no number that can be regressed; the message is the reason."""


class Number(NamedTuple):
    """A value in the unit of its question, and the size of that unit in base units."""

    value: float
    base_unit: float


def control_of(record: Mapping[str, Any]) -> str:
    """Returns the token that answers a question: BOX, REG, or "" if words answer it."""
    if "box" in record:
        return BOX
    if record["kind"] in NUMERIC_KINDS:
        return REG
    return REG if "value" in record and not record.get("options") else ""  # a choice is its letter


def number_of(record: Mapping[str, Any]) -> Number:
    """Returns the number that is regressed for a question that a number answers.

    Raises:
        NoNumberError: the answer is no number; its unit is unknown, unclear or not the one that
            the question asks for; or the value is outside `targets.LOG_VALUES` or not
            `targets.plausible`.
    """
    answer = units.read_quantity(record["answer"])
    value = record.get("value", answer.number if answer else None)
    if value is None:
        raise NoNumberError("the answer is no number")
    unit = unit_of(record)
    base = 1.0 if unit is None else BASE_UNIT[unit]
    if not value > 0:
        raise NoNumberError("the value is zero or negative, and its logarithm is learned")
    low, high = LOG_VALUES
    if not low <= math.log(value) + math.log(base) <= high:
        raise NoNumberError("the value is not from 0.01 to 59,874 base units")
    if unit is not None and not plausible(value, units.UNITS[unit].dimension, base):
        raise NoNumberError("the value is impossible for a room: too large, or a part of an item")
    return Number(float(value), base)


def why_not_regressed(record: Mapping[str, Any]) -> str:
    """Returns why a question with a control token has no value to regress, "" if it has one."""
    token = control_of(record)
    if token == BOX and not held_boxes(record["box"]):
        return "the box cannot be encoded"
    if token == REG:
        try:
            number_of(record)
        except NoNumberError as error:
            return str(error)
    return ""


def unit_of(record: Mapping[str, Any]) -> str | None:
    """Returns the unit of a question's value, one of `BASE_UNIT`; None if nothing names a unit.

    The first of these that names a unit decides: the record, the answer, the question, the kind.

    Raises:
        NoNumberError: the unit is unknown or unclear, or the record and its words disagree.
    """
    answer = units.read_quantity(record.get("answer", ""))
    usual = units.KIND_UNITS.get(record["kind"])
    named = answer.unit if answer else None
    if named is None:
        try:
            dimension = units.UNITS[usual].dimension if usual else None
            named = units.asked_unit(record.get("question", ""), dimension)
        except units.UnclearUnitError as unclear:
            if "unit" not in record:
                raise NoNumberError(str(unclear)) from None
    if "unit" not in record:
        unit = named or usual
        if unit is None:
            return None
    else:
        unit = units.read_unit(record["unit"])
        # A value that is not the answer's number may have been converted, and is trusted.
        if answer and answer.number == record.get("value") and named and named != unit:
            raise NoNumberError("its unit is not the one that its question or answer names")
    if unit not in BASE_UNIT:
        raise NoNumberError("its unit is unknown or not regressed")
    return unit


def answer_unit(record: Mapping[str, Any]) -> str | None:
    """Returns the unit in which a predicted value is written; None (base units) if unclear."""
    try:
        return unit_of(record)
    except NoNumberError:
        return None
