"""VSI-Bench scoring on its golden cases, and the paper's four relations."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from geode_jax.evaluate.metrics import spatial


def record(kind, prediction, answer, **more):
    fixed = {"id": "q", "kind": kind, "question": "?"}
    return {**fixed, "answer": answer, "prediction": prediction, **more}


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        ("A.", 1.0),
        ("a", 1.0),
        ("A", 1.0),
        ("A\n", 1.0),
        ("A. chair", 1.0),
        ("A\nbecause", 0.0),
        ("B)", 0.0),
        ("A) chair", 0.0),
        (" A", 0.0),
        ("", 0.0),
        ("B", 0.0),
    ],
)
def test_letter_golden_cases(prediction, expected):
    assert spatial.letter_accuracy(prediction, "A") == expected


@pytest.mark.parametrize(
    ("prediction", "target", "expected"),
    [
        ("10", "10", 1.0),
        ("10.5", "10", 1.0),
        ("9.5", "10", 1.0),
        ("11", "10", 0.9),
        ("9", "10", 0.9),
        ("15", "10", 0.1),
        ("5", "10", 0.1),
        ("15.1", "10", 0.0),
        ("10 chairs", "10", 1.0),
        ("10.", "10", 1.0),
        ("three", "3", 0.0),
        ("1,200", "1200", 0.0),
        ("", "3", 0.0),
        ("nan", "3", 0.0),
        ("inf", "3", 0.0),
        ("0", "0", 1.0),
        ("1", "0", 0.0),
        ("two", "three", 0.0),
    ],
)
def test_number_golden_cases(prediction, target, expected):
    assert spatial.number_accuracy(prediction, target) == pytest.approx(expected)


def test_mra_thresholds_are_those_of_the_benchmark():
    # Its code: int((0.95 - 0.5) / 0.05 + 2) points, which floating point makes 10 and not 11.
    points = np.linspace(0.5, 0.95, int((0.95 - 0.5) / 0.05 + 2))
    assert len(points) == 10
    for prediction in np.linspace(0.0, 5.0, 101):
        expected = float((abs(prediction - 3) / 3 <= 1 - points).mean())
        assert spatial.mean_relative_accuracy(prediction, 3.0) == expected


@given(st.floats(0.01, 1e4), st.floats(0.0, 2.0), st.floats(0.0, 2.0), st.sampled_from((-1.0, 1.0)))
def test_mra_falls_with_the_error(target, error, more, sign):
    near = spatial.mean_relative_accuracy(target * (1 + sign * error), target)
    far = spatial.mean_relative_accuracy(target * (1 + sign * (error + more)), target)
    assert 0.0 <= far <= near <= 1.0


@given(st.text(), st.text())
def test_any_text_is_scored(prediction, target):
    for score in (spatial.letter_accuracy, spatial.number_accuracy):
        assert 0.0 <= score(prediction, target) <= 1.0
    assert spatial.relation_accuracy(prediction, [target]) in (0.0, 1.0)


def test_relations_are_matched_after_normalisation():
    assert spatial.relation_accuracy(" The  Chair. ", ["the chair"]) == 1.0
    assert spatial.relation_accuracy("the chair is", ["the chair"]) == 0.0
    assert spatial.relation_accuracy("sofa", ["couch", "sofa"]) == 1.0


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        (record("proximity", "", "", options=["A. x"]), "relation"),
        (record("object_counting", "", ""), "number"),
        (record("surface_distance", "", "", value=1.2), "number"),
        (record("surface_distance", "", "", value=0.0), "number"),
        (record("route_planning", "", ""), "letter"),
        (record("nearer_view", "", "", options=["A. x"]), "letter"),
        (record("object_rel_distance", "", "", options=["A. x"], value=1.2), "letter"),
        (record("nearer_view", "", "", options=["A. x"], value=1.2), "letter"),
        (record("nearer_view", "", ""), "relation"),
        (record("scene_description", "", ""), "text"),
    ],
)
def test_rule(question, expected):
    assert spatial.rule(question) == expected


def test_summaries_are_means_over_kinds_not_over_questions():
    predictions = [
        record("proximity", "chair", "chair"),
        record("proximity", "chair", "Chair."),
        record("proximity", "table", "chair"),
        record("contact", "no", "yes"),
        record("object_counting", "10", "10"),
        record("object_counting", "10.5", "10"),
        record("object_counting", "15", "10"),
        record("surface_distance", "11", "10", value=10.0),
    ]
    found = spatial.spatial_scores(predictions)
    assert found["proximity"] == pytest.approx(2 / 3)
    assert found["contact"] == 0.0
    # A mean of fewer than four relations says so.
    assert found["spatial_accuracy"] == pytest.approx(1 / 3) and found["spatial_relations"] == 2
    assert found["object_counting"] == pytest.approx(0.7)
    assert found["mra"] == pytest.approx((0.7 + 0.9) / 2)
    assert found["metric_mra"] == pytest.approx(0.9)
    # Only one of the benchmark's tasks is there; the RGB-D kind is none of them.
    assert found["vsi_overall"] == pytest.approx(0.7)
    assert found["vsi_tasks"] == 1.0
    assert "size_comparison" not in found
    assert "object_rel_direction" not in found


def test_macro_average_over_the_eight_tasks():
    # Directions: 1, 0 and a missing "hard" give one task score of 0.5.
    predictions = [
        record("object_rel_direction_easy", "A", "A"),
        record("object_rel_direction_medium", "A", "B"),
        record("object_rel_distance", "C", "C"),
        record("object_rel_distance", "C", "D"),
        record("route_planning", "A", "A"),
        record("obj_appearance_order", "A", "B"),
        record("object_counting", "3", "3"),
        record("object_abs_distance", "11", "10"),
        record("object_size_estimation", "15", "10"),
        record("room_size_estimation", "x", "10"),
    ]
    found = spatial.spatial_scores(predictions)
    assert "spatial_relations" not in found
    assert found["object_rel_direction"] == pytest.approx(0.5)
    assert found["vsi_tasks"] == 8.0
    expected = (0.5 + 0.5 + 1 + 0 + 1 + 0.9 + 0.1 + 0) / 8
    assert found["vsi_overall"] == pytest.approx(expected)


def test_no_vsi_keys_without_its_tasks():
    found = spatial.spatial_scores([record("left_right", "left", "left")])
    assert found == {"left_right": 1.0}


def test_agreement_with_the_teacher():
    found = spatial.spatial_scores(
        [
            record("contact", "yes", "no", teacher_answer="Yes."),
            record("contact", "yes", "yes"),
            record("route_planning", "A", "B", teacher_answer="A. left"),
        ],
        "teacher",
    )
    assert (found["contact"], found["route_planning"]) == (1.0, 1.0)


def test_scene_description_is_scored_as_text():
    question = record("scene_description", "a red chair", "a red table")
    assert spatial.question_score(question) == pytest.approx(2 / 3)


def test_a_question_without_reference_is_named():
    with pytest.raises(ValueError, match="question q: no teacher answer"):
        spatial.question_score(record("contact", "yes", "yes"), "teacher")


def test_a_number_in_words_is_scored_by_its_value():
    record = {"kind": "object_size_estimation", "answer": "1,900 mm", "value": 1900.0}
    assert spatial.question_score(record | {"prediction": "1900"}) == 1
    assert spatial.question_score(record | {"prediction": "1.9"}) == 0
    record = {"kind": "object_size_estimation", "answer": "5'11\"", "value": 71.0, "unit": "in"}
    assert spatial.question_score(record | {"prediction": "71.0"}) == 1


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("dining chair", "dining table", 0.0),
        ("the bed", "the lamp", 0.0),
        ("A chair", "A lamp", 0.0),
        ("a bed", "a lamp", 0.0),
        ("The lamp.", "the lamp", 1.0),
        ("B", "(A) lamp", 0.0),
        ("A", "(A) lamp", 1.0),
        ("(A) lamp", "(A) lamp", 1.0),
        ("A. bed", "A. lamp", 1.0),  # VSI-Bench reads the letter alone
        ("B", "b", 1.0),
    ],
)
def test_an_option_in_words_is_compared_as_a_whole(prediction, answer, expected):
    options = ["A. lamp", "B. bed"]
    for kind in ("object_rel_distance", "closest"):
        question = record(kind, prediction, answer, options=options)
        assert spatial.question_score(question) == expected


def test_a_number_without_value_is_scored_as_one_with_it():
    question = record("surface_distance", "2.5", "2.4")
    assert spatial.rule(question) == "number"
    assert (
        spatial.question_score(question) == spatial.question_score(question | {"value": 2.4}) == 1
    )
