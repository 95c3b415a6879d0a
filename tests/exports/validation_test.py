"""The check of a whole export and its summary."""

import json

from geode_jax import exports
from geode_jax.exports import SPECS, validate
from tests.helpers.contract import forge, forge_scene, listing, make_scene, question, refusal, write


def test_answers_are_of_questions_that_there_are(tmp_path):
    arrays = make_scene()
    arrays["teacher/answer_question"][-1] = 1
    folder = write(tmp_path / "e", arrays)
    rule = "question 1 does not exist, the scene has 1"
    assert refusal(exports.validate, folder).endswith(rule)
    dropped = exports.validate(folder, on_error="skip")["dropped"]
    assert dropped == [("scene a", "tensor teacher/answer_question", rule)]


def test_validate_summary(pristine, capsys):
    summary = validate(pristine, progress=True)
    assert "scenes" in capsys.readouterr().err
    assert (summary["scenes"], summary["splits"]) == (2, {"train": 1, "val": 1})
    assert summary["questions"] == {"space_size": 1}
    assert summary["dropped"] == [] and summary["dropped_questions"] == 0
    assert summary["bytes"] == sum(len(data) for data in listing(pristine).values())
    table = {row["name"]: row for row in summary["tensors"]}
    assert list(table) == list(SPECS)
    assert table["vggt/tokens"] == {
        "name": "vggt/tokens",
        "shape": ["2", "6", "6"],
        "dtype": "float16",
        "scenes": 2,
    }
    assert table["teacher/features"]["scenes"] == 1
    text = exports.format_summary(summary)
    assert "scenes: 2 (1 train, 1 val)" in text
    assert "[2, 6, 6]" in text and "space_size" in text


def test_validate_stops_or_skips_and_counts(export):
    arrays = make_scene()
    arrays["vggt/depth"][0, 0, 0] = -1
    forge_scene(export, arrays)
    records = [
        question(),
        question(id="b", scene_id="b", objects=None),
        question(id="c", answer=""),
    ]
    data = b"".join(json.dumps(record).encode() + b"\n" for record in records)
    forge(export, "questions.jsonl", data)
    assert refusal(validate, export).startswith("scene a: tensor vggt/depth: negative")
    summary = validate(export, on_error="skip")
    assert (summary["scenes"], summary["splits"]) == (1, {"val": 1})
    assert (summary["questions"], summary["dropped_questions"]) == ({"space_size": 1}, 2)
    assert [where for where, _, _ in summary["dropped"]] == ["scene a", "questions.jsonl:3"]
    records = [question(id=f"q{i}") for i in range(5)]
    data = b"".join(json.dumps(record).encode() + b"\n" for record in records)
    forge(export, "questions.jsonl", data)
    (export / "scenes" / "a.safetensors").unlink()  # its questions fail too, with the same line
    line = ("scene a", "tensor *", "scenes/a.safetensors is missing")
    assert validate(export, on_error="skip")["dropped"] == [line]
    text = exports.format_summary(summary)
    assert "dropped, with 2 questions:" in text
    assert "  scene a: tensor vggt/depth: negative depth at [0, 0, 0] (0 means missing)" in text
    assert "on_error" in refusal(validate, export, on_error="ignore")
