"""Documented ranges of configuration classes: `__post_init__` checks them here, in one line."""

import math
import numbers
from collections.abc import Callable, Collection
from typing import Any

from geode_jax.errors import UserError

Range = tuple[Callable[[Any], bool], str]
"""What must hold of a value, and the same in words."""


def whole(least: int) -> Range:
    """Whole numbers from `least`."""

    def holds(value: Any) -> bool:
        return isinstance(value, numbers.Integral) and value is not True and value >= least

    return holds, f"a whole number of at least {least}"


def real(least: float = -math.inf, most: float = math.inf, *, above: bool = False) -> Range:
    """Finite numbers from `least`, which is none of them where `above`, to `most`."""

    def holds(value: Any) -> bool:
        good = isinstance(value, numbers.Real) and math.isfinite(value) and least <= value <= most
        return good and not (above and value == least)

    low = f"above {least:g}" if above else f"of at least {least:g}"
    return holds, f"a number {low}" + (f" and at most {most:g}" if most < math.inf else "")


def one_of(choices: Collection[Any]) -> Range:
    """Some values."""
    shown = ", ".join(map(str, choices))
    return lambda value: any(value == choice for choice in choices), f"one of {shown}"


DTYPES = one_of(("float32", "bfloat16", "float16"))


def check(config: Any, fields: dict[str, Range]) -> None:
    """Refuses a configuration with a field out of its range.

    Args:
        config: a dataclass.
        fields: names, several with spaces between, and their range.

    Raises:
        UserError: `Class: field: value is not range`.
    """
    for names, (holds, rule) in fields.items():
        for name in names.split():
            value = getattr(config, name)
            if not holds(value):
                raise UserError(f"{type(config).__name__}: {name}: {value!r} is not {rule}")


def check_divides(config: Any, part: str, of: str) -> None:
    """Refuses a configuration in which a field does not divide another.

    Raises:
        UserError: it does not.
    """
    small, large = getattr(config, part), getattr(config, of)
    if large % small:
        rule = f"no multiple of {part}, {small}"
        raise UserError(f"{type(config).__name__}: {of}: {large} is {rule}")
