"""Questions whose answer is a number: counts, distances, sizes."""

import itertools
from collections.abc import Iterator

import numpy as np

from geode_jax.sources.questions.asker import APART, PAIR_SHARE, UNSEEN, USUAL, Asker
from geode_jax.sources.questions.words import compass, metres


def _numeric(ask: Asker, question: str, value: float, text: str, unit: str, rows, rationale: str):
    return ask.draft(question, text, rows, rationale, value=float(value), unit=unit)


def object_counting(ask: Asker) -> Iterator[dict]:
    """Groups of several, largest first; single objects are not counted [VSI-Bench, B.1]."""
    several = [
        name
        for name, rows in ask.groups.items()
        if len(rows) > 2 or (len(rows) == 2 and ask.rng.random() < PAIR_SHARE)
    ]
    several.sort(key=lambda name: -len(ask.groups[name]))
    for name in several:
        rows = ask.groups[name]
        first = (ask.seen.rays[:, rows] >= UNSEEN).argmax(0)
        steps = [
            f"View {view + 1} shows {(first == view).sum()} new {name}(s)."
            for view in np.unique(first)
        ]
        rationale = " ".join([*steps, f"In total there are {len(rows)}."])
        question = f"How many {name}(s) are in this room?"
        yield _numeric(ask, question, len(rows), str(len(rows)), "items", (), rationale)


def abs_distance(ask: Asker) -> Iterator[dict]:
    """Distances spread in log scale: the pair that is closest to a drawn distance."""
    pairs = [p for p in itertools.combinations(ask.single, 2) if ask.gaps[p] >= APART]
    while pairs:
        wish = np.exp(ask.rng.uniform(np.log(0.3), np.log(7.0)))
        pair = min(pairs, key=lambda p: abs(np.log(ask.gaps[p] / wish)))
        pairs.remove(pair)
        a, b = ask.shuffled(pair)
        text = f"{ask.gaps[a, b]:.1f}"
        names = ask.names[a], ask.names[b]
        rationale = (
            f"The {names[0]} is {compass(ask.boxes[b], ask.boxes[a])} of the {names[1]}. "
            f"Between their closest points there are {text} meters."
        )
        question = (
            "Measuring from the closest point of each object, what is the direct distance between "
            f"the {names[0]} and the {names[1]} (in meters)?"
        )
        yield _numeric(ask, question, float(text), text, "m", (a, b), rationale)


def object_size(ask: Asker) -> Iterator[dict]:
    for n in ask.shuffled(ask.single):
        typical = ask.seen.typical.get(ask.names[n])
        if typical is not None:
            unusual = abs(np.log(ask.boxes[n, 3:6].max() / typical)) / USUAL
            if ask.rng.random() > unusual:
                continue
        edges = [round(100 * float(edge)) for edge in ask.boxes[n, 3:6]]
        name, longest = ask.names[n], max(edges)
        rationale = (
            f"The {name} is {edges[0]} centimeters long, {edges[1]} centimeters wide and "
            f"{edges[2]} centimeters high. The longest is {longest} centimeters."
        )
        question = (
            "What is the length of the longest dimension (length, width, or height) of the "
            f"{name}, measured in centimeters?"
        )
        yield _numeric(ask, question, longest, str(longest), "cm", (n,), rationale)


def room_size(ask: Asker) -> Iterator[dict]:
    x, y = ask.seen.room[:2]
    text = f"{ask.seen.floor:.1f}"
    covered = ask.seen.floor / (x * y)
    part = f" Its floor covers {covered:.0%} of that." if covered < 0.99 else ""
    rationale = f"The room is {metres(x)} by {metres(y)}.{part} That is {text} square meters."
    question = (
        "What is the size of this room (in square meters)? \n"
        "If multiple rooms are shown, estimate the size of the combined space."
    )
    yield _numeric(ask, question, float(text), text, "m2", (), rationale)


def object_box(ask: Asker) -> Iterator[dict]:
    """Boxes in the world frame: the middle of the floor is its origin, y is north, z is up."""
    for n in ask.box_rng.permutation(ask.single):
        name, box = ask.names[n], ask.box(n)
        x, y, z, *edges, yaw = box
        length, width, height = (round(100 * edge) for edge in edges)
        rationale = (
            f"From the middle of the room, the {name} stands {metres(abs(x))} to the "
            f"{'east' if x > 0 else 'west'} and {metres(abs(y))} to the "
            f"{'north' if y > 0 else 'south'}, its center {metres(z)} above the floor. "
            f"It is {length} centimeters long, {width} centimeters wide and {height} centimeters "
            f"high, and turned by {round(np.degrees(yaw))} degrees."
        )
        # Rounded first: -0.004 is 0.00, not -0.00.
        answer = " ".join(f"{round(value, 2) + 0.0:.2f}" for value in box)
        question = f"What is the 3D bounding box of the {name}?"
        yield ask.draft(question, answer, (n,), rationale, box=box)
