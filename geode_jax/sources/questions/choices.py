"""Questions with options: the closest object, directions, routes, order of appearance."""

import itertools
from collections.abc import Callable, Iterator

import numpy as np

from geode_jax.sources.questions.asker import FIRST_SEEN, MIN_WAY, UNSEEN, Asker
from geode_jax.sources.questions.words import MARGIN, _clear, metres, turning, wrapped


def rel_distance(ask: Asker) -> Iterator[dict]:
    """The closest of four categories (three or two in a poor room), by their nearest instances."""
    for anchor in ask.shuffled(ask.single):
        nearest = {
            name: min(rows, key=lambda n: ask.gaps[anchor, n])
            for name, rows in ask.groups.items()
            if name != ask.names[anchor]
        }
        names = ask.shuffled(nearest)[:4]
        distance = {name: ask.gaps[anchor, nearest[name]] for name in names}
        ranked = sorted(names, key=distance.__getitem__)
        if len(names) < 2 or distance[ranked[1]] - distance[ranked[0]] < 0.25:
            continue
        measured = (f"The {name} is {metres(distance[name])} away." for name in names)
        question = (
            f"Measuring from the closest point of each object, which of these objects "
            f"({', '.join(names)}) is the closest to the {ask.names[anchor]}?\n"
            "If there are multiple instances of an object category, measure to the closest."
        )
        rows = [anchor, *(nearest[name] for name in names)]
        rationale = f"{' '.join(measured)} The {ranked[0]} is the closest."
        yield ask.choice(question, names, ranked[0], rows, rationale)


CARTESIAN = (
    "The directions refer to the quadrants of a Cartesian plane "
    "(if I am standing at the origin and facing along the positive y-axis)."
)


BACK = "An object is to my back if I would have to turn at least 135 degrees in order to face it."


QUADRANTS = ("front-right", "front-left", "back-left", "back-right")


def easy(angle: float) -> str | None:
    return ("left" if angle > 0 else "right") if _clear(abs(angle), (0, 180)) else None


def medium(angle: float) -> str | None:
    if abs(angle) > 135 + MARGIN:
        return "back"
    return easy(angle) if abs(angle) < 135 - MARGIN else None


def hard(angle: float) -> str | None:
    if not _clear(abs(angle), (0, 90, 180), MARGIN):
        return None
    return f"{'front' if abs(angle) < 90 else 'back'}-{'left' if angle > 0 else 'right'}"


def direction(
    classify: Callable[[float], str | None], classes: tuple[str, ...], asked: str
) -> Callable[[Asker], Iterator[dict]]:
    """Questions of the form "standing by, facing"; the class is drawn before the objects."""

    def make(ask: Asker) -> Iterator[dict]:
        found: dict[str, list] = {}
        for rows, angle in ask.triples.items():
            label = classify(angle)
            if label:
                found.setdefault(label, []).append((rows, angle))
        while found:
            label = ask.shuffled(sorted(found))[0]
            rows, angle = found[label].pop(ask.rng.integers(len(found[label])))
            if not found[label]:
                del found[label]
            names = [ask.names[n] for n in rows]
            question = f"If I am standing by the {names[0]} and facing the {names[1]}, is the " + (
                asked.format(target=names[2], faced=names[1])
            )
            yield ask.choice(question, ask.shuffled(classes), label, rows, turning(names, angle))

    return make


_TURNS = ("Turn Left", "Turn Right", "Turn Back")


def _turn_classes(angle: np.ndarray) -> list:
    """Index in _TURNS of the turn that brings a robot to face something at each angle.

    None where the turn is unclear or small. Nested lists like the array of angles in degrees.
    """
    side = (np.abs(angle) >= 45) & (np.abs(angle) <= 135 - MARGIN)
    classes = np.where(side, (angle < 0).astype(object), None)
    classes[np.abs(angle) >= 135 + MARGIN] = 2
    return classes.tolist()


def route_planning(ask: Asker) -> Iterator[dict]:
    """Routes with one blank (go to what you face, turn, go on) or two; the turns drawn first."""
    blanks = 1 if ask.rng.random() < 0.6 or len(ask.single) < 4 else 2
    bearing, near = np.array(ask.bearing), np.array(ask.distance) < MIN_WAY
    # Turn classes by three objects: on the spot (stand, face, target), or on the way a, b, c.
    spot = _turn_classes(np.where(near[:, :, None] | near[:, None], 0, ask.turns))
    way = wrapped(bearing[None] - bearing[:, :, None])
    way = _turn_classes(np.where(near[:, :, None] | near[None], 0, way))
    found: dict[tuple[int, ...], list] = {}
    for rows in itertools.permutations(ask.single, 2 + blanks):
        if blanks == 1:
            start, faced, goal = rows
            turns = (way[start][faced][goal],)
        else:
            start, faced, stop, goal = rows
            turns = (spot[start][faced][stop], way[start][stop][goal])
        if None not in turns:
            found.setdefault(turns, []).append(rows)
    while found:
        turns = ask.shuffled(sorted(found))[0]
        rows = found[turns].pop(ask.rng.integers(len(found[turns])))
        if not found[turns]:
            del found[turns]
        stops = rows if blanks == 1 else (rows[0], *rows[2:])
        if all(ask.passable(a, b) for a, b in itertools.pairwise(stops)):
            yield _route(ask, rows, tuple(_TURNS[turn] for turn in turns))


def _route(ask: Asker, rows: tuple[int, ...], turns: tuple[str, ...]) -> dict:
    start, faced, *way = (ask.names[n] for n in rows)
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
    every = ask.shuffled(itertools.product(_TURNS, repeat=len(turns)))
    others = [option for option in every if option != turns][:3]
    options = [", ".join(option) for option in ask.shuffled([turns, *others])]
    # In the order of the text: start, faced, destination, then a way point in between; which of
    # them the turns are between, `question_arrays` knows.
    named = [rows[0], rows[1], rows[-1], *rows[2:-1]]
    rationale = " ".join(f"{k}. {step}." for k, step in enumerate(solved, 1))
    return ask.choice(question, options, ", ".join(turns), named, rationale)


def appearance_order(ask: Asker) -> Iterator[dict]:
    """Four nouns (or three) whose first views differ; glimpsed before they appear: left out."""
    first: dict[int, list[str]] = {}
    for name, rows in ask.groups.items():
        pixels = ask.seen.rays[:, rows]
        shown = (pixels >= FIRST_SEEN).any(1)
        if not shown.any():
            continue
        view = int(shown.argmax())
        if (pixels[:view].sum(1) < UNSEEN).all():
            first.setdefault(view, []).append(name)
    views = sorted(first)
    if len(views) < 3:
        return
    order = [ask.shuffled(first[view])[0] for view in views]
    if len(order) == 4 and ask.rng.random() < 0.2:
        order.pop(ask.rng.integers(4))
    others = [p for p in itertools.permutations(order) if list(p) != order]
    options = [", ".join(p) for p in ask.shuffled([tuple(order), *ask.shuffled(others)[:3]])]
    listed = ask.shuffled(order)
    where = {name: view for view, names in first.items() for name in names}
    # Of several the one that decides: which is seen best where the category first appears.
    rows = [max(ask.groups[name], key=lambda n: ask.seen.rays[where[name], n]) for name in listed]
    seen = " ".join(f"The {name} first appears in view {where[name] + 1}." for name in order)
    question = (
        "What will be the first-time appearance order of the following categories in the video: "
        f"{', '.join(listed)}?"
    )
    yield ask.choice(question, options, ", ".join(order), rows, seen)
