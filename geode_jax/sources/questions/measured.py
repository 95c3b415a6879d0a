"""The rooms' questions about scenes of a data set, from their labelled boxes.

Rooms know by construction which category is usually larger and how long each usually is. Here both
are measured on the boxes of the training scenes. Contact is left out: boxes around scanned things
overlap where the things do not touch.
"""

import dataclasses
import itertools
import zlib
from collections.abc import Iterable

import numpy as np

from geode_jax.sources.questions.margins import MIN_VOLUME_RATIO
from geode_jax.sources.questions.room import make_questions
from geode_jax.sources.questions.seen_room import SeenRoom

MIN_BOXES = 5
"""A category's usual size counts as known from this many boxes on."""
_MAX_COMPARED = 200
"""At most this many boxes of a category are compared with those of another."""


class BoxQuestioner:
    """Makes questions about scenes, balanced by the sizes of categories in the training scenes."""

    def __init__(self, rooms: Iterable[SeenRoom], seed: int):
        """Measures the sizes of categories.

        Args:
            rooms: the training scenes.
            seed: of all random draws.
        """
        self._seed = seed
        found: dict[str, list] = {}
        for room in rooms:
            for name, box in zip(room.names, room.boxes, strict=True):
                found.setdefault(name, []).append(box[3:6])
        sizes = {name: np.array(rows) for name, rows in found.items() if len(rows) >= MIN_BOXES}
        self._typical = {name: float(np.median(s.max(-1))) for name, s in sizes.items()}
        rng = np.random.default_rng(seed)
        self._volumes = {
            name: rng.permutation(s.prod(-1))[:_MAX_COMPARED] for name, s in sorted(sizes.items())
        }
        self._larger: dict[tuple[str, str], float] = {}

    def ask(self, scene_id: str, room: SeenRoom) -> list[dict]:
        """Returns the question records of a scene: a function of scene, seed and sizes."""
        for pair in itertools.permutations(sorted(set(room.names)), 2):
            if pair not in self._larger and all(name in self._volumes for name in pair):
                self._larger[pair] = self._often_larger(*pair)
        room = dataclasses.replace(room, larger=self._larger, typical=self._typical)
        number = zlib.crc32(scene_id.encode())
        rng, box_rng = (np.random.default_rng([self._seed, number, stream]) for stream in (1, 2))
        return [
            _located(record) if "box" in record else record
            for record in make_questions(room, rng, box_rng)
        ]

    def _often_larger(self, name: str, other: str) -> float:
        """Returns P(volume of `name` > volume of `other`), with add-one smoothing.

        Only pairs whose volumes differ by MIN_VOLUME_RATIO count.
        """
        one, two = self._volumes[name][:, None], self._volumes[other]
        more = (one >= MIN_VOLUME_RATIO * two).sum()
        less = (two >= MIN_VOLUME_RATIO * one).sum()
        return float((more + 1) / (more + less + 2))


def _located(record: dict) -> dict:
    """Returns a box question in the words of GEODE (Sec. 2.2), in the scene's own frame."""
    name, (x, y, z, *edges, yaw) = record["objects"][0]["name"], record["box"]
    length, width, height = (round(100 * edge) for edge in edges)
    turned = f", turned by {round(np.degrees(yaw))} degrees" if yaw else ""
    rationale = (
        f"The center of the {name} is at x {x:z.1f}, y {y:z.1f}, {z:z.1f} meters above the floor. "
        f"It is {length} centimeters long, {width} centimeters wide and {height} centimeters high"
        f"{turned}."
    )
    return record | {"question": f"Locate the {name}.", "rationale": rationale}
