"""Words and margins that questions share."""

import numpy as np

LEFT_RIGHT_MARGIN, MARGIN = 20.0, 10.0
"""Degrees between a direction and the line ahead or behind; other boundaries of its class."""


def wrapped(angle):
    """The same angle in [-180, 180) degrees."""
    return (angle + 180) % 360 - 180


_NUMBER_WORDS = ("no", "one", "two", "three", "four", "five")


def some(name: str, count: int) -> str:
    if count > 1:
        plural = name[:-1] + "ves" if name.endswith("lf") else name + "s"
        return f"{_NUMBER_WORDS[count] if count < len(_NUMBER_WORDS) else count} {plural}"
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def metres(value: float) -> str:
    return f"{value:.1f} meters"


def _clear(angle: float, bounds: tuple[float, ...], margin: float = LEFT_RIGHT_MARGIN) -> bool:
    return all(abs(angle - bound) >= margin for bound in bounds)


def turning(names: list[str], angle: float) -> str:
    side = "left" if angle > 0 else "right"
    return (
        f"I stand by the {names[0]} and face the {names[1]}. "
        f"To face the {names[2]} I turn {abs(angle):.0f} degrees to the {side}."
    )


def compass(here: np.ndarray, there: np.ndarray) -> str:
    """Main world direction from one box to another, the world's y axis taken as north."""
    x, y = there[:2] - here[:2]
    if abs(x) > abs(y):
        return "east" if x > 0 else "west"
    return "north" if y > 0 else "south"
