"""Ranges of the fields of configuration classes, for checks in `__post_init__`."""

import math
import numbers
from collections.abc import Callable, Collection
from typing import Any

from geode_jax.errors import UserError

Range = tuple[Callable[[Any], bool], str]
"""A predicate on a value, and the same rule in words."""


MOST = 2**31 - 1
"""Largest size of a part of a model; XLA has none for products of larger ones."""
MOST_BLOCKS = 128
"""Most layers of a module whose layers are built one by one, not as a stack."""


def whole(least: int, most: int = MOST) -> Range:
    """Returns the range of whole numbers from `least` to `most`."""

    def holds(value: Any) -> bool:
        good = isinstance(value, numbers.Integral) and value is not True
        return good and least <= int(value) <= most

    return holds, f"a whole number of at least {least} and at most {most:,}"


def real(least: float = -math.inf, most: float = math.inf, *, above: bool = False) -> Range:
    """Returns the range of finite numbers from `least` (excluded if `above`) to `most`."""

    def holds(value: Any) -> bool:
        if not isinstance(value, numbers.Real) or not math.isfinite(value):
            return False
        return least <= float(value) <= most and not (above and value == least)

    low = f"above {least:g}" if above else f"of at least {least:g}"
    return holds, f"a number {low}" + (f" and at most {most:g}" if most < math.inf else "")


def one_of(choices: Collection[Any]) -> Range:
    """Returns the range that consists of the choices."""
    shown = ", ".join(map(str, choices))
    return lambda value: any(value == choice for choice in choices), f"one of {shown}"


DTYPES = one_of(("float32", "bfloat16", "float16"))


def check(config: Any, fields: dict[str, Range]) -> None:
    """Refuses a configuration that has a field out of its range.

    Args:
        config: a dataclass.
        fields: {names of fields, separated by spaces: their range}.

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
        UserError: the field `part` does not divide the field `of`.
    """
    small, large = getattr(config, part), getattr(config, of)
    if large % small:
        rule = f"no multiple of {part}, {small}"
        raise UserError(f"{type(config).__name__}: {of}: {large} is {rule}")
