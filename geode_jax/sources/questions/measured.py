"""Questions about scenes of a data set from their labelled boxes: those of the rooms that fit.

What the rooms know by construction is measured here: which category is usually larger, and how
long each usually is, from the boxes of the training scenes. Contact is not asked about: boxes
around scanned things overlap without touching.
"""

import dataclasses
import itertools
import zlib
from collections.abc import Iterable

import numpy as np

from geode_jax.sources.questions.asker import SIZE_RATIO, SeenRoom
from geode_jax.sources.questions.room import make_questions

ENOUGH = 5
"""Boxes of a category, or pairs of two, from which on its usual size counts as known."""
_MOST = 200
"""Boxes of a category that are compared with those of another."""


class BoxQuestioner:
    """Asks about scenes, and knows what words alone would tell of their answers."""

    def __init__(self, rooms: Iterable[SeenRoom], seed: int):
        """Takes the measure of the scenes that are trained on.

        Args:
            rooms: these.
            seed: of what is drawn.
        """
        self._seed = seed
        sizes: dict[str, list] = {}
        for room in rooms:
            for name, box in zip(room.names, room.boxes, strict=True):
                sizes.setdefault(name, []).append(box[3:6])
        sizes = {name: np.array(rows) for name, rows in sizes.items() if len(rows) >= ENOUGH}
        self._typical = {name: float(np.median(s.max(-1))) for name, s in sizes.items()}
        rng = np.random.default_rng(seed)
        self._volumes = {
            name: rng.permutation(s.prod(-1))[:_MOST] for name, s in sorted(sizes.items())
        }
        self._larger: dict[tuple[str, str], float] = {}

    def ask(self, scene_id: str, room: SeenRoom) -> list[dict]:
        """The question records of a scene, a function of the scene, the seed, and the measure."""
        for pair in itertools.permutations(sorted(set(room.names)), 2):
            if pair not in self._larger and all(name in self._volumes for name in pair):
                self._larger[pair] = self._often_larger(*pair)
        room = dataclasses.replace(room, larger=self._larger, typical=self._typical)
        number = zlib.crc32(scene_id.encode())
        streams = (np.random.default_rng([self._seed, number, stream]) for stream in (1, 2))
        return [
            _located(record) if "box" in record else record
            for record in make_questions(room, *streams)
        ]

    def _often_larger(self, name: str, other: str) -> float:
        """P(volume of one > volume of the other), among pairs that differ by SIZE_RATIO."""
        one, two = self._volumes[name][:, None], self._volumes[other]
        more, less = (one >= SIZE_RATIO * two).sum(), (two >= SIZE_RATIO * one).sum()
        return float((more + 1) / (more + less + 2))


def _located(record: dict) -> dict:
    """A question for a box in GEODE's words (Sec. 2.2), answered in the scene's own frame."""
    name, (x, y, z, *edges, yaw) = record["objects"][0]["name"], record["box"]
    length, width, height = (round(100 * edge) for edge in edges)
    turned = f", turned by {round(np.degrees(yaw))} degrees" if yaw else ""
    rationale = (
        f"The center of the {name} is at x {x:z.1f}, y {y:z.1f}, {z:z.1f} meters above the floor. "
        f"It is {length} centimeters long, {width} centimeters wide and {height} centimeters high"
        f"{turned}."
    )
    return record | {"question": f"Locate the {name}.", "rationale": rationale}
