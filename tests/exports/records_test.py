"""The manifest and the questions of an export: every field with its rule."""

import json

import pytest

from geode_jax.exports import Export, ExportWriter
from tests.helpers.contract import HEADER, forge, question, refusal, write


def test_missing_empty_and_unreadable_manifests(tmp_path):
    for folder, why in ((tmp_path / "nowhere", "no such folder"), (tmp_path, "not an export")):
        assert refusal(Export, folder).startswith(f"manifest.json: missing in {folder}: {why}")
    for text, rule in (("", "not JSON"), ("{", "not JSON"), ("[]", "must be a JSON object")):
        (tmp_path / "manifest.json").write_text(text)
        assert rule in refusal(Export, tmp_path)
    for text in ("[" * 100_000, '{"a": ' + "9" * 5000 + "}"):
        (tmp_path / "manifest.json").write_text(text)
        assert refusal(Export, tmp_path).startswith("manifest.json: not JSON")
    (tmp_path / "manifest.json").write_bytes(b"\xff\xfe")
    assert "not JSON" in refusal(Export, tmp_path)
    assert "Not a directory" in refusal(Export, tmp_path / "manifest.json")


SHA = "0" * 64
ENTRY = {"id": "a", "split": "val", "sha256": SHA}
ALIGNMENT = {"method": "cameras", "depth_target": "sensor", "views": 2, "kept": 2}
ALIGNMENT |= dict.fromkeys(("scale", "residual_m", "centres_m", "rotations_deg"), 0.5)


BAD_FIELDS = [
    ("schema_version", 2, "schema_version: must be 1, the version known here, is 2"),
    ("schema_version", "1", "schema_version: must be 1"),
    ("schema_version", True, "schema_version: must be 1"),
    ("dtype", "float64", "dtype: must be float16"),
    ("dtype", ["float16"], "dtype: must be float16"),
    ("scale", "feet", "scale: must be metric or scene"),
    ("token_width", 0, "token_width: must be a positive integer"),
    ("token_width", 6.0, "token_width: must be"),
    ("patch_grid", [2], "patch_grid: must be two positive integers"),
    ("patch_grid", [2, -3], "patch_grid: must be"),
    ("tokens_contain_depth", 1, "tokens_contain_depth: must be true or false"),
    ("categories", ["chair", "chair"], "categories: must be a list of different"),
    ("categories", "chair", "categories: must be a list"),
    ("notes", None, "notes: must be a string"),
    ("created", "", "created: must be"),
    ("producer", {"project": "p"}, "producer: commit must be a non-empty string"),
    ("producer", None, "producer: must be an object"),
    ("questions", {"count": -1, "sha256": SHA}, "questions: count must be"),
    ("questions", {"count": 1}, "questions: must have count and sha256"),
    ("scenes", [], "scenes: must be a non-empty list"),
    ("scenes", {}, "scenes: must be a non-empty list"),
    ("scenes", ["a"], "scenes[0].: must be a JSON object"),
    ("scenes", [{"id": "../a", "split": "val", "sha256": SHA}], "scenes[0].id: must be letters"),
    ("scenes", [{"id": "a", "split": "dev", "sha256": SHA}], "scenes[0].split: must be one of"),
    ("scenes", [{"id": "a", "split": "val", "sha256": "A" * 64}], "scenes[0].sha256: must be"),
    ("scenes", [{"id": "a", "split": "val"}], "scenes[0].sha256: missing"),
    ("scenes", [ENTRY | {"alignment": []}], "scenes[0].alignment: must be an object"),
    ("scenes", [ENTRY | {"alignment": {}}], "scenes[0].alignment: method is missing"),
    *(
        (
            "scenes",
            [ENTRY | {"alignment": ALIGNMENT | {field: value}}],
            f"scenes[0].alignment: '{field}': {value!r} is not allowed",
        )
        for field, value in (
            ("method", "guess"),
            ("depth_target", []),
            ("kept", -1),
            ("views", 2.0),
            ("residual_m", float("nan")),
            ("depth_relative", -0.1),
            ("colour", 1),
        )
    ),
    ("scenes", [{"id": "a", "split": "val", "sha256": SHA}] * 2, "scenes[1].id: duplicate scene a"),
    ("extra", 1, "'extra': unknown field"),
    ("categories", ["a" * 1001, "b"], "categories: must be a list of different non-empty strings"),
    ("producer", {"a." * 501: "b"}, "producer: a key has more than 1000 characters"),
]


@pytest.mark.parametrize(("field", "value", "rule"), BAD_FIELDS)
def test_bad_manifests(export, tmp_path, field, value, rule):
    manifest = json.loads((export / "manifest.json").read_text())
    (export / "manifest.json").write_text(json.dumps(manifest | {field: value}))
    assert refusal(Export, export).startswith(f"manifest.json: {rule}")
    if field in HEADER:
        line = refusal(ExportWriter, tmp_path / "new", **{**HEADER, field: value})
        assert line.startswith(f"manifest.json: {rule}")
        assert not (tmp_path / "new").exists()
    if field in manifest:
        (export / "manifest.json").write_text(
            json.dumps({k: v for k, v in manifest.items() if k != field})
        )
        assert refusal(Export, export) == f"manifest.json: {field}: missing"


BOX = [0, 0, 0, 1, 1, 1, 0]


CHOICE = {"kind": "object_rel_distance", "answer": "A", "value": None, "unit": None}


COUNT = {"kind": "object_counting", "answer": "3", "value": None, "unit": None}


BAD_QUESTIONS = [
    ({"scene_id": "c"}, "scene_id: unknown scene 'c'"),
    ({"scene_id": None}, "scene_id: missing"),
    ({"question": ""}, "question: must be a non-empty string"),
    ({"question": " \n"}, "question: must be a non-empty string"),
    ({"question": "\ud800"}, "question: must be a non-empty string"),
    ({"answer": ""}, "answer: must be a non-empty string"),
    ({"answer": 3}, "answer: must be a non-empty string"),
    ({"kind": ""}, "kind: must be"),
    ({"id": ""}, "id: must be"),
    ({"value": float("nan")}, "value: must be a finite number"),
    ({"value": float("-inf")}, "value: must be a finite number"),
    ({"value": 10**400}, "value: must be a finite number"),
    ({"value": True}, "value: must be a finite number"),
    ({"value": "3"}, "value: must be a finite number"),
    ({"kind": "object_counting", "value": None}, "value: missing, and the answer 'Yes.' is no"),
    ({"kind": "space_size", "value": None, "answer": "nan"}, "value: missing"),
    ({"options": "A. chair"}, "options: must be a list of strings"),
    ({"options": []}, "options: must be a list of strings"),
    ({"options": ["A. chair", 2]}, "options: must be a list of strings"),
    (CHOICE | {"value": 1.2}, "value: a choice among options has none"),
    (CHOICE | {"options": ["A. x", "A. y"]}, "options: two have the same letter"),
    (CHOICE | {"options": ["A. x", "y"]}, "options: some begin with a letter"),
    (CHOICE | {"answer": "C"}, "answer: C is the letter of none of the 2 options"),
    (CHOICE | {"answer": "(C) z"}, "answer: C is the letter of none"),
    (CHOICE | {"options": ["x", "y"], "answer": "C."}, "answer: C is the letter of none"),
    ({"answer": "3", "value": 5.0}, "value: differs from the number in the answer"),
    ({"answer": "300 cm", "value": 5.0}, "value: differs from the number in the answer"),
    (COUNT | {"value": 3.5}, "value: a count must be a whole number"),
    (COUNT | {"answer": "-2"}, "value: a count must be a whole number"),
    ({"answer": "1.9 feet", "value": 1.9, "unit": "m"}, "value: differs from the number in the"),
    ({"unit": "rad"}, "unit: a unit of angle, but the kind asks for one of length"),
    ({"unit": "m2"}, "unit: a unit of area, but the kind asks for one of length"),
    (COUNT | {"unit": "m"}, "unit: a unit of length, but the kind asks for one of count"),
    ({"answers": [""]}, "answers: must be a list of strings"),
    ({"box": BOX[:6]}, "box: must be 7 finite numbers"),
    ({"box": [0, 0, 0, 1, 0, 1, 0]}, "box: must be 7 finite numbers with positive sizes"),
    ({"relation": {}}, "relation: must be"),
    ({"relation": {"near": 1.0}}, "relation: unknown relation 'near'"),
    ({"relation": {"contact": 1.1}}, "relation: contact must be a probability"),
    ({"relation": {"contact": float("nan")}}, "relation: contact must be a probability"),
    ({"objects": []}, "objects: must be a non-empty list"),
    ({"objects": [{"name": "chair"}]}, "objects: [0] must have name, box"),
    ({"objects": [{"name": "chair", "box": BOX, "id": 3}]}, "objects: [0] must have name, box"),
    ({"objects": [{"name": "", "box": BOX}]}, "objects: [0] name"),
    ({"objects": [{"name": "chair", "box": [*BOX[:6], float("inf")]}]}, "objects: [0] box"),
    ({"objects": [{"name": "chair", "box": BOX, "index": -1}]}, "objects: [0] index"),
    ({"objects": [{"name": "chair", "box": BOX, "index": 3}]}, "objects: [0] index 3 is not a row"),
    ({"source": ""}, "source: must be a non-empty string"),
    *(
        ({name: "a." * 501}, f"{name}: must be a non-empty string of at most 1000 characters")
        for name in ("id", "kind", "source", "unit", "scene_id")
    ),
    ({"objects": [{"name": "a" * 1001, "box": BOX}]}, "objects: [0] name must be"),
    ({"colour": "red"}, "'colour': unknown field"),
]


@pytest.mark.parametrize(("changes", "rule"), BAD_QUESTIONS)
def test_bad_questions_are_refused_with_line_field_and_rule(export, tmp_path, changes, rule):
    good, bad = question(id="good"), question(**changes)
    data = b"".join(
        json.dumps(record).encode() + b"\n" for record in (good, bad, good | {"id": "z"})
    )
    forge(export, "questions.jsonl", data)
    on_reading = refusal(list, Export(export).questions())
    assert on_reading.startswith(f"questions.jsonl:2: {rule}")
    assert refusal(write, tmp_path / "new", questions=[good, bad]) == on_reading
    refusal(Export, tmp_path / "new")
    dropped = []
    assert [record["id"] for record in Export(export).questions(dropped)] == ["good", "z"]
    assert [str(error) for error in dropped] == [on_reading]


def test_more_bad_questions(export):
    twice = json.dumps(question()).encode() + b"\n"
    forge(export, "questions.jsonl", twice * 2)
    line = "questions.jsonl:2: id: duplicate question id 'q0'"
    assert refusal(list, Export(export).questions()) == line
    for text in (b"[]\n", b"\n", b"{\n", b"[" * 100_000 + b"\n", b"\xff\n"):
        forge(export, "questions.jsonl", text)
        assert refusal(list, Export(export).questions()).startswith("questions.jsonl:1: ")
    (export / "questions.jsonl").write_bytes(twice)
    line = "questions.jsonl: does not have the manifest's sha256"
    assert refusal(list, Export(export).questions()).startswith(line)
    forge(export, "questions.jsonl", twice[:-1])  # one line, where `forge` counts its end
    line = "questions.jsonl: count: 1 lines, the manifest has 0"
    assert refusal(list, Export(export).questions()) == line
    (export / "questions.jsonl").unlink()
    assert "cannot be read" in refusal(list, Export(export).questions())


def test_numbers_and_choices_that_agree_are_kept(tmp_path):
    feet = {"question": "How far, in feet?", "answer": "6.2", "value": 1.89, "unit": "m"}
    changes = [
        *(COUNT, COUNT | {"value": 3.0, "unit": "items"}, CHOICE, CHOICE | {"answer": "A. chair"}),
        *(CHOICE | {"options": ["x", "y"], "answer": "B"}, CHOICE | {"answer": "chair"}, feet),
        *({"answer": "1.4", "value": 1.4371}, {"answer": "2", "value": 1.6}),
        *(
            {"answer": "187.2 cm", "value": 1.8719},
            {"answer": "5'11\"", "value": 71.0, "unit": "in"},
        ),
        *({"answer": "about 1,500 m"}, {"unit": "furlongs"}),
        {"kind": "object_size_estimation", "answer": "190", "value": 1.9},
    ]
    records = [question(id=f"q{i}", **change) for i, change in enumerate(changes)]
    assert list(Export(write(tmp_path / "e", questions=records)).questions()) == records
