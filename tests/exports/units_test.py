"""Numbers and units are read from words correctly, or not at all."""

import contextlib
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from geode_jax.exports.units import (
    KIND_UNITS,
    UNITS,
    UnclearUnitError,
    asked_unit,
    read_quantity,
    read_unit,
    write_number,
)

WORDS = {
    "mm": ("mm", "millimeters", "milli-meters", "millimetres", "Millimeter", "MM"),
    "cm": ("cm", "centimeters", "centimetre", "cms"),
    "m": ("m", "meters", "metres", "Meter"),
    "km": ("km", "kilometers", "kilometre"),
    "ft": ("ft", "feet", "foot", "ft."),
    "in": ("inch", "inches", "Inches"),
    "yd": ("yd", "yards", "yard"),
    "m2": ("m2", "m²", "m^2", "sq m", "sqm", "sq. m", "square meters", "square metre", "㎡"),
    "cm2": ("cm2", "sq cm", "square centimeters", "cm²"),
    "ft2": ("ft2", "ft²", "sq ft", "sq. ft.", "sqft", "square feet", "square foot", "feet squared"),
    "in2": ("in2", "in²", "sq in", "square inches"),
    "yd2": ("yd2", "sq yd", "square yards"),
    "items": ("items", "item"),
}
SPELLINGS = [(name, word) for name, words in WORDS.items() for word in words]
PLACES = (
    *("How many {} tall is the bed?", "How large is it in {}?", "In {}, how wide is the bed?"),
    *("How large is the bed ({})?", "How large is the bed [{}]?", "How large is it (in {})?"),
    *("How large is it? Give one number, the unit is {}.", "How large is it? Unit: {}"),
    *("How large is it, measured in {}?", "How large is it? Answer in {}.", "How large, {}?"),
    *('How large is it in "{}"?', "How large is it in **{}**?", "How large is it (unit = {})?"),
    *("What is the size in {} of the bed that is 3 km from it?", "Its size, in {} ({})?"),
    "What is the number of {} from the foot of the bed to the two items?",
)


@pytest.mark.parametrize(("name", "word"), SPELLINGS)
def test_a_unit_is_read_in_every_place_and_behind_a_number(name, word):
    assert read_unit(word) == name
    for text in (f"1,900.5 {word}", f"about 1900.5 {word}.", f"1900.5 ({word})"):
        assert read_quantity(text) == (1900.5, name), text
    assert read_quantity(f"1900.5{word}") == (1900.5, name)
    for place in PLACES:
        question = place.replace("{}", word)
        assert asked_unit(question, UNITS[name].dimension) == name, question
        assert asked_unit(question.upper()) == name, question


@pytest.mark.parametrize("dimension", ["length", "area", "count"])
def test_a_unit_of_another_quantity_or_a_second_one_is_no_unit(dimension):
    for (name, word), place in itertools.product(SPELLINGS, PLACES):
        if UNITS[name].dimension != dimension:
            with pytest.raises(UnclearUnitError):
                asked_unit(place.replace("{}", word), dimension)
    for (name, word), (other, more) in itertools.product(SPELLINGS, SPELLINGS):
        if other != name:
            with pytest.raises(UnclearUnitError, match="several"):
                asked_unit(f"How large is the bed in {word} or {more}?")


@given(
    st.sampled_from(SPELLINGS),
    st.floats(1e-3, 1e9, allow_nan=False),
    st.sampled_from(["{} {}", "{}{}", "~{} {}", "roughly {} {}.", "{} {} tall"]),
)
def test_values_come_back_from_their_text(spelling, value, form):
    name, word = spelling
    written = write_number(value, name)
    assert read_quantity(form.format(written, word)) == (float(written), name)
    assert abs(float(written) - value) <= 0.5 * 10 ** -UNITS[name].decimals * 1.001
    assert read_quantity(f"{value!r}") == (value, None)


@given(st.text(max_size=40), st.sampled_from(sorted(set(KIND_UNITS))))
def test_any_text_is_a_known_unit_or_none(text, kind):
    quantity = read_quantity(text)
    assert quantity is None or (quantity.unit is None or quantity.unit in UNITS)
    with contextlib.suppress(UnclearUnitError):
        assert asked_unit(text, UNITS[KIND_UNITS[kind]].dimension) in (None, *UNITS)


@pytest.mark.parametrize(
    ("text", "number", "unit"),
    [
        ("5'11\"", 71, "in"),
        ("5’ 11”", 71, "in"),
        ("5 ft 11 in", 71, "in"),
        ("5 feet, 11 inches", 71, "in"),
        ("5'", 5, "ft"),
        ('11"', 11, "in"),
        ("1 m 90 cm", 190, "cm"),
        ("-2 m", -2, "m"),
        ("90°", 90, "deg"),
        ("1.5 radians", 1.5, "rad"),
        ("1.9 m tall.", 1.9, "m"),
        ("1e3", 1000, None),
        ("1,900 mm", 1900, "mm"),
        ("1,234,500 m", 1234500, "m"),
        (".5", 0.5, None),
        ("2 in", 2, "in"),
    ],
)
def test_numbers_with_units_are_read(text, number, unit):
    assert read_quantity(text) == (number, unit)


@pytest.mark.parametrize(
    "text",
    [
        *("", "m", "two", "2-3 m", "2 – 3 m", "2 to 3 m", "2 x 3 m", "2±1", "less than 2 m"),
        *(
            "1,500 m",
            "1,905",
            "-1,500 ft",
            "1,9 m",
            "1.900,5",
            "1 000 mm",
            "1.5.2",
            "1_000",
            "٣",
            "inf",
            "nan",
            "1e400",
        ),
        *("1½ m", "1/2 m", "5² m", "5 ft 11", "6 ft 13 in", "1 m 200 cm", "5.5 ft 3 in"),
        *("3 chairs", "1.9 m/s", "1.9 m per second", "1.9 m4", "2 m square", "$5", "5%", "2 M m"),
        *("1.9 m (6 ft)", "1.9 m, 6 ft", "2 furlongs", "4 dm", "3 miles"),
    ],
)
def test_what_is_not_one_number_has_no_value(text):
    assert read_quantity(text) is None


@pytest.mark.parametrize(
    ("question", "kind", "unit"),
    [
        ("How tall is the bed?", "object_size_estimation", None),
        ("What is the length of the longest dimension (length, width, or height) of the bed?",)
        + ("object_size_estimation", None),
        ("What is the distance between the two items in this room?", "object_abs_distance", None),
        ("How far is the bed from the foot of the table?", "object_abs_distance", None),
        ("How many chair(s) are in this room?", "object_counting", None),
        ("How many feet does the chair have?", "scanqa", None),
        ("How tall is the bed in in?", "object_size_estimation", "in"),
        ("How tall is the bed (in.)?", "object_size_estimation", "in"),
        ("The bed is 3 feet from the wall. How far is the table in meters?",)
        + ("object_abs_distance", "m"),
        ("By how many degrees is the bed turned?", "other", None),
    ],
)
def test_questions_without_a_unit_or_with_one(question, kind, unit):
    dimension = UNITS[KIND_UNITS[kind]].dimension if kind in KIND_UNITS else None
    assert asked_unit(question, dimension) == unit


@pytest.mark.parametrize(
    ("question", "why"),
    [
        ("How tall is the bed in furlongs?", "unknown"),
        ("How tall is the bed (cubits)?", "unknown"),
        ("How many cubits tall is the bed?", "unknown"),
        ("How tall is the bed? The unit is dm.", "unknown"),
        ("How fast is the bed in meters per second?", "unknown"),
        ("How fast is the bed in m/s?", "unknown"),
        ("How large is the bed in meters square?", "unknown"),
        ("How tall is the bed in m^4?", "unknown"),
        ("How tall is the bed, in deca-metres?", "unknown"),
        ("How tall is the bed in hundreds of meters?", "not as the one"),
        ("How tall is the bed in feet and inches?", "several"),
        ("How tall is the bed in meters, not feet?", "several"),
        ("The table is 3 feet tall. How tall is the bed?", "not as the one"),
        ("What is the meter height of the bed?", "not as the one"),
        ("How tall is the bed in degrees?", "another quantity"),
        ("How tall is the bed in cubic meters?", "another quantity"),
    ],
)
def test_an_unclear_unit_is_said(question, why):
    with pytest.raises(UnclearUnitError, match=why):
        asked_unit(question, "length")


@pytest.mark.parametrize(
    ("dimension", "questions"),
    [
        (
            "length",
            [
                *("How tall is it in c.m.?", "How tall, in m. m.?", "Bed height/mm", "Height_cm?"),
                *("How far is it? Give decimeters.", "How far? Use decimetres.", "How far? ___ dm"),
                *("How far is it, to the nearest dm?", "How far is it? Reply with paces."),
                *("Express your answer using microns.", "Express the bed's height with smoots."),
                *("What is the height in micro-metres?", "Round the height to the nearest span."),
                *(
                    "What is the height in \u00b5m?",
                    'How wide is it in "?',
                    "How far? Answer as mm",
                ),
                *(
                    "How far is it?\uff08\u5355\u4f4d\uff1a\u5398\u7c73\uff09",
                    "\u042d\u0442\u043e how far?",
                ),
                *("Quelle est la distance, en centim\u00e8tres ?", "Wie weit ist es (Zentimeter)?"),
                *("Quelle est la hauteur de la chaise ?", "Wie hoch ist der Stuhl?"),
                *(
                    "\u00bfCu\u00e1l es la altura de la silla en metros?",
                    "Quanto \u00e8 alta la sedia?",
                ),
                *("What is the ratio of its height to the chair's?", "How high, in ％?"),
                *("What percentage of the width does it span?", "What is the room's volume?"),
                *("How many times as far is it in meters?", "How tall is it in meters or dm?"),
            ],
        ),
        ("area", ["What is the room's volume?", "How large is it in tsubo?", "How long is it?"]),
        (
            "count",
            [
                *("How many chairs, in dozens?", "How many pairs of shoes are there?"),
                *("What fraction of the chairs is red?", "Combien de chaises y a-t-il ?"),
            ],
        ),
    ],
)
def test_a_question_that_may_ask_for_something_unknown_has_no_usual_unit(dimension, questions):
    for question in questions:
        with pytest.raises(UnclearUnitError):
            asked_unit(question, dimension)


def test_wordings_of_benchmarks_keep_the_usual_unit():
    for dimension, question in (
        ("length", "How far is the caf\u00e9 table from the nearest chair's leg?"),
        ("length", "How tall is the T.V.? Answer the question using a single word or phrase."),
        ("length", "What is the length of the bed? Answer in one number, e.g. 3."),
        ("area", "What is the size of this room? If multiple rooms are shown, add them."),
        ("count", "How many chair(s) are in this room? Please answer with a number."),
    ):
        assert asked_unit(question, dimension) is None, question
