"""Questions about 200 rooms, and facts about a room computed without the package.

The facts come from complex arithmetic on box corners. Of the generator they use only the boxes.
"""

import collections
import functools
import itertools

import numpy as np

from geode_jax.sources.questions.room import ASKERS
from geode_jax.sources.rooms import export
from geode_jax.sources.rooms.arrays import seen_room
from geode_jax.sources.rooms.scene import make_and_observe

SCENES = 200
RELATIONS = ("proximity", "contact", "size_comparison", "orientation")
COUNT = {kind: most for kind, most, _ in ASKERS}
"""Kind -> the most questions of this kind in a room."""


@functools.cache
def questions_by_room():
    """Returns [(seen room, records)] of all scenes."""
    result = []
    for index in range(SCENES):
        scene, seen = make_and_observe(21, index)
        result.append((seen_room(scene, seen), export.questions(scene, seen)))
    return result


def of_kind(kind):
    return [
        (room, r) for room, records in questions_by_room() for r in records if r["kind"] == kind
    ]


def outline(box):
    """Returns points along the footprint's edge, at most 2 cm apart, as complex numbers."""
    corners = np.array([1 + 1j, -1 + 1j, -1 - 1j, 1 - 1j])
    corners = corners.real * box[3] / 2 + 1j * corners.imag * box[4] / 2
    steps = np.linspace(0, 1, 130)[:, None]
    edge = corners + (np.roll(corners, -1) - corners) * steps
    return complex(box[0], box[1]) + edge.ravel() * np.exp(1j * box[6])


def gap(a, b):
    """Returns the distance of two boxes to about 1 mm: outline to rectangle, both ways."""

    def to_rectangle(points, box):
        local = (points - complex(box[0], box[1])) * np.exp(-1j * box[6])
        out = np.maximum(np.abs(local.real) - box[3] / 2, 0)
        return np.hypot(out, np.maximum(np.abs(local.imag) - box[4] / 2, 0)).min()

    level = min(to_rectangle(outline(a), b), to_rectangle(outline(b), a))
    high = max(abs(a[2] - b[2]) - (a[5] + b[5]) / 2, 0)
    return np.hypot(level, high)


class Facts:
    """Returns {noun: boxes}."""

    def __init__(self, room):
        self.room = room
        self.rows = collections.defaultdict(list)
        for row, name in enumerate(room.names):
            self.rows[name].append(row)

    def box(self, name):
        assert len(self.rows[name]) == 1, f"the {name} is not one object"
        return self.room.boxes[self.rows[name][0]]

    def gap(self, a, b):
        return min(
            gap(self.room.boxes[i], self.room.boxes[j])
            for i, j in itertools.product(self.rows[a], self.rows[b])
        )

    def angle(self, stand, face, target):
        """Returns the degrees to the left from facing `face` to facing `target`."""
        here, ahead, aside = (complex(*self.box(n)[:2]) for n in (stand, face, target))
        return np.degrees(np.angle((aside - here) / (ahead - here)))


def chosen(record):
    """Returns the text of the option with the answer's letter."""
    options = dict(option.split(". ", 1) for option in record["options"])
    assert list(options) == list("ABCD"[: len(options)]) and len(set(options.values())) > 1
    return options[record["answer"]]
