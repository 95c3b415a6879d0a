import json
from pathlib import Path

import pytest

from geode_jax.cli.command import main
from geode_jax.errors import UserError
from geode_jax.evaluate.text_answers import evaluate, read_questions
from tests.sources.datasets.layouts import cases

CASES = cases("scene1", "scene2")


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def scanqa(tmp_path) -> Path:
    def record(own: int, *answers: str) -> dict:
        return {"question_id": f"val-{own}", "question": "What?", "answers": list(answers)}

    path = tmp_path / "ScanQA_v1.0_val.json"
    rows = [record(0, "brown", "dark brown"), record(1, "brown"), record(2, "two"), record(3, "x")]
    path.write_text(json.dumps(rows))
    return path


@pytest.fixture
def predictions(tmp_path) -> Path:
    rows = [("val-0", "Dark Brown"), ("val-1", "red"), ("val-2", "2"), ("val-9", "?")]
    rows = [{"id": key, "prediction": text} for key, text in rows]
    return write_lines(tmp_path / "answers.jsonl", rows)


def test_scores_stand_beside_the_most_frequent_answer(predictions, scanqa, capsys):
    main(["evaluate", "text", "--predictions", str(predictions), "--dataset", str(scanqa)])
    printed = capsys.readouterr().out
    result = json.loads((predictions.parent / "answers.text.json").read_text())
    model, frequency = result["scores"]["model"], result["scores"]["frequency"]
    assert (model["em1"], model["em1_refined"]) == (25, 50)
    assert frequency["em1"] == 50  # brown, of 4
    assert result["missing"] == ["val-3"] and result["questions"] == 4
    assert any("1 of 4 questions have no prediction" in note for note in result["notes"])
    assert any("1 predictions belong to no question" in note for note in result["notes"])
    assert set(result["dataset"]) == {"file", "sha256", "revision"}
    assert result["evaluator"].startswith("geode_jax ")
    rows = {line[:26].strip(): line.split()[-2:] for line in printed.splitlines()}
    assert rows["EM@1"] == ["25.0", "50.0"]
    assert "METEOR, exact + stem only" in printed and "not COCO's METEOR 1.5" in printed


def test_questions_of_every_file(tmp_path):
    files = CASES["sqa3d"].write(tmp_path)
    path = files / "sqa_task/balanced/v1_balanced_sqa_annotations_test_scannetv2.json"
    assert read_questions(path).rows == {
        "220602000017": {
            "id": 220602000017,
            "kind": "sqa3d",
            "answer": "no",
            "answers": ["no"],
        }
    }
    own = write_lines(tmp_path / "questions.jsonl", CASES["scanqa"].expected)
    assert list(read_questions(own).rows) == ["scanqa-train-0", "scanqa-val-0"]
    said = [{"id": row["id"], "prediction": "brown"} for row in CASES["scanqa"].expected]
    answers = write_lines(tmp_path / "answers.jsonl", said)
    assert evaluate(answers, dataset=own)["scores"]["model"]["em1"] == 50


def test_predictions_of_a_run_are_scored_on_the_data_sets_file_and_alone(tmp_path, scanqa):
    rows = [
        {"id": f"scanqa-val-{i}", "kind": "scanqa", "question": "What?", "answer": truth}
        | {"source": "scanqa", "prediction": said}
        for i, (truth, said) in enumerate([("brown", "brown"), ("brown", "red"), ("two", "two")])
    ]
    path = write_lines(tmp_path / "predictions.jsonl", rows)
    official = evaluate(path, dataset=scanqa)
    assert official["missing"] == ["val-3"]
    assert official["scores"]["model"]["em1"] == 50
    alone = evaluate(path)
    assert (alone["questions"], alone["missing"]) == (3, [])
    assert alone["scores"]["model"]["em1"] == pytest.approx(200 / 3)
    assert alone["scores"]["frequency"]["em1"] == pytest.approx(200 / 3)


def test_kinds_have_their_own_rows(tmp_path):
    rows = [
        {"id": str(i), "kind": kind, "question": "?", "answer": "yes"}
        for i, kind in enumerate(["sqa3d_is", "sqa3d_is", "sqa3d_what"])
    ]
    own = write_lines(tmp_path / "questions.jsonl", rows)
    said = [{"id": i, "prediction": text} for i, text in enumerate(["yes", "no", "yes"])]
    scores = evaluate(write_lines(tmp_path / "said.jsonl", said), dataset=own)["scores"]["model"]
    assert (scores["em1/sqa3d_is"], scores["em1/sqa3d_what"]) == (50, 100)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("{", "not JSON"),
        ("{}", "must be a file of questions"),
        ("[]", "must be a file of questions"),
        ('[{"question_id": null}]', "record 0: question_id"),
        ('[{"question_id": "a"}]', "record 0: answer: must be a string"),
        ('[{"question_id": "a", "answers": []}]', "record 0: answer"),
        ('[{"question_id": "a", "answers": ["x", 1]}]', "record 0: answers"),
        ('{"annotations": [{"question_id": 1, "answers": [1]}]}', "record 0: answer"),
        ('[{"question_id": 1, "answers": ["x"]}, {"question_id": "1", "answers": ["x"]}]', "dupl"),
    ],
)
def test_other_files_are_refused(content, complaint, tmp_path, predictions, capsys):
    path = tmp_path / "questions.json"
    path.write_text(content)
    with pytest.raises(SystemExit) as end:
        main(["evaluate", "text", "--predictions", str(predictions), "--dataset", str(path)])
    error = capsys.readouterr().err
    assert end.value.code == 2 and complaint in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--predictions", "{said}"], "kind: must be a string"),
        (["--workdir", "run"], "--workdir: does not go with"),
        (["--predictions", "{said}", "--dataset", "{asked}", "--blind", "x"], "--blind"),
        (["--predictions", "{said}", "--dataset", "{asked}", "--out", "{said}"], "--out"),
    ],
)
def test_arguments_are_checked(arguments, complaint, predictions, scanqa, capsys):
    arguments = [a.format(said=predictions, asked=scanqa) for a in arguments]
    with pytest.raises(SystemExit):
        main(["evaluate", "text", *arguments])
    assert complaint in capsys.readouterr().err


def test_answers_to_other_questions_are_refused(tmp_path, scanqa):
    other = write_lines(tmp_path / "other.jsonl", [{"id": "a", "prediction": "x"}])
    with pytest.raises(UserError, match="no prediction for a question"):
        evaluate(other, dataset=scanqa)


def test_a_question_that_is_answered_under_both_of_its_ids_is_refused(tmp_path, scanqa):
    rows = [{"id": key, "prediction": "brown"} for key in ("val-0", "scanqa-val-0")]
    path = write_lines(tmp_path / "twice.jsonl", rows)
    with pytest.raises(UserError, match=r"twice.jsonl: question 'val-0' has two predictions"):
        evaluate(path, dataset=scanqa)
