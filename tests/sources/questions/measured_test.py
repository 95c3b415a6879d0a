"""Contact in scenes of data sets: which things touch, and that answers come in pairs."""

import dataclasses

import numpy as np
import pytest

from geode_jax.sources.datasets.instances import Labels, surface_contacts
from geode_jax.sources.questions.measured import BoxQuestioner, box_contacts
from geode_jax.sources.questions.seen_room import SeenRoom

TABLE = [0, 0, 0.4, 2, 1, 0.8, 0]


@pytest.mark.parametrize(
    ("other", "gap"),
    [
        ([0.5, 0, 0.9, 0.2, 0.2, 0.2, 0.3], 0.0),  # a lamp on the table
        ([0.5, 0, 0.93, 0.2, 0.2, 0.2, 0.3], None),  # three centimetres above it
        ([1.51, 0, 0.5, 1, 1, 1, 0], 0.0),  # a cabinet a centimetre beside it
        ([1.5, 0, 0.5, 1, 1, 1, 0], None),  # exactly edge to edge: its footprint overlaps
        ([0.8, 0.5, 0.4, 0.6, 0.6, 0.8, 0], None),  # a chair under it
        ([1.9, 0, 0.5, 1, 1, 1, 0], 0.4),
        ([2.6, 0, 0.5, 1, 1, 1, 0], None),  # too far to be asked about
        ([0, 0, 1.4, 2, 1, 0.6, 0], 0.3),  # a lamp hanging over it
    ],
)
def test_boxes_touch_where_one_stands_on_or_beside_the_other(other, gap):
    found = box_contacts(np.array([TABLE, other], np.float64))
    assert found == ({} if gap is None else {(0, 1): pytest.approx(gap)})


def test_surfaces_touch_where_vertices_are_near():
    edge = np.linspace(0, 1, 41)
    plate = np.stack(np.meshgrid(edge, edge), -1).reshape(-1, 2)

    def at(z, x=0.0):
        return np.column_stack([plate[:, 0] + x, plate[:, 1], np.full(len(plate), z)])

    # A slanted plate, whose box meets that of the others although its surface is far from them.
    slanted = np.column_stack([plate[:, 0] + 1.03, plate[:, 1], 1 - plate[:, 0]])
    parts = [at(0.0), at(0.03), at(0.5), slanted]
    vertices = np.concatenate(parts)
    instance = np.repeat(np.arange(4), len(plate))
    low = np.array([part.min(0) for part in parts])
    size = np.array([np.ptp(part, axis=0) for part in parts])
    boxes = np.column_stack([low + size / 2, size, np.zeros(4)])
    labels = Labels(vertices, instance, ("a", "b", "c", "d"), boxes, ())
    found = surface_contacts(labels, [0, 1, 2, 3])
    assert found == {(0, 1): 0.0, (0, 2): pytest.approx(0.5), (1, 2): pytest.approx(0.47)}
    assert surface_contacts(labels, [3, 0]) == {} == surface_contacts(labels, [])


def test_a_question_about_contact_comes_with_one_of_the_other_answer():
    room = SeenRoom(
        scene_id="s",
        room=np.array([6.0, 5, 3]),
        floor=30.0,
        names=("table", "lamp", "sofa", "chair", "chair"),
        boxes=np.array(
            [TABLE, [0.5, 0, 0.9, 0.2, 0.2, 0.2, 0], [0, 1.4, 0.4, 2, 1, 0.8, 0],
             [2.5, 2, 0.4, 0.5, 0.5, 0.8, 0], [2.5, -2, 0.4, 0.5, 0.5, 0.8, 0]]
        ),
        rays=np.full((2, 5), 20),
        vague=frozenset(),
        contacts={},
        extrinsic=np.tile(np.eye(3, 4), (2, 1, 1)),
        larger={},
        typical={},
    )  # fmt: skip
    room = dataclasses.replace(room, contacts=box_contacts(room.boxes))
    asker = BoxQuestioner([room], seed=0)
    asked = [r for r in asker.ask("s", room) if r["kind"] == "contact"]
    assert sorted(record["answer"] for record in asked) == ["no", "yes"]
    for record in asked:
        names = {item["name"] for item in record["objects"]}
        assert (names == {"table", "lamp"}) == (record["answer"] == "yes")
        assert record["relation"]["contact"] == (record["answer"] == "yes")
    apart = dataclasses.replace(room, contacts={(0, 2): 0.4})
    assert not [r for r in asker.ask("s", apart) if r["kind"] == "contact"]
