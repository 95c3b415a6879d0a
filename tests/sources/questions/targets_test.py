"""The spatial head's targets of the rooms' questions determine the answers."""

import functools
import re

import numpy as np
import pytest

from geode_jax.data.question_arrays import lay_out_questions, stack_questions
from geode_jax.data.tokens import train_tokenizer
from geode_jax.exports import RELATIONS as ALL_RELATIONS
from geode_jax.sources.questions import margins
from geode_jax.sources.rooms import layout
from tests.sources.questions.answered import (
    COUNT,
    RELATIONS,
    Facts,
    chosen,
    of_kind,
    questions_by_room,
)


@functools.cache
def tokenizer():
    questions = (record["question"] for _, records in questions_by_room() for record in records)
    return train_tokenizer(questions, layout.NAMES, min_count=2)


def targets_of(records):
    return stack_questions(records, tokenizer(), 256, 64, "answer")


def test_a_name_that_several_objects_have_has_no_box_target():
    """Where "chair" is read, the nearest chair is unknown; its gap stays a target."""
    shared = named = 0
    for seen, records in questions_by_room()[:50]:
        tensors = {
            "target/boxes": seen.boxes,
            "target/labels": np.array([layout.NAMES.index(name) for name in seen.names]),
        }
        arrays = targets_of(records)
        placed = [(i, 256 * i) for i in range(len(records))]
        q = len(records)
        laid = lay_out_questions(arrays, placed, tensors, q, 1, 512 * q, 0)
        assert "object_row" not in laid
        for i, record in enumerate(records):
            for j, found in enumerate(arrays["object_place"][i] >= 0):
                if not found:
                    assert laid["object_column_SQO"][i, j] == -1
                    continue
                box = arrays["objects_SQO7"][i, j]
                own = seen.names[int(np.abs(seen.boxes - box).sum(-1).argmin())]
                several = seen.names.count(own) > 1
                assert (laid["object_column_SQO"][i, j] == -1) == several
                shared, named = shared + several, named + 1
                if several:  # the anchor and other unique objects keep their boxes
                    assert record["kind"] in ("object_rel_distance", "obj_appearance_order")
                    assert record["kind"] == "obj_appearance_order" or j > 0
                    assert laid["objects_mask_SQO"][i, j]
            np.testing.assert_array_equal(laid["gaps_SQO"][i], arrays["gaps_SQO"][i])
    assert 20 < shared < named / 10


def turn_class(angle):
    return "Turn Back" if abs(angle) > 135 else "Turn Left" if angle > 0 else "Turn Right"


def answer_from_targets(kind, names, boxes, gaps, angle, relation):
    """Returns the answer that the targets of a question imply, None if they imply none.

    Args:
        kind: the question's kind.
        names, boxes: those of its n objects, in the order of the targets.
        gaps: [n] distances from the first.
        angle: degrees of the turn, left positive.
        relation: probabilities by name.
    """
    side = "left" if angle > 0 else "right"
    if kind in ("proximity", "object_rel_distance"):
        nearest = names[1 + int(np.argmin(gaps[1:]))]
        assert kind != "proximity" or relation[kind] == (nearest == names[1])
        return nearest
    if kind == "contact":
        assert relation[kind] == (gaps[1] < 0.021)
        return "yes" if gaps[1] < 0.021 else "no"
    if kind == "size_comparison":
        volume = np.prod(boxes[:, 3:6], axis=-1)
        assert relation[kind] == (volume[0] > volume[1])
        return names[int(np.argmax(volume))]
    if kind in ("orientation", "object_rel_direction_easy"):
        assert kind != "orientation" or relation[kind] == (angle > 0)
        return side
    if kind == "object_rel_direction_medium":
        return "back" if abs(angle) > 135 else side
    if kind == "object_rel_direction_hard":
        return f"{'front' if abs(angle) < 90 else 'back'}-{side}"
    if kind == "route_planning":
        return turn_class(angle)
    if kind == "object_abs_distance":
        return f"{gaps[1]:.1f}"
    if kind == "object_size_estimation":
        return f"{100 * boxes[0, 3:6].max():.0f}"
    return None


IMPLIED = tuple(
    kind for kind in COUNT
    if kind in RELATIONS or "rel_d" in kind or kind in (
        "route_planning", "object_abs_distance", "object_size_estimation"
    )
)  # fmt: skip


@pytest.mark.parametrize("kind", IMPLIED)
def test_targets_imply_the_answer(kind):
    """The smallest gap, the turn, the larger volume and so on give the recorded answer."""
    records = [record for _, record in of_kind(kind)]
    rows = targets_of(records)
    for i, record in enumerate(records):
        n = int(rows["objects_mask_SQO"][i].sum())
        name_of = {tuple(np.float32(item["box"])): item["name"] for item in record["objects"]}
        boxes = rows["objects_SQO7"][i, :n]
        names = [name_of[tuple(box)] for box in boxes]
        relation = {
            name: rows["relations_SQr"][i, r]
            for r, name in enumerate(ALL_RELATIONS)
            if rows["relations_mask_SQr"][i, r]
        }
        angle = (
            np.degrees(np.arctan2(*rows["angle_SQ2"][i])) if rows["angle_mask_SQ"][i] else np.nan
        )
        found = answer_from_targets(kind, names, boxes, rows["gaps_SQO"][i, :n], angle, relation)
        answer = chosen(record) if "options" in record else record["answer"]
        if "value" in record:  # boxes are given to 0.1 mm
            step = {"m": 0.101, "cm": 1}[record["unit"]]
            assert float(found) == pytest.approx(float(answer), abs=step)
            assert rows["value_SQ"][i] == np.float32(answer)
        else:
            # For a route with two turns it is the first turn.
            assert found == answer.split(", ")[0], record


def test_distances_are_from_the_anchor_in_any_order_of_the_objects():
    """Exports in which the object that distances are measured from is not first are read."""
    records = [record for _, record in of_kind("object_rel_distance")]
    for record in records:
        anchor = re.search(r"is the closest to the (.+)\?\n", record["question"])[1]
        assert record["objects"][0]["name"] == anchor
    last = [{**r, "objects": [*r["objects"][1:], r["objects"][0]]} for r in records]
    rows, again = targets_of(records), targets_of(last)
    for name in ("objects_SQO7", "objects_mask_SQO", "gaps_SQO", "object_place"):
        np.testing.assert_array_equal(rows[name], again[name])
    # The teacher's relations are those of the record's first two objects, like `relation`.
    for found, own in ((rows, records), (again, last)):
        pairs = [[item["index"] for item in record["objects"][:2]] for record in own]
        np.testing.assert_array_equal(found["pair"], pairs)


@pytest.mark.parametrize(
    "lettering",
    ["({}) {}", "{}) {}", "{}: {}", "{}.  {}", "{}. the {}", "{}. {}."],
)
def test_the_anchor_is_found_whatever_the_lettering_of_the_options(lettering):
    records = [record for _, record in of_kind("object_rel_distance")][:20]
    last = []
    for record in records:
        names = [option.split(". ", 1) for option in record["options"]]
        options = [lettering.format(letter, name) for letter, name in names]
        objects = [*record["objects"][1:], record["objects"][0]]
        last.append({**record, "options": options, "objects": objects})
    rows, again = targets_of(records), targets_of(last)
    for name in ("objects_SQO7", "gaps_SQO"):
        np.testing.assert_array_equal(rows[name], again[name])


def test_no_distance_is_taught_where_the_anchor_is_unknown():
    _, record = of_kind("object_rel_distance")[0]
    for options in ([f"{x}. thing {x}" for x in "ABCD"], [f"{x}. lamp" for x in "ABCD"]):
        rows = targets_of([{**record, "options": options}])
        assert not rows["objects_mask_SQO"].any() and not rows["gaps_SQO"].any()


def test_of_several_objects_of_a_category_the_first_to_appear_is_the_target():
    several = 0
    for room, record in of_kind("obj_appearance_order"):
        facts = Facts(room)
        for item in record["objects"]:
            rows = facts.rows[item["name"]]
            shown = room.rays[:, rows] >= margins.APPEARANCE_PIXELS
            first = int(shown.any(1).argmax())
            assert room.rays[first, item["index"]] == room.rays[first, rows].max()
            several += len(rows) > 1
    assert several > 20


def test_unreadable_routes_and_coinciding_objects_have_no_turn_target():
    _, record = of_kind("route_planning")[0]
    objects = record["objects"]
    five = {**record, "objects": [*objects, *objects][:5]}
    still = {
        **record,
        "objects": [objects[0], {**objects[1], "box": objects[0]["box"]}, objects[2]],
    }
    rows = targets_of([record, {**record, "objects": objects[:2]}, five, still])
    assert rows["angle_mask_SQ"].tolist() == [True, False, False, False]
