"""The table of question kinds is consistent, and every asker and reader uses its kinds."""

import pytest

from geode_jax.exports import kinds, units
from geode_jax.exports.kinds import KINDS, NUMERIC_KINDS, OPEN, VSI_CHOICE_KINDS, VSI_TASKS
from geode_jax.sources.datasets import conversations
from geode_jax.sources.rgbd import questions as rgbd
from geode_jax.sources.rooms import export as rooms
from geode_jax.sources.rooms.scene import make_and_observe
from tests.sources.datasets.layouts import cases

OF_DATA_SETS = {
    "question",
    "width",
    "absolute_direction_object",
    "camera_obj_abs_dist",
    "conversation",
}
"""Kinds of data sets that are not in the table; the readers keep their names."""


@pytest.mark.parametrize("name", KINDS)
def test_a_kind_has_what_belongs_to_its_form(name):
    kind = KINDS[name]
    assert (kind.unit in units.UNITS) == (kind.form == kinds.NUMBER)
    assert not kind.task or kind.form in (kinds.NUMBER, kinds.OPTION)
    assert kind.label or not (kind.task or kind.form in (kinds.RELATION, kinds.SENTENCE))
    assert kind.objects in ("", kinds.ROUTE, kinds.CANDIDATES)
    assert not name.endswith(OPEN) or kind == kinds.Kind(kinds.TEXT)


def test_the_tasks_are_those_of_the_benchmark():
    """VSI-Bench (Yang et al., 2024), Table 1, and the question types of its test.jsonl."""
    assert VSI_TASKS == (
        "object_counting",
        "object_abs_distance",
        "object_size_estimation",
        "room_size_estimation",
        "object_rel_distance",
        "object_rel_direction",
        "route_planning",
        "obj_appearance_order",
    )
    assert VSI_TASKS[:4] == kinds.VSI_NUMERIC_KINDS
    levels = tuple(f"object_rel_direction_{level}" for level in ("easy", "medium", "hard"))
    assert levels == kinds.DIRECTION_KINDS
    assert {*VSI_CHOICE_KINDS} == {*VSI_TASKS[4:], *levels} - {"object_rel_direction"}
    assert "object_counting" in kinds.COUNT_KINDS
    assert {"surface_distance", "camera_motion", "space_size"} <= {*NUMERIC_KINDS}


def test_every_asker_makes_kinds_of_the_table():
    asked = set()
    for index in range(6):
        asked.update(record["kind"] for record in rooms.questions(*make_and_observe(21, index)))
    assert asked <= KINDS.keys() and {*kinds.RELATION_KINDS, *VSI_TASKS[:4]} <= asked
    assert rgbd.KINDS.keys() <= KINDS.keys()


def test_every_reader_makes_kinds_of_the_table_or_passes_on_those_of_its_data_set():
    read = {record["kind"] for case in cases("a", "b").values() for record in case.expected}
    assert read - KINDS.keys() == OF_DATA_SETS
    renamed = {*conversations.VSI590K_KINDS.values(), *conversations.VICA_KINDS.values()}
    assert renamed <= {*NUMERIC_KINDS, *VSI_CHOICE_KINDS}
