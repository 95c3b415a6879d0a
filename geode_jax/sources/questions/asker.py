"""What the askers of all kinds share: geometry computed once per room, and drafts of records.

An asker is a generator function: it takes an `Asker` and yields drafts of question records, best
first, until the room gives no more. The table of askers is in `room.py`.
"""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import numpy as np

from geode_jax.geometry.upright_boxes import box_gaps, centres, footprint_gaps, to_box_plane
from geode_jax.sources.questions.margins import APPEARANCE_PIXELS, MIN_CENTRE_DISTANCE
from geode_jax.sources.questions.seen_room import SeenRoom, pair_relations
from geode_jax.sources.questions.words import wrap_degrees

Item = TypeVar("Item")


class Asker:
    """A room's geometry, its random numbers, and the methods that draft records.

    Attributes:
        seen: the room.
        rng: draws for all kinds but `object_box`.
        box_rng: draws for `object_box`, so that other questions do not depend on it.
        names, boxes: those of `seen`.
        gaps: [N, N] distances between boxes, metres.
        footprint_gaps: [N, N] the same between footprints.
        unique: rows of objects that a noun alone identifies.
        groups: noun -> rows of its objects; without the nouns of `seen.vague`.
        view_relations: [N, N, 4], `pair_relations` in the first view.
        turns: [stand][face][target] degrees from facing one object to facing another, left
            positive.
        bearing, distance: [from][to] degrees anticlockwise from x, and horizontal metres.
        triples: (stand, face, target) -> the turn, for unique objects that are far enough apart.
    """

    def __init__(self, seen: SeenRoom, rng: np.random.Generator, box_rng: np.random.Generator):
        self.seen, self.rng, self.box_rng = seen, rng, box_rng
        self.names, self.boxes = seen.names, seen.boxes
        self.gaps = box_gaps(self.boxes, self.boxes)
        self.footprint_gaps = footprint_gaps(self.boxes, self.boxes)
        clear = [n for n, name in enumerate(seen.names) if name not in seen.vague]
        self.unique = [n for n in clear if seen.names.count(seen.names[n]) == 1]
        self.groups: dict[str, list[int]] = {}
        for n in clear:
            self.groups.setdefault(seen.names[n], []).append(n)
        self.view_relations = pair_relations(self.boxes, seen.extrinsic[0])
        delta = self.boxes[None, :, :2] - self.boxes[:, None, :2]
        bearing = np.degrees(np.arctan2(delta[..., 1], delta[..., 0]))
        distance = np.hypot(delta[..., 0], delta[..., 1])
        # Lists, because single numbers are looked up thousands of times.
        self.turns = wrap_degrees(bearing[:, None, :] - bearing[:, :, None]).tolist()
        self.bearing, self.distance = bearing.tolist(), distance.tolist()
        self.triples: dict[tuple[int, int, int], float] = {
            (s, f, t): self.turns[s][f][t]
            for s, f, t in itertools.permutations(self.unique, 3)
            if min(self.distance[s][f], self.distance[s][t]) >= MIN_CENTRE_DISTANCE
        }

    def shuffled(self, items: Iterable[Item]) -> list[Item]:
        """Returns the items in random order."""
        items = list(items)
        return [items[k] for k in self.rng.permutation(len(items))]

    def is_way_clear(self, a: int, b: int) -> bool:
        """Returns whether the straight line between two boxes' centres crosses no third box."""
        # What the two objects stand on or carry is no obstacle.
        others = self.boxes[(self.footprint_gaps[[a, b]] > 0).all(0)]
        start, end = centres(self.boxes[[a, b]])
        local = to_box_plane(start + np.linspace(0, 1, 33) * (end - start), others)
        return not (np.abs(local) < others[:, 3:5] / 2).all(-1).any()

    def box(self, n: int) -> list[float]:
        """Returns row n of the boxes as records hold it: metres and radians to four decimals."""
        return [round(float(x), 4) for x in self.boxes[n]]

    def draft(
        self, question: str, answer: str, rows: Sequence[int], rationale: str, **fields: Any
    ) -> dict:
        """Returns a record without its ids and kind.

        Args:
            question, answer, rationale: texts.
            rows: the objects in the order in which the question names them, except that the
                object from which distances are measured comes first.
            **fields: further fields of the record.
        """
        record = {"question": question, "answer": answer, "rationale": rationale, **fields}
        if len(rows):
            record["objects"] = [
                {"name": self.names[n], "box": self.box(n), "index": int(n)} for n in rows
            ]
        return record

    def number(
        self, question: str, text: str, unit: str, rows: Sequence[int], rationale: str
    ) -> dict:
        """Returns the draft of a question whose answer `text` is a number in `unit`."""
        return self.draft(question, text, rows, rationale, value=float(text), unit=unit)

    def choice(
        self,
        question: str,
        options: Sequence[str],
        answer: str,
        rows: Sequence[int],
        rationale: str,
    ) -> dict:
        """Returns the draft of a multiple-choice question; the options keep their order."""
        letters = "ABCD"
        listed = [f"{letter}. {text}" for letter, text in zip(letters, options, strict=False)]
        letter = letters[options.index(answer)]
        rationale = f"{rationale} The answer is {letter}."
        return self.draft(question, letter, rows, rationale, options=listed)

    def with_view_relations(self, draft: dict) -> dict:
        """Adds left_right and above_below of the first two objects if view 1 shows both."""
        rows = [item["index"] for item in draft.get("objects", [])][:2]
        if len(rows) == 2 and (self.seen.rays[0, rows] >= APPEARANCE_PIXELS).all():
            left, _, above, _ = self.view_relations[rows[0], rows[1]]
            named = (("left_right", left), ("above_below", above))
            sure = {name: float(round(p)) for name, p in named if abs(p - 0.5) > 0.45}
            if sure:
                draft["relation"] = draft.get("relation", {}) | sure
        return draft
