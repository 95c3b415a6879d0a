"""Askers of VSI-Bench's multiple-choice tasks: distances, directions, routes, appearance."""

import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from geode_jax.sources.questions.asker import Asker
from geode_jax.sources.questions.margins import (
    APPEARANCE_PIXELS,
    CLASS_MARGIN,
    HIDDEN_PIXELS,
    MIN_CENTRE_DISTANCE,
    is_clear,
)
from geode_jax.sources.questions.words import metres, turn_sentences, wrap_degrees


def object_rel_distance(asker: Asker) -> Iterator[dict]:
    """Yields questions about which of four categories has the object closest to an anchor.

    Rooms with few objects give three or two categories.
    """
    for anchor in asker.shuffled(asker.unique):
        nearest = {
            name: min(rows, key=lambda n: asker.gaps[anchor, n])
            for name, rows in asker.groups.items()
            if name != asker.names[anchor]
        }
        names = asker.shuffled(nearest)[:4]
        distance = {name: asker.gaps[anchor, nearest[name]] for name in names}
        ranked = sorted(names, key=distance.__getitem__)
        if len(names) < 2 or distance[ranked[1]] - distance[ranked[0]] < 0.25:
            continue
        measured = (f"The {name} is {metres(distance[name])} away." for name in names)
        question = (
            f"Measuring from the closest point of each object, which of these objects "
            f"({', '.join(names)}) is the closest to the {asker.names[anchor]}?\n"
            "If there are multiple instances of an object category, measure to the closest."
        )
        rows = [anchor, *(nearest[name] for name in names)]
        rationale = f"{' '.join(measured)} The {ranked[0]} is the closest."
        yield asker.choice(question, names, ranked[0], rows, rationale)


# ---------------------------------------------------------------------------------- directions


def _side(angle: float) -> str | None:
    """Returns "left" or "right"; None where the angle is too close to straight ahead or behind."""
    return ("left" if angle > 0 else "right") if is_clear(abs(angle), (0, 180)) else None


def _side_or_back(angle: float) -> str | None:
    if abs(angle) > 135 + CLASS_MARGIN:
        return "back"
    return _side(angle) if abs(angle) < 135 - CLASS_MARGIN else None


def _quadrant(angle: float) -> str | None:
    if not is_clear(abs(angle), (0, 90, 180), CLASS_MARGIN):
        return None
    return f"{'front' if abs(angle) < 90 else 'back'}-{'left' if angle > 0 else 'right'}"


def object_rel_direction_easy(asker: Asker) -> Iterator[dict]:
    """Yields questions with the answers left and right."""
    alternatives = "{target} to the left or the right of the {faced}?"
    return _directions(asker, _side, ("left", "right"), alternatives)


def object_rel_direction_medium(asker: Asker) -> Iterator[dict]:
    """Yields questions with the answers left, right and back."""
    alternatives = (
        "{target} to my left, right, or back?\nAn object is to my back if I would have to turn at "
        "least 135 degrees in order to face it."
    )
    return _directions(asker, _side_or_back, ("left", "right", "back"), alternatives)


def object_rel_direction_hard(asker: Asker) -> Iterator[dict]:
    """Yields questions with the four quadrants as answers."""
    quadrants = ("front-right", "front-left", "back-left", "back-right")
    alternatives = (
        "{target} to my front-left, front-right, back-left, or back-right?\nThe directions refer "
        "to the quadrants of a Cartesian plane (if I am standing at the origin and facing along "
        "the positive y-axis)."
    )
    return _directions(asker, _quadrant, quadrants, alternatives)


def _directions(
    asker: Asker,
    classify: Callable[[float], str | None],
    classes: Sequence[str],
    alternatives: str,
) -> Iterator[dict]:
    """Yields questions "If I am standing by ... and facing ..."; their classes are drawn first.

    Args:
        asker: the room.
        classify: degrees to the left -> class; None where it is not clear.
        classes: all classes.
        alternatives: rest of the question, with {target} and {faced}.
    """
    found: dict[str, list] = {}
    for rows, angle in asker.triples.items():
        label = classify(angle)
        if label:
            found.setdefault(label, []).append((rows, angle))
    while found:
        label = asker.shuffled(sorted(found))[0]
        rows, angle = found[label].pop(asker.rng.integers(len(found[label])))
        if not found[label]:
            del found[label]
        names = [asker.names[n] for n in rows]
        rest = alternatives.format(target=names[2], faced=names[1])
        question = f"If I am standing by the {names[0]} and facing the {names[1]}, is the {rest}"
        options, rationale = asker.shuffled(classes), turn_sentences(names, angle)
        yield asker.choice(question, options, label, rows, rationale)


# -------------------------------------------------------------------------------------- routes


_TURNS = ("Turn Left", "Turn Right", "Turn Back")


def _turn_classes(angle: np.ndarray) -> list:
    """Returns the index in _TURNS of the turn by each angle, as nested lists.

    It is -1 for an angle that is small, or close to the boundary of two turns.

    Args:
        angle: degrees, left positive.
    """
    side = (np.abs(angle) >= 45) & (np.abs(angle) <= 135 - CLASS_MARGIN)
    classes = np.where(side, angle < 0, -1)
    classes[np.abs(angle) >= 135 + CLASS_MARGIN] = 2
    return classes.tolist()


def route_planning(asker: Asker) -> Iterator[dict]:
    """Yields routes with one or two blanks; the turns are drawn before the objects.

    With one blank, the robot first goes to the object that it faces.
    """
    blanks = 1 if asker.rng.random() < 0.6 or len(asker.unique) < 4 else 2
    near = np.array(asker.distance) < MIN_CENTRE_DISTANCE
    bearing = np.array(asker.bearing)
    # Turns on the spot [stand][face][target], and on the way from a to b, then to c, [a][b][c].
    spot = _turn_classes(np.where(near[:, :, None] | near[:, None], 0, asker.turns))
    way = wrap_degrees(bearing[None] - bearing[:, :, None])
    way = _turn_classes(np.where(near[:, :, None] | near[None], 0, way))
    found: dict[tuple[int, ...], list] = {}
    for rows in itertools.permutations(asker.unique, 2 + blanks):
        if blanks == 1:
            start, faced, goal = rows
            turns = (way[start][faced][goal],)
        else:
            start, faced, stop, goal = rows
            turns = (spot[start][faced][stop], way[start][stop][goal])
        if -1 not in turns:
            found.setdefault(turns, []).append(rows)
    while found:
        turns = asker.shuffled(sorted(found))[0]
        rows = found[turns].pop(asker.rng.integers(len(found[turns])))
        if not found[turns]:
            del found[turns]
        stops = rows if blanks == 1 else (rows[0], *rows[2:])
        if all(asker.is_way_clear(a, b) for a, b in itertools.pairwise(stops)):
            yield _route(asker, rows, tuple(_TURNS[turn] for turn in turns))


def _route(asker: Asker, rows: tuple[int, ...], turns: tuple[str, ...]) -> dict:
    start, faced, *way = (asker.names[n] for n in rows)
    steps = [] if len(turns) == 2 else [f"Go forward until the {faced}"]
    solved = list(steps)
    for turn, name in zip(turns, way, strict=True):
        steps += ["[please fill in]", f"Go forward until the {name}"]
        solved += [turn, f"Go forward until the {name}"]
    numbered = " ".join(f"{k}. {step}" for k, step in enumerate(steps, 1))
    question = (
        f"You are a robot beginning at the {start} and facing the {faced}. "
        f"You want to navigate to the {way[-1]}. You will perform the following actions "
        "(Note: for each [please fill in], choose either 'turn back,' 'turn left,' or "
        f"'turn right.'): {numbered}. You have reached the final destination."
    )
    every = asker.shuffled(itertools.product(_TURNS, repeat=len(turns)))
    others = [option for option in every if option != turns][:3]
    options = [", ".join(option) for option in asker.shuffled([turns, *others])]
    # In the order of the text: start, faced, destination, then a way point in between. The batch's
    # turn targets (`data.question_arrays`) rely on this order.
    named = [rows[0], rows[1], rows[-1], *rows[2:-1]]
    rationale = " ".join(f"{k}. {step}." for k, step in enumerate(solved, 1))
    return asker.choice(question, options, ", ".join(turns), named, rationale)


# ---------------------------------------------------------------------------------- appearance


def obj_appearance_order(asker: Asker) -> Iterator[dict]:
    """Yields the one question about the order in which three or four categories first appear.

    Their first views differ. Categories that an earlier view shows in part are left out.
    """
    first: dict[int, list[str]] = {}
    for name, rows in asker.groups.items():
        pixels = asker.seen.rays[:, rows]
        shown = (pixels >= APPEARANCE_PIXELS).any(1)
        if not shown.any():
            continue
        view = int(shown.argmax())
        if (pixels[:view].sum(1) < HIDDEN_PIXELS).all():
            first.setdefault(view, []).append(name)
    views = sorted(first)
    if len(views) < 3:
        return
    order = [asker.shuffled(first[view])[0] for view in views]
    if len(order) == 4 and asker.rng.random() < 0.2:
        order.pop(asker.rng.integers(4))
    others = [p for p in itertools.permutations(order) if list(p) != order]
    options = [", ".join(p) for p in asker.shuffled([tuple(order), *asker.shuffled(others)[:3]])]
    listed = asker.shuffled(order)
    where = {name: view for view, names in first.items() for name in names}
    # A category is represented by the object that is seen best in its first view.
    rows = [
        max(asker.groups[name], key=lambda n: asker.seen.rays[where[name], n]) for name in listed
    ]
    seen = " ".join(f"The {name} first appears in view {where[name] + 1}." for name in order)
    question = (
        "What will be the first-time appearance order of the following categories in the video: "
        f"{', '.join(listed)}?"
    )
    yield asker.choice(question, options, ", ".join(order), rows, seen)
