"""The rooms' questions about scenes of a data set, from their labelled boxes.

Rooms know by construction which category is usually larger and how long each usually is. Here both
are measured on the boxes of the training scenes. A question about contact comes with one of the
other answer about the same scene, so that the answer cannot be guessed.
"""

import dataclasses
import itertools
import zlib
from collections.abc import Iterable

import numpy as np

from geode_jax.geometry.upright_boxes import box_gaps, footprint_gaps
from geode_jax.sources.questions.margins import (
    MAX_APART,
    MAX_CONTACT_GAP,
    MIN_SEPARATION,
    MIN_VOLUME_RATIO,
)
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
        rng, box_rng, contact_rng = (
            np.random.default_rng([self._seed, number, stream]) for stream in (1, 2, 3)
        )
        room = dataclasses.replace(room, contacts=_balanced(room, contact_rng))
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


def _balanced(room: SeenRoom, rng: np.random.Generator) -> dict[tuple[int, int], float]:
    """Returns one of the room's pairs in contact and one not in contact; none if it has only one.

    Only objects count that their noun identifies.
    """
    unique = [room.names.count(name) == 1 and name not in room.vague for name in room.names]
    pairs = {pair: gap for pair, gap in room.contacts.items() if all(unique[n] for n in pair)}
    touching = [pair for pair, gap in pairs.items() if gap <= MAX_CONTACT_GAP]
    apart = [pair for pair in pairs if pair not in touching]
    if not touching or not apart:
        return {}
    drawn = [own[int(rng.integers(len(own)))] for own in (touching, apart)]
    return {pair: pairs[pair] for pair in drawn}


def box_contacts(boxes: np.ndarray) -> dict[tuple[int, int], float]:
    """Returns the gaps between upright boxes, for questions about contact.

    Boxes are in contact where one stands on the other (footprints overlap, heights meet) or beside
    it (heights overlap, footprints apart but meeting), each within `MAX_CONTACT_GAP`. Boxes that
    reach into each other, a chair under a table, do not tell whether the things touch.

    Args:
        boxes: [N, 7].

    Returns:
        {(i, j): gap in metres}, i < j: 0 in contact, or from `MIN_SEPARATION` to `MAX_APART`. All
        other pairs are left out.
    """
    gaps, level = box_gaps(boxes, boxes), footprint_gaps(boxes, boxes)
    low, high = boxes[:, 2] - boxes[:, 5] / 2, boxes[:, 2] + boxes[:, 5] / 2
    found = {}
    for i, j in itertools.combinations(range(len(boxes)), 2):
        overlap = min(high[i], high[j]) - max(low[i], low[j])
        stands = level[i, j] == 0 and abs(overlap) <= MAX_CONTACT_GAP
        beside = 0 < level[i, j] <= MAX_CONTACT_GAP and overlap > MAX_CONTACT_GAP
        if stands or beside:
            found[i, j] = 0.0
        elif MIN_SEPARATION <= gaps[i, j] <= MAX_APART:
            found[i, j] = float(gaps[i, j])
    return found


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
