import pytest

from geode_jax.errors import UserError
from geode_jax.evaluate import scores
from geode_jax.exports.kinds import KINDS


def record(kind, answer, **more):
    return {"id": "q", "kind": kind, "question": "?", "answer": answer, **more}


def test_frequency_answers_with_the_most_common_of_the_kind():
    train = [record("contact", text) for text in ("yes", "no", "yes")]
    train += [record("object_counting", text) for text in ("2", "3", "3", "2", "10", "10")]
    asked = [record("contact", "no"), record("object_counting", "2"), record("proximity", "chair")]
    for order in (train, train[::-1]):
        found = scores.frequency_baseline(order, asked)
        assert [item["prediction"] for item in found] == ["yes", "10", ""]
    assert "prediction" not in asked[0]


def test_frequency_of_the_teachers_answers():
    train = [record("contact", "yes"), record("contact", "yes", teacher_answer="no")]
    (found,) = scores.frequency_baseline(train, [record("contact", "yes")], "teacher")
    assert found["prediction"] == "no"


def test_score_has_the_keys_of_what_was_asked_and_no_others():
    predictions = [
        record("contact", "yes", prediction="yes"),
        record("object_counting", "4", prediction="4", value=4.0),
    ]
    found = scores.score(predictions)
    assert found["contact"] == found["spatial_accuracy"] == found["object_counting"] == 1.0
    assert found["mra"] == found["rouge1"] == found["bleu1"] == 1.0
    assert found["questions"] == 2.0
    expected = {"meteor", "answer_words", "rouge1_precision", "rouge1_recall", "rougeL", "bleu4"}
    assert expected <= set(found)
    absent = {"proximity", "orientation", "object_rel_direction", "depth_rmse"}
    assert not absent & set(found)
    # Every key has its row in the table.
    assert set(found) <= {row.key for row in scores.ROWS}


def test_empty_input_is_refused():
    with pytest.raises(ValueError, match="no predictions to score"):
        scores.score([])
    with pytest.raises(UserError, match="no question carries a teacher answer"):
        scores.score([record("contact", "yes", prediction="yes")], "teacher")
    with pytest.raises(ValueError, match="no scores to show"):
        scores.score_table({"model": {}})


def test_percent_of_teacher():
    asked = [
        record("contact", "yes", prediction="no", teacher_answer="no"),
        record("contact", "yes", prediction="yes", teacher_answer="no"),
    ]
    found = scores.percent_of_teacher(asked)
    assert found["contact"] == found["spatial_accuracy"] == found["rouge1"] == 50.0
    assert "answer_words" not in found
    shown = {scores.PERCENT_PREFIX + key: value for key, value in found.items()}
    lines = scores.score_table({"model": shown, "frequency": {}}).splitlines()
    heading = lines.index("Percent of teacher")
    assert lines[heading + 1].split() == ["spatial", "accuracy", "(mean)", "50.0", "%", "-"]
    assert lines[heading + 2].split() == ["contact", "50.0", "%", "-"]
    assert scores.percent_of_teacher([record("contact", "yes", prediction="yes")]) == {}


def test_table():
    table = scores.score_table(
        {
            "model": {
                "contact": 0.91234,
                "depth_rmse": 0.5,
                "questions": 1200.0,
                "left_right": 1.0,
            },
            "vision_removed": {"contact": 0.5, "questions": 1200.0},
            "frequency": {"contact": float("nan")},
        },
        notes={"depth_rmse": "input contains depth"},
    )
    lines = table.splitlines()
    assert lines[0].split() == ["model", "vision", "removed", "frequency"]
    (contact,) = [line for line in lines if line.strip().startswith("contact")]
    assert contact.split() == ["contact", "0.912", "0.500", "nan"]
    (depth,) = [line for line in lines if "depth RMSE" in line]
    assert "(lower is better, input contains depth)" in depth
    assert depth.split()[-3:] == ["0.500", "-", "-"]
    assert "1,200" in table
    # A kind that ROWS does not list is shown under the other questions; the columns line up.
    following = lines[lines.index("Other questions") + 1]
    assert following.split() == ["left", "right", "1.000", "-", "-"]
    assert len({len(line) for line in lines if line.startswith("  ")}) == 1


def test_every_label_of_the_table_of_kinds_is_shown():
    for name, kind in KINDS.items():
        assert not kind.label or scores.row_of(name).label == kind.label


def test_the_mean_of_the_directions_stands_before_them_and_after_the_closest_object():
    shown = [row.key for row in scores.ROWS if row.group == "Numbers and VSI-Bench tasks"]
    assert shown[6:13] == [
        "object_rel_distance",
        "object_rel_direction",
        *(f"object_rel_direction_{level}" for level in ("easy", "medium", "hard")),
        "route_planning",
        "obj_appearance_order",
    ]


def test_a_kind_whose_name_is_that_of_a_score_has_a_score_of_its_own():
    kinds = ("rouge1", "mra", "questions", "spatial_accuracy", "object_rel_direction", "depth_rmse")
    predictions = [record(kind, "yes", prediction="no") for kind in kinds]
    predictions += [record("contact", "yes", prediction="yes")]
    found = scores.score(predictions)
    assert [found[f"kind/{kind}"] for kind in kinds] == [0.0] * 6
    assert found["contact"] == found["spatial_accuracy"] == 1.0
    assert (found["questions"], found["rouge1"]) == (7.0, pytest.approx(1 / 7))
    assert not {"mra", "object_rel_direction", "vsi_overall", "depth_rmse"} & set(found)


def test_the_name_of_a_kind_does_not_break_the_table():
    name = "a\n\x1b[31m" + "b" * 900
    table = scores.score_table({"model": scores.score([record(name, "yes", prediction="no")])})
    assert "\x1b" not in table and max(map(len, table.splitlines())) < 120
