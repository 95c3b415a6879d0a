"""Questions about a room with exact answers: VSI-Bench's tasks and the relations of the paper.

Wording, options and units of the VSI-Bench kinds follow VSI-Bench (Yang et al., 2024; centimetres
for sizes, metres for distances, square metres for rooms); proximity, contact, size comparison and
orientation are the four relations of the Hidden-CoT paper, Sec. IV. `object_box` asks for what
GEODE regresses, an object's box in the world frame.

Only visible objects are asked about, and every answer keeps a margin, so that nothing hinges on a
centimetre. Answers are balanced so that they cannot be guessed without looking: labels are drawn
before the objects where a kind has classes; numbers are spread in log scale; a size comparison is
kept with a probability inverse to how often its category pair has that answer; contact pairs are
laid out by a fair coin (`rooms`).
"""

import dataclasses
import itertools

import numpy as np

from geode_jax.geometry.upright_boxes import box_gaps, centres, footprint_gaps, to_box_plane
from geode_jax.sources.questions.words import (
    wrapped,
)

TOUCHING, APART = 0.02, 0.25
"""Gap of things in contact at most, of things not in contact at least, metres."""
SIZE_RATIO = 1.3
"""A size comparison needs volumes that differ by this factor."""
FAIR = 0.12
"""Category pairs whose larger one is known with probability above 1 - FAIR are not asked about."""
FIRST_SEEN, UNSEEN = 8, 5
"""Pixels of a view that make an object appear there, and fewer than which it does not."""
GLIMPSE = 8
"""Pixels of all views together that leave it open whether an object that is not visible counts."""

MIN_WAY = 0.7
"""Centres must be this far apart, metres, for a direction from one to the other."""
PAIR_SHARE = 0.75
"""Share of the pairs of a category that are asked to be counted; larger groups always are."""
USUAL = 0.35
"""Lengths are less likely asked about, the closer they are to their category's median: in
proportion to the log of the ratio, up to this log."""

_VIEW_SOFTNESS = 0.02
"""Tangent of the angle at which pair relations become sure."""


@dataclasses.dataclass(frozen=True)
class SeenRoom:
    """What questions are made from.

    Attributes:
        scene_id: id of the scene.
        room: size x, y, z, metres.
        floor: square metres; less than x times y where a corner is missing.
        names: noun of each visible object.
        boxes: [N, 7] of the visible objects, the rows of `target/boxes`.
        rays: [V, N] pixels that show each visible object.
        vague: nouns of which some further object is only glimpsed: not counted, not asked about.
        pairs: rows of the pairs laid out for questions about contact.
        extrinsic: [V, 3, 4] camera-from-world.
        larger: P(a larger than b) by category noun; one half where they are not in it.
        typical: median of the longest edge by category noun, metres, where it is known.
    """

    scene_id: str
    room: np.ndarray
    floor: float
    names: tuple[str, ...]
    boxes: np.ndarray
    rays: np.ndarray
    vague: frozenset[str]
    pairs: tuple[tuple[int, int], ...]
    extrinsic: np.ndarray
    larger: dict[tuple[str, str], float]
    typical: dict[str, float]


def pair_relations(boxes: np.ndarray, extrinsic: np.ndarray) -> np.ndarray:
    """P(left), P(right), P(above), P(below) of box i relative to box j in a view, [N, N, 4].

    By the image positions of the centres of boxes [N, 7] in the camera [3, 4]: a logistic
    function of their distance in tangents, so sure beyond a few degrees. One half each where a
    centre is behind the camera, and for a box and itself.
    """
    centre = boxes[:, :3] @ extrinsic[:, :3].T + extrinsic[:, 3]
    front = centre[:, 2] > 0.1
    image = centre[:, :2] / np.where(front, centre[:, 2], 1.0)[:, None]
    # Image x grows to the right and y downwards, so smaller is left of and above.
    difference = image[None, :] - image[:, None]
    difference = np.where((front[:, None] & front[None, :])[..., None], difference, 0.0)
    sure = 1 / (1 + np.exp(-np.clip(difference / _VIEW_SOFTNESS, -30, 30)))
    return np.stack([sure[..., 0], 1 - sure[..., 0], sure[..., 1], 1 - sure[..., 1]], axis=-1)


class Asker:
    """The facts of a room that several kinds share. `single` = rows that a noun alone names."""

    def __init__(self, seen: SeenRoom, rng: np.random.Generator, box_rng: np.random.Generator):
        self.seen, self.rng, self.box_rng = seen, rng, box_rng
        self.names, self.boxes = seen.names, seen.boxes
        self.gaps = box_gaps(self.boxes, self.boxes)
        self.level = footprint_gaps(self.boxes, self.boxes)
        clear = [n for n, name in enumerate(seen.names) if name not in seen.vague]
        self.single = [n for n in clear if seen.names.count(seen.names[n]) == 1]
        self.groups: dict[str, list[int]] = {}
        for n in clear:
            self.groups.setdefault(seen.names[n], []).append(n)
        self.view = pair_relations(self.boxes, seen.extrinsic[0])
        delta = self.boxes[None, :, :2] - self.boxes[:, None, :2]
        bearing = np.degrees(np.arctan2(delta[..., 1], delta[..., 0]))
        distance = np.hypot(delta[..., 0], delta[..., 1])
        # [stand, face, target]; lists, because single numbers are looked up thousands of times.
        self.turns = wrapped(bearing[:, None, :] - bearing[:, :, None]).tolist()
        self.bearing, self.distance = bearing.tolist(), distance.tolist()
        # The angle to the third of three, standing by the first and facing the second.
        self.triples = {
            (s, f, t): self.turns[s][f][t]
            for s, f, t in itertools.permutations(self.single, 3)
            if min(self.distance[s][f], self.distance[s][t]) >= MIN_WAY
        }

    def shuffled(self, items) -> list:
        items = list(items)
        return [items[k] for k in self.rng.permutation(len(items))]

    def passable(self, a: int, b: int) -> bool:
        """Whether the straight way between the centres of two boxes crosses no third box."""
        # Things that a route's ends stand on, or carry, are no obstacles.
        others = self.boxes[(self.level[[a, b]] > 0).all(0)]
        start, end = centres(self.boxes[[a, b]])
        local = to_box_plane(start + np.linspace(0, 1, 33) * (end - start), others)
        return not (np.abs(local) < others[:, 3:5] / 2).all(-1).any()

    def draft(self, question: str, answer: str, rows, rationale: str, **extra) -> dict:
        """A record without its id.

        `rows` = the objects in the order the question names them, except that the one which
        distances are measured from comes first.
        """
        record = {"question": question, "answer": answer, "rationale": rationale, **extra}
        if len(rows):
            record["objects"] = [
                {"name": self.names[n], "box": self.box(n), "index": int(n)} for n in rows
            ]
        return record

    def box(self, n: int) -> list[float]:
        """Row n of the boxes as a record has it: metres and radians to four decimals."""
        return [round(float(x), 4) for x in self.boxes[n]]

    def choice(self, question: str, options: list[str], answer: str, rows, rationale: str, **extra):
        """A multiple-choice record; the options keep this order."""
        letters = "ABCD"
        listed = [f"{letter}. {text}" for letter, text in zip(letters, options, strict=False)]
        letter = letters[options.index(answer)]
        rationale = f"{rationale} The answer is {letter}."
        return self.draft(question, letter, rows, rationale, options=listed, **extra)

    def with_view_relations(self, record: dict) -> dict:
        """Adds left_right and above_below of the first two objects where view 1 shows both."""
        rows = [item["index"] for item in record.get("objects", [])][:2]
        if len(rows) == 2 and (self.seen.rays[0, rows] >= FIRST_SEEN).all():
            left, _, above, _ = self.view[rows[0], rows[1]]
            named = (("left_right", left), ("above_below", above))
            sure = {name: float(round(p)) for name, p in named if abs(p - 0.5) > 0.45}
            if sure:
                record["relation"] = record.get("relation", {}) | sure
        return record


# ------------------------------------------------------------------------------ four relations


# ------------------------------------------------------------------------------------- numbers


# ----------------------------------------------------------------------------- multiple choice


# ----------------------------------------------------------------------------------- sentences
