"""Askers of numbers: VSI-Bench's counts, distances and sizes, and GEODE's 3D boxes."""

import itertools
from collections.abc import Iterator

import numpy as np

from geode_jax.sources.questions.asker import Asker
from geode_jax.sources.questions.margins import HIDDEN_PIXELS, MIN_SEPARATION
from geode_jax.sources.questions.words import compass_direction, metres

PAIR_COUNTING_PROBABILITY = 0.75
"""Probability that a category with two objects may be asked about; larger groups always may."""
ATYPICAL_LOG_RATIO = 0.35
"""A length is asked about with a probability that is proportional to the absolute log of its ratio
to its category's median, and 1 from this value on."""


def object_counting(asker: Asker) -> Iterator[dict]:
    """Yields questions about the size of groups, largest first.

    Single objects are not counted (VSI-Bench, B.1).
    """
    several = [
        name
        for name, rows in asker.groups.items()
        if len(rows) > 2 or (len(rows) == 2 and asker.rng.random() < PAIR_COUNTING_PROBABILITY)
    ]
    several.sort(key=lambda name: -len(asker.groups[name]))
    for name in several:
        rows = asker.groups[name]
        first = (asker.seen.rays[:, rows] >= HIDDEN_PIXELS).argmax(0)
        steps = [
            f"View {view + 1} shows {(first == view).sum()} new {name}(s)."
            for view in np.unique(first)
        ]
        rationale = " ".join([*steps, f"In total there are {len(rows)}."])
        question = f"How many {name}(s) are in this room?"
        yield asker.number(question, str(len(rows)), "items", (), rationale)


def object_abs_distance(asker: Asker) -> Iterator[dict]:
    """Yields questions about distances that are spread evenly in log scale.

    Each is about the pair whose distance is closest to a drawn one.
    """
    pairs = [p for p in itertools.combinations(asker.unique, 2) if asker.gaps[p] >= MIN_SEPARATION]
    while pairs:
        drawn = np.exp(asker.rng.uniform(np.log(0.3), np.log(7.0)))
        pair = min(pairs, key=lambda p: abs(np.log(asker.gaps[p] / drawn)))
        pairs.remove(pair)
        a, b = asker.shuffled(pair)
        text = f"{asker.gaps[a, b]:.1f}"
        names = asker.names[a], asker.names[b]
        direction = compass_direction(asker.boxes[b], asker.boxes[a])
        rationale = (
            f"The {names[0]} is {direction} of the {names[1]}. "
            f"Between their closest points there are {text} meters."
        )
        question = (
            "Measuring from the closest point of each object, what is the direct distance between "
            f"the {names[0]} and the {names[1]} (in meters)?"
        )
        yield asker.number(question, text, "m", (a, b), rationale)


def object_size_estimation(asker: Asker) -> Iterator[dict]:
    """Yields questions about objects' longest edges, more often about atypical ones."""
    for n in asker.shuffled(asker.unique):
        typical = asker.seen.typical.get(asker.names[n])
        if typical is not None:
            log_ratio = abs(np.log(asker.boxes[n, 3:6].max() / typical))
            if asker.rng.random() > log_ratio / ATYPICAL_LOG_RATIO:
                continue
        edges = [round(100 * float(edge)) for edge in asker.boxes[n, 3:6]]
        name, longest = asker.names[n], max(edges)
        rationale = (
            f"The {name} is {edges[0]} centimeters long, {edges[1]} centimeters wide and "
            f"{edges[2]} centimeters high. The longest is {longest} centimeters."
        )
        question = (
            "What is the length of the longest dimension (length, width, or height) of the "
            f"{name}, measured in centimeters?"
        )
        yield asker.number(question, str(longest), "cm", (n,), rationale)


def room_size_estimation(asker: Asker) -> Iterator[dict]:
    """Yields the one question about the area of the floor."""
    x, y = asker.seen.room[:2]
    text = f"{asker.seen.floor:.1f}"
    covered = asker.seen.floor / (x * y)
    part = f" Its floor covers {covered:.0%} of that." if covered < 0.99 else ""
    rationale = f"The room is {metres(x)} by {metres(y)}.{part} That is {text} square meters."
    question = (
        "What is the size of this room (in square meters)? \n"
        "If multiple rooms are shown, estimate the size of the combined space."
    )
    yield asker.number(question, text, "m2", (), rationale)


def object_box(asker: Asker) -> Iterator[dict]:
    """Yields questions about objects' boxes in the world frame.

    Its origin is the middle of the floor, y is north and z is up.
    """
    for n in asker.box_rng.permutation(asker.unique):
        name, box = asker.names[n], asker.box(n)
        x, y, z, *edges, yaw = box
        length, width, height = (round(100 * edge) for edge in edges)
        rationale = (
            f"From the middle of the room, the {name} stands {metres(abs(x))} to the "
            f"{'east' if x > 0 else 'west'} and {metres(abs(y))} to the "
            f"{'north' if y > 0 else 'south'}, its center {metres(z)} above the floor. "
            f"It is {length} centimeters long, {width} centimeters wide and {height} centimeters "
            f"high, and turned by {round(np.degrees(yaw))} degrees."
        )
        # Rounding and adding 0.0 first makes -0.004 "0.00" instead of "-0.00".
        answer = " ".join(f"{round(value, 2) + 0.0:.2f}" for value in box)
        question = f"What is the 3D bounding box of the {name}?"
        yield asker.draft(question, answer, (n,), rationale, box=box)
