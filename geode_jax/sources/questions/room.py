"""All questions about one room."""

import itertools
from collections.abc import Iterator

import numpy as np

from geode_jax.sources.questions.asker import Asker, SeenRoom
from geode_jax.sources.questions.choices import (
    BACK,
    CARTESIAN,
    QUADRANTS,
    appearance_order,
    direction,
    easy,
    hard,
    medium,
    rel_distance,
    route_planning,
)
from geode_jax.sources.questions.numbers import (
    abs_distance,
    object_box,
    object_counting,
    object_size,
    room_size,
)
from geode_jax.sources.questions.relations import contact, orientation, proximity, size_comparison
from geode_jax.sources.questions.words import some


def make_questions(
    seen: SeenRoom, rng: np.random.Generator, box_rng: np.random.Generator
) -> list[dict]:
    """Up to 27 question records of a room, about 22, in the export's format.

    Args:
        seen: the room.
        rng: what all kinds but `object_box` are drawn from.
        box_rng: whose boxes are asked for. They come last, so with or without them the other
            questions and their ids are the same.
    """
    asker = Asker(seen, rng, box_rng)
    records = []
    for kind, times, make in _KINDS:
        for draft in itertools.islice(make(asker), times):
            number = f"{seen.scene_id}_{len(records):02d}"
            record = {"id": number, "scene_id": seen.scene_id, "kind": kind}
            records.append(record | asker.with_view_relations(draft))
    return records


def _description(ask: Asker) -> Iterator[dict]:
    """Room size word and the four categories that fill most of the views, larger counts first."""
    area = ask.seen.floor
    size = "small" if area < 18 else "medium" if area < 32 else "large"
    groups: dict[str, list[int]] = {}
    for n, name in enumerate(ask.names):
        groups.setdefault(name, []).append(n)
    pixels = {name: ask.seen.rays[:, rows].sum() for name, rows in groups.items()}
    shown = sorted(groups, key=lambda name: -pixels[name])[:4]
    shown.sort(key=lambda name: (-len(groups[name]), name))
    words = [some(name, len(groups[name])) for name in shown]
    listed = f"{', '.join(words[:-1])} and {words[-1]}" if len(words) > 1 else words[0]
    rationale = (
        f"The room measures {area:.1f} square meters, so it is {size}. "
        f"The views show {listed} best."
    )
    answer = f"A {size} room with {listed}."
    yield ask.draft("Describe this room in one sentence.", answer, (), rationale)


_KINDS = (
    ("proximity", 2, proximity),
    ("contact", 2, contact),
    ("size_comparison", 2, size_comparison),
    ("orientation", 2, orientation),
    ("object_counting", 2, object_counting),
    ("object_abs_distance", 3, abs_distance),
    ("object_size_estimation", 3, object_size),
    ("room_size_estimation", 1, room_size),
    ("object_rel_distance", 2, rel_distance),
    (
        "object_rel_direction_easy",
        1,
        direction(easy, ("left", "right"), "{target} to the left or the right of the {faced}?"),
    ),
    (
        "object_rel_direction_medium",
        1,
        direction(
            medium, ("left", "right", "back"), f"{{target}} to my left, right, or back?\n{BACK}"
        ),
    ),
    (
        "object_rel_direction_hard",
        1,
        direction(
            hard,
            QUADRANTS,
            "{target} to my front-left, front-right, back-left, or back-right?\n" + CARTESIAN,
        ),
    ),
    ("route_planning", 1, route_planning),
    ("obj_appearance_order", 1, appearance_order),
    ("scene_description", 1, _description),
    ("object_box", 6, object_box),
)
