"""Phrases that questions and rationales share, and the angles they describe."""

from collections.abc import Sequence

import numpy as np

_NUMBER_WORDS = ("no", "one", "two", "three", "four", "five")


def with_count(name: str, count: int) -> str:
    """Returns a noun with its number, such as "a lamp" or "two bookshelves"."""
    if count > 1:
        plural = name[:-1] + "ves" if name.endswith("lf") else name + "s"
        return f"{_NUMBER_WORDS[count] if count < len(_NUMBER_WORDS) else count} {plural}"
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def metres(value: float) -> str:
    """Returns a length in metres as text, such as "1.3 meters"."""
    return f"{value:.1f} meters"


def wrap_degrees(angle):
    """Returns the same angle (a number or an array) in [-180, 180) degrees."""
    return (angle + 180) % 360 - 180


def turn_sentences(names: Sequence[str], angle: float) -> str:
    """Returns the rationale of a turn.

    Args:
        names: nouns of where one stands, what one faces, and what one turns to.
        angle: degrees of the turn, left positive.
    """
    side = "left" if angle > 0 else "right"
    return (
        f"I stand by the {names[0]} and face the {names[1]}. "
        f"To face the {names[2]} I turn {abs(angle):.0f} degrees to the {side}."
    )


def compass_direction(start: np.ndarray, end: np.ndarray) -> str:
    """Returns the main horizontal direction from one box (7,) to another; the y axis is north."""
    x, y = end[:2] - start[:2]
    if abs(x) > abs(y):
        return "east" if x > 0 else "west"
    return "north" if y > 0 else "south"
