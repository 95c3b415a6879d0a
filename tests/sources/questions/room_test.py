"""Every question is answered again from its text and the boxes, and cannot be guessed blind.

The answers here come from complex arithmetic on box corners and from the sentences alone; nothing
of the generator is used but the boxes, the pixel counts and the room.
"""

import collections
import functools
import itertools
import re

import numpy as np
import pytest

from geode_jax.data.question_arrays import lay_out_questions, stack_questions
from geode_jax.data.tokens import train_tokenizer
from geode_jax.exports import RELATIONS as ALL_RELATIONS
from geode_jax.sources.questions import asker
from geode_jax.sources.questions.room import make_questions
from geode_jax.sources.rooms import export, layout
from geode_jax.sources.rooms.arrays import seen_room
from geode_jax.sources.rooms.scene import make_and_observe

SCENES = 200
RELATIONS = ("proximity", "contact", "size_comparison", "orientation")
COUNT = {
    "proximity": 2, "contact": 2, "size_comparison": 2, "orientation": 2, "object_counting": 2,
    "object_abs_distance": 3, "object_size_estimation": 3, "room_size_estimation": 1,
    "object_rel_distance": 2, "object_rel_direction_easy": 1, "object_rel_direction_medium": 1,
    "object_rel_direction_hard": 1, "route_planning": 1, "obj_appearance_order": 1,
    "scene_description": 1, "object_box": 6,
}  # fmt: skip


@functools.cache
def asked():
    """[(what is seen, records)] of all scenes."""
    result = []
    for index in range(SCENES):
        scene, seen = make_and_observe(21, index)
        result.append((seen_room(scene, seen), export.questions(scene, seen)))
    return result


def of_kind(kind):
    return [(room, r) for room, records in asked() for r in records if r["kind"] == kind]


# -------------------------------------------------------------------- answering independently


def outline(box):
    """Points along the footprint's edge, 2 cm apart or closer, as complex numbers."""
    corners = np.array([1 + 1j, -1 + 1j, -1 - 1j, 1 - 1j])
    corners = corners.real * box[3] / 2 + 1j * corners.imag * box[4] / 2
    steps = np.linspace(0, 1, 130)[:, None]
    edge = corners + (np.roll(corners, -1) - corners) * steps
    return complex(box[0], box[1]) + edge.ravel() * np.exp(1j * box[6])


def gap(a, b):
    """Distance of two boxes to about 1 mm: outline to rectangle, both ways."""

    def to_rectangle(points, box):
        local = (points - complex(box[0], box[1])) * np.exp(-1j * box[6])
        out = np.maximum(np.abs(local.real) - box[3] / 2, 0)
        return np.hypot(out, np.maximum(np.abs(local.imag) - box[4] / 2, 0)).min()

    level = min(to_rectangle(outline(a), b), to_rectangle(outline(b), a))
    high = max(abs(a[2] - b[2]) - (a[5] + b[5]) / 2, 0)
    return np.hypot(level, high)


class Facts:
    """The boxes by noun."""

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
        """Degrees to the left from facing `face` to facing `target`."""
        here, ahead, aside = (complex(*self.box(n)[:2]) for n in (stand, face, target))
        return np.degrees(np.angle((aside - here) / (ahead - here)))


def chosen(record):
    """Text of the option that the answer's letter names."""
    options = dict(option.split(". ", 1) for option in record["options"])
    assert list(options) == list("ABCD"[: len(options)]) and len(set(options.values())) > 1
    return options[record["answer"]]


def groups(pattern, record):
    match = re.fullmatch(pattern, record["question"])
    assert match, record["question"]
    return match.groups()


def reply_proximity(room, record):
    anchor, a, b = groups(r"Which is closer to the (.+), the (.+) or the (.+)\?", record)
    facts = Facts(room)
    assert abs(facts.gap(anchor, a) - facts.gap(anchor, b)) > 0.29
    first = facts.gap(anchor, a) < facts.gap(anchor, b)
    assert record["relation"]["proximity"] == first
    return a if first else b


def reply_contact(room, record):
    a, b = groups(r"Is the (.+) touching the (.+)\?", record)
    distance = Facts(room).gap(a, b)
    assert distance < 0.021 or distance > 0.249
    assert record["relation"]["contact"] == (distance < 0.021)
    return "yes" if distance < 0.021 else "no"


def reply_size_comparison(room, record):
    a, b = groups(r"Which is larger, the (.+) or the (.+)\?", record)
    ratio = np.prod(Facts(room).box(a)[3:6]) / np.prod(Facts(room).box(b)[3:6])
    assert max(ratio, 1 / ratio) >= 1.3
    assert record["relation"]["size_comparison"] == (ratio > 1)
    return a if ratio > 1 else b


def reply_orientation(room, record):
    pattern = r"If I stand by the (.+) facing the (.+), is the (.+) on my left or on my right\?"
    angle = Facts(room).angle(*groups(pattern, record))
    assert 19.9 < abs(angle) < 160.1
    assert record["relation"]["orientation"] == (angle > 0)
    return "left" if angle > 0 else "right"


def reply_object_counting(room, record):
    (name,) = groups(r"How many (.+)\(s\) are in this room\?", record)
    assert name not in room.vague
    assert room.names.count(name) > 1
    return str(room.names.count(name))


def reply_object_abs_distance(room, record):
    pattern = (
        r"Measuring from the closest point of each object, what is the direct distance between "
        r"the (.+) and the (.+) \(in meters\)\?"
    )
    return f"{Facts(room).gap(*groups(pattern, record)):.1f}"


def reply_object_size_estimation(room, record):
    pattern = (
        r"What is the length of the longest dimension \(length, width, or height\) of the (.+), "
        r"measured in centimeters\?"
    )
    return f"{max(Facts(room).box(*groups(pattern, record))[3:6]) * 100:.0f}"


def reply_room_size_estimation(room, record):
    assert record["question"].startswith("What is the size of this room (in square meters)?")
    return f"{room.room[0] * room.room[1]:.1f}"


def reply_object_rel_distance(room, record):
    pattern = (
        r"Measuring from the closest point of each object, which of these objects \((.+)\) is the "
        r"closest to the (.+)\?\nIf there are multiple .+ measure to the closest\."
    )
    listed, anchor = groups(pattern, record)
    facts, names = Facts(room), listed.split(", ")
    assert [option[3:] for option in record["options"]] == names
    ranked = sorted(names, key=lambda name: facts.gap(name, anchor))
    assert facts.gap(ranked[1], anchor) - facts.gap(ranked[0], anchor) > 0.24
    return ranked[0]


def direction(record, room, asked_for):
    pattern = r"If I am standing by the (.+) and facing the (.+), is the (.+) to " + asked_for
    stand, face, target = groups(pattern, record)[:3]
    return Facts(room).angle(stand, face, target)


def reply_object_rel_direction_easy(room, record):
    angle = direction(record, room, r"the left or the right of the (.+)\?")
    assert 19.9 < abs(angle) < 160.1
    return "left" if angle > 0 else "right"


def reply_object_rel_direction_medium(room, record):
    angle = direction(record, room, r"my left, right, or back\?\nAn object is to my back .+")
    assert 19.9 < abs(angle) < 125.1 or abs(angle) > 144.9
    return "back" if abs(angle) > 135 else "left" if angle > 0 else "right"


def reply_object_rel_direction_hard(room, record):
    pattern = r"my front-left, front-right, back-left, or back-right\?\nThe directions .+"
    angle = direction(record, room, pattern)
    assert all(abs(abs(angle) - bound) > 9.9 for bound in (0, 90, 180))
    return f"{'front' if abs(angle) < 90 else 'back'}-{'left' if angle > 0 else 'right'}"


def reply_route_planning(room, record):
    pattern = (
        r"You are a robot beginning at the (.+) and facing the (.+)\. You want to navigate to the "
        r"(.+)\. You will perform the following actions \(Note: for each \[please fill in\], "
        r"choose either 'turn back,' 'turn left,' or 'turn right\.'\): (1\. .+)\. "
        r"You have reached the final destination\."
    )
    start, face, goal, text = groups(pattern, record)
    facts = Facts(room)

    def centre(name):
        return complex(*facts.box(name)[:2])

    here, heading, turns, blank = centre(start), centre(face) - centre(start), [], False
    for step in re.split(r" ?\d\. ", text)[1:]:
        if step == "[please fill in]":
            blank = True
            continue
        name = step.removeprefix("Go forward until the ")
        angle = np.degrees(np.angle((centre(name) - here) / heading))
        if blank:
            assert abs(angle) > 44.9 and not 125.1 < abs(angle) < 144.9
            turns.append("Back" if abs(angle) > 135 else "Left" if angle > 0 else "Right")
        else:
            assert abs(angle) < 1e-6
        heading, here, blank = centre(name) - here, centre(name), False
    assert name == goal
    return ", ".join(f"Turn {turn}" for turn in turns)


def reply_obj_appearance_order(room, record):
    pattern = r"What will be the first-time appearance order .+ in the video: (.+)\?"
    facts, first = Facts(room), {}
    for name in groups(pattern, record)[0].split(", "):
        shown = room.rays[:, facts.rows[name]].max(1)
        first[name] = int(np.flatnonzero(shown >= asker.FIRST_SEEN)[0])
    assert len(set(first.values())) == len(first) >= 3
    return ", ".join(sorted(first, key=first.get))


def reply_scene_description(room, record):
    area = room.room[0] * room.room[1]
    size = "small" if area < 18 else "medium" if area < 32 else "large"
    words = dict(zip(("a", "two", "three", "four", "five"), range(1, 6), strict=True))
    _, listed = record["answer"].split(" with ")
    assert len(record["answer"].split()) <= 14
    items = re.split(", | and ", listed.rstrip("."))
    for item in items:
        number, noun = item.split(" ", 1)
        if words[number] > 1:
            noun = "bookshelf" if noun == "bookshelves" else noun[:-1]
        assert room.names.count(noun) == words[number]
    assert len(items) == min(4, len(set(room.names)))
    return f"A {size} room with {listed}"


def reply_object_box(room, record):
    (name,) = groups(r"What is the 3D bounding box of the (.+)\?", record)
    box = Facts(room).box(name)
    np.testing.assert_array_equal(record["box"], box)
    np.testing.assert_allclose([float(x) for x in record["answer"].split()], box, atol=0.00501)
    assert re.fullmatch(r"(-?\d+\.\d\d ?){7}", record["answer"]) and "-0.00" not in record["answer"]
    pattern = (
        rf"From the middle of the room, the {name} stands (.+) meters to the (east|west) and (.+) "
        r"meters to the (north|south), its center (.+) meters above the floor\. It is (\d+) "
        r"centimeters long, (\d+) centimeters wide and (\d+) centimeters high, and turned by "
        r"(-?\d+) degrees\."
    )
    x, east, y, north, z, *edges, turn = re.fullmatch(pattern, record["rationale"]).groups()
    place = [float(x) * (1 if east == "east" else -1), float(y) * (1 if north == "north" else -1)]
    np.testing.assert_allclose([*place, float(z)], box[:3], atol=0.0501)
    np.testing.assert_allclose([float(edge) / 100 for edge in edges], box[3:6], atol=0.00501)
    np.testing.assert_allclose(np.radians(float(turn)), box[6], atol=0.01)
    return record["answer"]


REPLIES = {name.removeprefix("reply_"): f for name, f in globals().items() if "reply_" in name}


@pytest.mark.parametrize("kind", COUNT)
def test_answers_follow_from_text_and_boxes(kind):
    records = of_kind(kind)
    assert len(records) > SCENES / 4
    for room, record in records:
        answer = chosen(record) if "options" in record else record["answer"]
        assert REPLIES[kind](room, record) == answer, record
        assert set(record) <= {
            "id", "scene_id", "kind", "question", "answer", "options", "value", "unit",
            "rationale", "relation", "objects", "box",
        }  # fmt: skip
        assert record["rationale"].endswith(".")
        if "value" in record:
            assert record["value"] == float(record["answer"])
            assert record["unit"] in ("items", "m", "cm", "m2")


def test_objects_are_the_nouns_in_order_with_their_boxes():
    for room, records in asked():
        for record in records:
            position = 0
            for item in record.get("objects", ()):
                assert item["name"] == room.names[item["index"]]
                assert item["name"] not in room.vague
                np.testing.assert_array_equal(item["box"], room.boxes[item["index"]])
                # The one that distances are measured from comes first, wherever the text has it.
                if record["kind"] != "object_rel_distance" or item != record["objects"][0]:
                    position = record["question"].index(f"{item['name']}", position)
            named = {name for name in room.names if re.search(rf"\b{name}\b", record["question"])}
            if record["kind"] not in ("object_counting", "scene_description"):
                assert named == {item["name"] for item in record.get("objects", ())}


def test_numbers_of_questions():
    kinds = collections.Counter(r["kind"] for _, records in asked() for r in records)
    assert set(kinds) == set(COUNT)
    for room, records in asked():
        counts = collections.Counter(r["kind"] for r in records)
        assert all(counts[kind] <= most for kind, most in COUNT.items())
        numbers = [record["id"].removeprefix(f"{room.scene_id}_") for record in records]
        assert numbers == [f"{k:02d}" for k in range(len(records))]
    assert 18 < sum(kinds.values()) / SCENES < 28
    assert kinds["object_box"] / SCENES > 3.5


def test_which_boxes_are_asked_for_changes_no_other_question():
    room, records = asked()[0]
    others = [record for record in records if record["kind"] != "object_box"]
    assert records[: len(others)] == others
    found = set()
    for seed in range(4):
        streams = np.random.default_rng([21, 0, 1]), np.random.default_rng(seed)
        again = make_questions(room, *streams)
        assert again[: len(others)] == others
        found.add(tuple(record["question"] for record in again[len(others) :]))
    assert len(found) > 1


def test_view_relations_agree_with_the_first_camera():
    tried = collections.Counter()
    for room, records in asked():
        pose = np.vstack([room.extrinsic[0], [0, 0, 0, 1]])
        for record in records:
            rows = [item["index"] for item in record.get("objects", ())][:2]
            for name, axis in (("left_right", 0), ("above_below", 1)):
                if name in record.get("relation", {}):
                    a, b = (pose @ [*room.boxes[row][:3], 1] for row in rows)
                    assert (room.rays[0, rows] > 0).all() and min(a[2], b[2]) > 0
                    assert record["relation"][name] == (a[axis] / a[2] < b[axis] / b[2])
                    tried[name, record["relation"][name]] += 1
    assert len(tried) == 4 and min(tried.values()) > 50


# ------------------------------------------- what the spatial head is taught beside the answer


@functools.cache
def tokenizer():
    questions = (record["question"] for _, records in asked() for record in records)
    return train_tokenizer(questions, layout.NAMES, min_count=2)


def taught(records):
    return stack_questions(records, tokenizer(), 256, 64, "answer")


def test_no_box_is_taught_at_a_name_that_several_things_have():
    """Which chair is nearest to the lamp is not known where "chair" is read; the gap is kept."""
    shared = named = 0
    for seen, records in asked()[:50]:
        tensors = {
            "target/boxes": seen.boxes,
            "target/labels": np.array([layout.NAMES.index(name) for name in seen.names]),
        }
        arrays = taught(records)
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
                if several:  # the anchor and what else a noun alone names is told
                    assert record["kind"] in ("object_rel_distance", "obj_appearance_order")
                    assert record["kind"] == "obj_appearance_order" or j > 0
                    assert laid["objects_mask_SQO"][i, j]
            np.testing.assert_array_equal(laid["gaps_SQO"][i], arrays["gaps_SQO"][i])
    assert 20 < shared < named / 10


def turn_class(angle):
    return "Turn Back" if abs(angle) > 135 else "Turn Left" if angle > 0 else "Turn Right"


def answer_from_targets(kind, names, boxes, gaps, angle, relation):
    """What the targets of a question alone say of its answer, None where they do not tell.

    Args:
        kind: of the question.
        names, boxes: of its n objects, in the order of the targets.
        gaps: [n] from the first.
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


TELLING = tuple(
    kind for kind in COUNT
    if kind in RELATIONS or "rel_d" in kind or kind in (
        "route_planning", "object_abs_distance", "object_size_estimation"
    )
)  # fmt: skip


@pytest.mark.parametrize("kind", TELLING)
def test_what_is_taught_beside_the_answer_tells_the_answer(kind):
    """Of every question: closest of the gaps, turn that is asked, volumes of the boxes ..."""
    records = [record for _, record in of_kind(kind)]
    rows = taught(records)
    for i, record in enumerate(records):
        n = int(rows["objects_mask"][i].sum())
        name_of = {tuple(np.float32(item["box"])): item["name"] for item in record["objects"]}
        boxes = rows["objects"][i, :n]
        names = [name_of[tuple(box)] for box in boxes]
        relation = {
            name: rows["relations"][i, r]
            for r, name in enumerate(ALL_RELATIONS)
            if rows["relations_mask"][i, r]
        }
        angle = np.degrees(np.arctan2(*rows["angle"][i])) if rows["angle_mask"][i] else np.nan
        found = answer_from_targets(kind, names, boxes, rows["gaps"][i, :n], angle, relation)
        answer = chosen(record) if "options" in record else record["answer"]
        if "value" in record:  # boxes are given to 0.1 mm
            step = {"m": 0.101, "cm": 1}[record["unit"]]
            assert float(found) == pytest.approx(float(answer), abs=step)
            assert rows["value"][i] == np.float32(answer)
        else:
            # Of a route with two turns it is the first.
            assert found == answer.split(", ")[0], record


def test_distances_to_the_closest_are_from_the_anchor_in_whatever_order_a_record_has_it():
    """Exports of other makers, and those made before the anchor came first."""
    records = [record for _, record in of_kind("object_rel_distance")]
    for record in records:
        anchor = re.search(r"is the closest to the (.+)\?\n", record["question"])[1]
        assert record["objects"][0]["name"] == anchor
    last = [{**r, "objects": [*r["objects"][1:], r["objects"][0]]} for r in records]
    rows, again = taught(records), taught(last)
    for name in ("objects", "objects_mask", "gaps", "object_place"):
        np.testing.assert_array_equal(rows[name], again[name])
    # The teacher's relations are of the record's first two, as `relation` is.
    for found, own in ((rows, records), (again, last)):
        pairs = [[item["index"] for item in record["objects"][:2]] for record in own]
        np.testing.assert_array_equal(found["pair"], pairs)


def test_of_several_of_a_category_the_one_that_appears_first_is_taught():
    several = 0
    for room, record in of_kind("obj_appearance_order"):
        facts = Facts(room)
        for item in record["objects"]:
            rows = facts.rows[item["name"]]
            shown = room.rays[:, rows] >= asker.FIRST_SEEN
            first = int(shown.any(1).argmax())
            assert room.rays[first, item["index"]] == room.rays[first, rows].max()
            several += len(rows) > 1
    assert several > 20


def test_no_turn_is_taught_where_a_route_is_not_understood_or_two_objects_are_in_one_place():
    _, record = of_kind("route_planning")[0]
    objects = record["objects"]
    five = {**record, "objects": [*objects, *objects][:5]}
    still = {
        **record,
        "objects": [objects[0], {**objects[1], "box": objects[0]["box"]}, objects[2]],
    }
    rows = taught([record, {**record, "objects": objects[:2]}, five, still])
    assert rows["angle_mask"].tolist() == [True, False, False, False]


# ------------------------------------------------------------------------------ not guessable


def blind_accuracy(kind):
    """Logistic regression on the nouns in their roles and on the last two together.

    Fitted on half of the scenes, tested on the other half, both ways: all that category priors
    can tell.
    """
    records = of_kind(kind)
    nouns = [[layout.NAMES.index(item["name"]) for item in r["objects"]] for _, r in records]
    label = np.array([r["relation"][kind] for _, r in records])
    half = np.array([int(room.scene_id[-6:]) % 2 for room, _ in records])
    size, roles = len(layout.NAMES), len(nouns[0])
    inputs = np.zeros((len(records), size * roles + size * size + 1))
    for row, named in enumerate(nouns):
        inputs[row, [size * role + noun for role, noun in enumerate(named)]] = 1
        inputs[row, size * roles + size * named[-2] + named[-1]] = 1
        inputs[row, -1] = 1
    right = 0
    for test in (0, 1):
        x, y = inputs[half != test], label[half != test]
        weights = np.zeros(inputs.shape[1])
        for _ in range(8):  # Newton steps with a ridge
            p = 1 / (1 + np.exp(-x @ weights))
            slope = x.T @ (p - y) + 2 * weights
            weights -= np.linalg.solve((x.T * (p * (1 - p))) @ x + 2 * np.eye(len(weights)), slope)
        right += ((inputs[half == test] @ weights > 0) == label[half == test]).sum()
    return right / len(records)


@pytest.mark.parametrize("kind", RELATIONS)
def test_relations_cannot_be_guessed(kind):
    labels = [record["relation"][kind] for _, record in of_kind(kind)]
    assert 0.42 < np.mean(labels) < 0.58
    assert blind_accuracy(kind) < 0.62


def test_the_blind_guesser_would_find_a_prior():
    """The guesser is no straw man: volumes of categories alone it predicts well."""
    prior = layout.larger_prior()
    guess = [
        prior[tuple(item["name"] for item in record["objects"])] > 0.5
        for _, record in of_kind("size_comparison")
    ]
    pairs = itertools.permutations(layout.NAMES, 2)
    raw = [max(prior[pair], 1 - prior[pair]) for pair in pairs]
    assert np.mean(raw) > 0.7  # what an unbalanced question would give away
    labels = [record["relation"]["size_comparison"] for _, record in of_kind("size_comparison")]
    assert np.mean(np.equal(guess, labels)) < 0.62


def relative_accuracy(guess, value):
    """VSI-Bench's mean relative accuracy."""
    return np.mean(abs(guess - value) / value <= 1 - np.linspace(0.5, 0.95, 10))


def median(values):
    """One of the values: no count is a half."""
    return np.quantile(values, 0.5, method="lower")


@pytest.mark.parametrize(
    ("kind", "most"),
    [
        ("object_counting", 0.621),  # what frequency reaches on VSI-Bench itself
        ("object_abs_distance", 0.36),
        ("object_size_estimation", 0.55),
        ("room_size_estimation", 0.42),
    ],
)
def test_numbers_cannot_be_guessed(kind, most):
    """The median answer to the question's own wording (so of its category) scores low."""
    fit, score = collections.defaultdict(list), []
    records = [(int(room.scene_id[-6:]) % 2, r) for room, r in of_kind(kind)]
    wording = {"object_abs_distance": kind}.get(kind)
    for half, record in records:
        if half == 0:
            fit[wording or record["question"]].append(record["value"])
    overall = median([value for values in fit.values() for value in values])
    for half, record in records:
        if half == 1:
            known = fit[wording or record["question"]]
            guess = median(known) if len(known) >= 5 else overall
            score.append(relative_accuracy(guess, record["value"]))
    assert np.mean(score) < most


@pytest.mark.parametrize("kind", [kind for kind in COUNT if "rel_d" in kind or kind[:5] == "route"])
def test_no_letter_and_no_class_is_favoured(kind):
    records = [record for _, record in of_kind(kind)]
    letters = collections.Counter(record["answer"] for record in records)
    classes = collections.Counter(chosen(record) for record in records)
    # Twice the share of one option among as many as there mostly are is far from any real bias.
    most = max(len(record["options"]) for record in records)
    assert max(letters.values()) < min(2 / most, 0.6) * len(records)
    assert max(classes.values()) < 0.6 * len(records)
