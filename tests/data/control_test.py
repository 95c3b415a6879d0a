import pytest

from geode_jax.data.control import (
    BOX,
    REG,
    NoNumberError,
    answer_unit,
    control_of,
    number_of,
)


def test_a_box_or_a_number_answers_by_a_token():
    assert control_of({"kind": "object_counting", "answer": "3"}) == REG
    assert control_of({"kind": "weight", "answer": "3 kg", "value": 3.0}) == REG
    assert control_of({"kind": "object_box", "box": [1.0] * 7}) == BOX
    assert control_of({"kind": "size", "box": [1.0] * 7, "value": 1.0}) == BOX
    choice = {"kind": "nearer_view", "options": ["A. x", "B. y"], "answer": "A", "value": 1.2}
    assert control_of(choice) == ""
    assert control_of({"kind": "proximity", "answer": "chair"}) == ""


SIZE = {"kind": "object_size_estimation", "question": "How tall is the bed?", "answer": "190"}


@pytest.mark.parametrize(
    ("changes", "number", "unit"),
    [
        ({}, (190, 0.01), "cm"),  # the unit of the kind
        ({"value": 190.0, "unit": "cm"}, (190, 0.01), "cm"),
        ({"value": 190.0, "unit": "centimetres"}, (190, 0.01), "cm"),
        ({"question": "How many meters tall is the bed?", "answer": "1.9"}, (1.9, 1), "m"),
        ({"answer": "6 ft 2 in"}, (74, 0.0254), "in"),
        # The value was converted from the number of the answer.
        (
            {"question": "How tall, in feet?", "answer": "6.2", "value": 1.9, "unit": "m"},
            (1.9, 1),
            "m",
        ),
        ({"kind": "weight", "answer": "3", "value": 3.0}, (3, 1), None),
    ],
)
def test_a_number_is_in_the_unit_that_its_record_or_words_name(changes, number, unit):
    record = SIZE | changes
    value, base = number_of(record)
    assert (value, base) == pytest.approx(number)
    assert answer_unit(record) == unit


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"answer": "2-3"}, "no number"),
        ({"question": "How tall (millimeters)?", "value": 190.0, "unit": "cm"}, "not the one"),
        ({"answer": "190 ft", "value": 190.0, "unit": "cm"}, "not the one"),
        ({"question": "How many cubits tall?"}, "unknown unit"),
        ({"question": "How tall, in square feet?"}, "another quantity"),
        ({"question": "How tall, in feet and meters?"}, "several units"),
        ({"value": 190.0, "unit": "furlongs"}, "unknown or not regressed"),
        ({"value": 190.0, "unit": "degrees"}, "unknown or not regressed"),
        ({"answer": "0"}, "zero or negative"),
        ({"answer": "0", "value": -0.0}, "zero or negative"),
        ({"answer": "-3"}, "zero or negative"),
        ({"answer": "1e300"}, "not from 0.01"),
        ({"answer": "1e-320"}, "not from 0.01"),
        ({"answer": "0.9"}, "not from 0.01"),  # centimetres
        ({"value": 101.0, "unit": "m"}, "impossible for a room"),
        (
            {"kind": "object_counting", "question": "How many?", "value": 2.5},
            "impossible for a room",
        ),
        ({"value": 10**300, "answer": "1"}, "not from 0.01"),
    ],
)
def test_what_cannot_be_regressed_has_no_number(changes, why):
    with pytest.raises(NoNumberError, match=why):
        number_of(SIZE | changes)
    answer_unit(SIZE | changes)  # never raises
