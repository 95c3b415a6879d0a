"""All questions about one room, with exact answers: the table of askers, and the records.

Wording, options and units of the VSI-Bench kinds follow VSI-Bench (Yang et al., 2024; centimetres
for sizes, metres for distances, square metres for rooms). Proximity, contact, size comparison and
orientation are the four relations of the Hidden-CoT paper, Sec. IV. `object_box` asks for what
GEODE regresses, an object's box in the world frame.

Questions name visible objects only, and every answer keeps a margin (`margins.py`), so that none
depends on a centimetre. Answers are balanced so that they cannot be guessed without the views:
where a kind has classes, the class is drawn before the objects; numbers are spread in log scale; a
size comparison is kept with a probability inversely proportional to how often its pair of
categories has that answer; pairs for contact are placed by a fair coin (`rooms.layout`).
"""

import itertools
from collections.abc import Callable, Iterator

import numpy as np

from geode_jax.sources.questions import choices, numbers, relations
from geode_jax.sources.questions.asker import Asker
from geode_jax.sources.questions.description import scene_description
from geode_jax.sources.questions.seen_room import SeenRoom

ROOMS_VERSION = 6
"""Goes up with every change of what a room's id stands for: of its questions, which are made here,
and of its furniture and arrays, which `sources.rooms` makes. Rooms on disk of another version are
refused."""

ASKERS: tuple[tuple[str, int, Callable[[Asker], Iterator[dict]]], ...] = (
    ("proximity", 2, relations.proximity),
    ("contact", 2, relations.contact),
    ("size_comparison", 2, relations.size_comparison),
    ("orientation", 2, relations.orientation),
    ("object_counting", 2, numbers.object_counting),
    ("object_abs_distance", 3, numbers.object_abs_distance),
    ("object_size_estimation", 3, numbers.object_size_estimation),
    ("room_size_estimation", 1, numbers.room_size_estimation),
    ("object_rel_distance", 2, choices.object_rel_distance),
    ("object_rel_direction_easy", 1, choices.object_rel_direction_easy),
    ("object_rel_direction_medium", 1, choices.object_rel_direction_medium),
    ("object_rel_direction_hard", 1, choices.object_rel_direction_hard),
    ("route_planning", 1, choices.route_planning),
    ("obj_appearance_order", 1, choices.obj_appearance_order),
    ("scene_description", 1, scene_description),
    ("object_box", 6, numbers.object_box),
)
"""Kind (a key of `exports.kinds.KINDS`), most questions of this kind in a room, asker.

Records come in this order, and the askers draw from one random stream in this order. Only
`object_box` has a stream of its own, so it stays last."""


def make_questions(
    seen: SeenRoom, rng: np.random.Generator, box_rng: np.random.Generator
) -> list[dict]:
    """Returns the question records of a room in the export's format, about 22 of them.

    Args:
        seen: the room.
        rng: draws for all kinds but `object_box`.
        box_rng: draws the objects whose boxes are asked for. They come last, so the other
            questions and their ids do not depend on it.
    """
    asker = Asker(seen, rng, box_rng)
    records = []
    for kind, most, ask in ASKERS:
        for draft in itertools.islice(ask(asker), most):
            number = f"{seen.scene_id}_{len(records):02d}"
            record = {"id": number, "scene_id": seen.scene_id, "kind": kind}
            records.append(record | asker.with_view_relations(draft))
    return records
