"""VSI-Bench's scores against a second writing of its rules and against the paper's own table."""

import hashlib
import json
import re
import string

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from geode_jax import row_files
from geode_jax.errors import UserError
from geode_jax.evaluate import vsi_bench
from geode_jax.evaluate.metrics import spatial
from geode_jax.exports.kinds import VSI_TASKS
from geode_jax.row_files import read_rows
from geode_jax.version import software

NUMBERS = (
    "object_counting",
    "object_abs_distance",
    "object_size_estimation",
    "room_size_estimation",
)
DIRECTIONS = tuple(f"object_rel_direction_{level}" for level in ("easy", "medium", "hard"))
CHOICES = (*DIRECTIONS, "object_rel_distance", "route_planning", "obj_appearance_order")
OPTIONS = ["A. chair", "B. table", "C. sofa", "D. stool"]


def row(kind, truth, prediction, **more):
    return {"question_type": kind, "ground_truth": truth, "prediction": prediction, **more}


# --- Averages and rules ---------------------------------------------------------------------------

# Table 1: counting, distance, size, room, relative distance, direction, route, order -> overall.
TABLE_1 = {
    "GEODE": ((61.9, 25.7, 35.9, 31.4, 35.6, 46.5, 25.3, 33.8), 37.0),
    "GPT-4o": ((46.2, 5.3, 43.8, 38.2, 37.0, 41.3, 31.5, 28.5), 34.0),
    "SFT only": ((61.7, 11.3, 35.8, 11.4, 26.5, 45.8, 29.4, 27.5), 31.2),
    # The paper prints 34.0 here, which is not the mean of its eight columns.
    "frequency": ((62.1, 32.0, 29.9, 33.1, 25.1, 47.9, 28.4, 25.2), 35.5),
}


@pytest.mark.parametrize("name", TABLE_1)
def test_overall_is_the_mean_of_the_papers_eight_columns(name):
    columns, overall = TABLE_1[name]
    tasks = dict(zip(VSI_TASKS, columns, strict=True))
    direction = tasks.pop("object_rel_direction")
    # Three different directions: their mean is the task, and they do not count three times.
    tasks |= dict(zip(DIRECTIONS, (direction - 20, direction + 15, direction + 5), strict=True))
    found = vsi_bench.averages(tasks)
    assert round(found["overall"], 1) == overall
    assert found["object_rel_direction"] == pytest.approx(direction)
    assert found["na"] == pytest.approx(sum(columns[:4]) / 4)
    assert found["mca"] == pytest.approx(sum(columns[4:]) / 4)
    assert (found["per_type"], found["missing"]) == (tasks, [])


@pytest.mark.parametrize(
    ("overall", "mca", "na"), [(28.9, 30.4, 27.4), (30.2, 31.1, 29.3), (33.0, 34.7, 31.3)]
)
def test_columns_of_table_3_add_up(overall, mca, na):
    found = vsi_bench.averages(dict.fromkeys(NUMBERS, na) | dict.fromkeys(CHOICES, mca))
    assert (found["mca"], found["na"]) == (pytest.approx(mca), pytest.approx(na))
    assert found["overall"] == pytest.approx(overall, abs=0.051)


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [("10.5", 100), ("11", 90), ("9", 90), ("15", 10), ("-10", 0), ("5.", 10), ("1,200", 0)],
)
@pytest.mark.parametrize("kind", NUMBERS)
def test_numbers_of_a_truth_of_ten(kind, prediction, expected):
    found = vsi_bench.score([row(kind, "10", prediction)])
    assert found[kind] == found["na"] == found["overall"] == pytest.approx(expected)


def test_white_space_around_a_truth_is_no_part_of_it():
    assert vsi_bench.score([row("object_counting", " 10 ", "10")])["overall"] == 100
    assert vsi_bench.score([row("object_counting", "10", " 10 ")])["overall"] == 0


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [("A", 100), ("a.", 100), ("A. chair", 100), ("A\nbecause", 0), ("B) chair", 0), ("", 0)],
)
@pytest.mark.parametrize("kind", CHOICES)
def test_letters(kind, prediction, expected):
    found = vsi_bench.score([row(kind, "A", prediction)])
    assert found["per_type"] == {kind: expected}
    assert found["mca"] == found["overall"] == expected


def test_a_type_counts_once_whatever_its_number_of_questions():
    rows = [row("object_counting", "4", "4")] * 9 + [row("route_planning", "A", "B")]
    found = vsi_bench.score(rows)
    assert (found["overall"], found["na"], found["mca"]) == (50, 100, 0)


def test_what_is_missing_is_named_and_has_no_score():
    found = vsi_bench.score([row(kind, "B", "B") for kind in CHOICES if not kind.endswith("hard")])
    assert found["missing"] == [*NUMBERS, "object_rel_direction_hard"]
    assert found["object_rel_direction"] == found["overall"] == found["mca"] == 100
    assert not {"na", *NUMBERS} & set(found)
    assert vsi_bench.score([]) == {"per_type": {}, "missing": list(vsi_bench.QUESTION_TYPES)}


def test_a_type_of_another_benchmark_is_refused():
    with pytest.raises(ValueError, match="'object_3d_box' is none of VSI-Bench"):
        vsi_bench.score([row("object_3d_box", "A", "A")])


# --- The same rules, written a second time --------------------------------------------------------


def reference_score(rows: list[dict]) -> dict[str, float]:
    """The official scorer from its description, for rows that have every type."""
    points = np.linspace(0.5, 0.95, int((0.95 - 0.5) / 0.05 + 2))
    sums, counts = {}, {}
    for one in rows:
        kind = one["question_type"]
        word = re.sub(r"\.+\Z", "", re.match(r"[^ ]*", one["prediction"]).group()).strip()
        if kind in CHOICES:
            value = 1.0 if word.lower() == one["ground_truth"].lower() else 0.0
        else:
            try:
                said, truth = float(word), float(one["ground_truth"])
                value = sum(abs(said - truth) / truth <= 1 - point for point in points) / 10
            except ValueError:
                value = 0.0
        sums[kind] = sums.get(kind, 0.0) + value
        counts[kind] = counts.get(kind, 0) + 1
    means = {kind: 100 * sums[kind] / counts[kind] for kind in sums}
    direction = sum(means.pop(kind) for kind in DIRECTIONS) / 3
    means["object_rel_direction"] = direction
    return means | {"overall": sum(means.values()) / 8}


ODD = ["A\nbecause", "B) chair", "1,200", "", "nan", "inf", "-inf", "5.", "-3", " A", "a.", "A..."]
ODD += ["1e3", "1_0", "4\tchairs", "٤", "4\u00a0m", ". .", "B.\n", "0", "1e999"]
LETTERS = st.sampled_from("ABCDabcd")
TRUTHS = st.floats(1e-3, 1e5).map(str) | st.integers(1, 500).map(str) | st.just(" 2.50 ")
PREDICTIONS = st.one_of(
    st.sampled_from(ODD),
    st.text(max_size=8),
    st.text("ABCD .)\n", max_size=6),
    st.text(string.digits + "., -e\n", max_size=6),
    st.integers(-20, 500).map(str),
)


SHARES = st.sampled_from(np.linspace(0.4, 1.6, 25))


def number_row(kind, truth, said):
    """`said` is a text, or a share of the truth: most random numbers are far from any."""
    return row(kind, truth, said if isinstance(said, str) else str(said * float(truth)))


NUMBER_ROWS = [st.builds(number_row, st.just(k), TRUTHS, PREDICTIONS | SHARES) for k in NUMBERS]
CHOICE_ROWS = [st.builds(row, st.just(k), LETTERS, PREDICTIONS | LETTERS) for k in CHOICES]


@given(st.tuples(*NUMBER_ROWS, *CHOICE_ROWS), st.lists(st.one_of(*NUMBER_ROWS, *CHOICE_ROWS)))
def test_scores_are_those_of_the_official_rules(one_of_each, more):
    rows = [*one_of_each, *more]
    found, expected = vsi_bench.score(rows), reference_score(rows)
    assert found["missing"] == []
    assert {key: found[key] for key in expected} == pytest.approx(expected)


# --- Prompts and baselines ------------------------------------------------------------------------


def snapshot(data_root, name):
    file = data_root / "vsibench_prompt_snapshots" / f"vsibench__{name}.json"
    return json.loads(file.read_text())["prompt_text"]


@pytest.mark.parametrize("kind", NUMBERS)
def test_the_prompt_of_a_number_is_the_official_one(kind, data_root):
    asked = {"question": "How many chairs are visible in this room?", "options": None}
    assert vsi_bench.prompt({"question_type": kind, **asked}) == snapshot(data_root, "na")


@pytest.mark.parametrize("kind", CHOICES)
def test_the_prompt_of_a_choice_is_the_official_one(kind, data_root):
    asked = {
        "question": "Which direction is the sofa relative to the dining table?",
        "options": ["To the left", "To the right", "In front", "Behind"],
    }
    assert vsi_bench.prompt({"question_type": kind, **asked}) == snapshot(data_root, "mca")


def test_frequency_answers_each_type_with_its_most_common_truth():
    truths = {"route_planning": "ABBC", "object_counting": ["10", "10", "11", "20"]}
    rows = [row(kind, t, "") for kind, own in truths.items() for t in own]
    found = vsi_bench.frequency_score(rows)["per_type"]
    # 10 against 10, 10, 11 and 20: 1, 1, 0.9 (10 / 11 is 9 % off) and 0.1 (half).
    assert found == {"route_planning": 50, "object_counting": pytest.approx(75)}


def test_white_space_around_a_truth_plays_no_part():
    rows = [row("object_counting", " 10 ", "10")]
    assert vsi_bench.score(rows)["overall"] == vsi_bench.frequency_score(rows)["overall"] == 100


def test_random_picks_one_of_the_options():
    rows = [
        row("route_planning", "A", "", options=OPTIONS),
        row("route_planning", "A", "", options=OPTIONS[:2]),
        row("obj_appearance_order", "A", "", options=OPTIONS),
        row("object_rel_distance", "A", "", options=None),
        row("object_counting", "4", "", options=None),
    ]
    found = vsi_bench.random_score(rows)
    assert found["per_type"] == {"route_planning": 37.5, "obj_appearance_order": 25}
    assert found["mca"] == 31.25
    assert {"object_counting", "object_rel_distance"} <= set(found["missing"])


# --- Files ----------------------------------------------------------------------------------------

QUESTIONS = [
    {"id": 0, "question_type": "object_counting", "ground_truth": "4", "options": None},
    {"id": 1, "question_type": "object_counting", "ground_truth": "4", "options": None},
    {"id": 2, "question_type": "route_planning", "ground_truth": "B", "options": OPTIONS},
]
ANSWERS = [{"id": i, "prediction": text} for i, text in ((2, "B."), (0, "4"), (1, "two"))]


def write_lines(path, rows):
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return path


@pytest.fixture
def files(tmp_path):
    """(dataset, predictions), both good."""
    return (
        write_lines(tmp_path / "test.jsonl", QUESTIONS),
        write_lines(tmp_path / "answers.jsonl", ANSWERS),
    )


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_predictions_are_joined_by_id(files):
    dataset, predictions = files
    found = vsi_bench.evaluate(predictions, dataset=dataset, frames=32, revision="r1")
    model = found["scores"]["model"]
    assert model["per_type"] == {"object_counting": 50, "route_planning": 100}
    assert list(found["scores"]) == ["model", "frequency", "random"]
    assert found["scores"]["frequency"]["overall"] == 100
    assert found["scores"]["random"]["overall"] == 25
    assert found["dataset"] == {
        "file": str(dataset),
        "sha256": sha256(dataset),
        "revision": "r1",
    }
    assert found["predictions"] == {
        "model": {"file": str(predictions), "sha256": sha256(predictions)}
    }
    assert (found["frames"], found["decoding"], found["debiased_ids"]) == (32, None, None)
    assert found["evaluator"] == software()
    assert found["questions"] == 3
    assert found["notes"][0].startswith("the means are over 2 of the 8 tasks: there are no ")
    assert "room_size_estimation" in found["notes"][0]


def test_the_whole_benchmark_needs_no_note_about_its_means(tmp_path):
    rows = [{"id": i, **row(kind, "4", "4")} for i, kind in enumerate(NUMBERS)]
    rows += [{"id": f"c{i}", **row(kind, "A", "A")} for i, kind in enumerate(CHOICES)]
    found = vsi_bench.evaluate(write_lines(tmp_path / "rows.jsonl", rows))
    assert found["scores"]["model"]["overall"] == 100
    assert [note.partition(":")[0] for note in found["notes"]] == ["frequency", "random"]


def test_rows_that_carry_their_truth_are_their_own_dataset(files, tmp_path):
    rows = [{**QUESTIONS[2], "prediction": "C"}, {**QUESTIONS[0], "prediction": "4"}]
    path = write_lines(tmp_path / "rows.jsonl", rows)
    found = vsi_bench.evaluate(path)
    assert found["scores"]["model"]["overall"] == 50
    assert found["dataset"]["sha256"] == found["predictions"]["model"]["sha256"] == sha256(path)


def test_a_parquet_dataset_scores_as_its_lines(files):
    dataset, predictions = files
    parquet = dataset.with_suffix(".parquet")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(QUESTIONS), parquet)
    found = vsi_bench.evaluate(predictions, dataset=parquet)
    assert found["scores"] == vsi_bench.evaluate(predictions, dataset=dataset)["scores"]
    assert found["dataset"]["sha256"] == sha256(parquet)


def test_debiased_ids_choose_the_questions_of_every_column(files, tmp_path):
    dataset, predictions = files
    ids = tmp_path / "ids.txt"
    ids.write_bytes(b"\xef\xbb\xbf1\r\n\n 2 \n")
    found = vsi_bench.evaluate(predictions, dataset=dataset, debiased_ids=ids)
    assert found["questions"] == 2
    assert found["scores"]["model"]["object_counting"] == 0
    assert found["debiased_ids"] == {"file": str(ids), "sha256": sha256(ids)}
    # Answers outside the choice need not be there, and are not unknown if they are.
    assert not any("predictions belong to no question" in note for note in found["notes"])
    write_lines(predictions, ANSWERS[::2])
    again = vsi_bench.evaluate(predictions, dataset=dataset, debiased_ids=ids)
    assert again["scores"] == found["scores"]
    # Whole numbers of JSON are ids too; what is no id is a note where that is allowed.
    ids.write_text("[1, 2, 77]")
    found = vsi_bench.evaluate(predictions, dataset=dataset, debiased_ids=ids, allow_missing=True)
    assert found["scores"] == again["scores"]
    assert f"{ids}: 1 entries are no id of {dataset}" in found["notes"]
    ids.write_text("77, 78")
    with pytest.raises(UserError, match=r"line 1: '77' is no id of .*, nor are 1 more"):
        vsi_bench.evaluate(predictions, dataset=dataset, debiased_ids=ids, allow_missing=True)


def test_blind_stands_beside_and_answers_to_other_questions_are_counted(files, tmp_path):
    dataset, predictions = files
    more = [{"id": str(i), "prediction": "A"} for i in range(5)]
    blind = write_lines(tmp_path / "blind.jsonl", more)
    found = vsi_bench.evaluate(predictions, dataset=dataset, blind=blind)
    assert list(found["scores"]) == ["model", "blind", "frequency", "random"]
    assert found["scores"]["blind"]["overall"] == 0
    assert found["predictions"]["blind"] == {"file": str(blind), "sha256": sha256(blind)}
    assert f"{blind}: 2 predictions belong to no question of {dataset}" in found["notes"]


def change(index, **fields):
    return [*QUESTIONS[:index], QUESTIONS[index] | fields, *QUESTIONS[index + 1 :]]


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        (change(1, question_type="object_3d_box"), "2: question_type: must be one of object_c"),
        (change(1, question_type=["object_counting"]), "2: question_type: must be one of"),
        (change(0, ground_truth=4), "1: ground_truth: must be a positive number as a string, is 4"),
        (change(0, ground_truth="four"), "1: ground_truth: must be a positive number"),
        (change(0, ground_truth="0"), "1: ground_truth: must be a positive number"),
        (change(0, ground_truth="nan"), "1: ground_truth: must be a positive number"),
        (change(0, ground_truth="inf"), "1: ground_truth: must be a positive number"),
        (change(2, ground_truth="E"), "3: ground_truth: must be a letter from A to D, is 'E'"),
        (change(2, ground_truth="AB"), "3: ground_truth: must be a letter from A to D"),
        (change(2, ground_truth=""), "3: ground_truth: must be a letter from A to D"),
        (change(2, ground_truth=None, options=None), "3: ground_truth: must be a letter from A to"),
        (change(2, options="ABCD"), "3: options: must be a list of strings, is 'ABCD'"),
        (change(2, options=[]), "3: options: must be a list of strings"),
        (change(2, options=["A", 2]), "3: options: must be a list of strings"),
        (change(2, id=None), "3: id: must be a whole number or a string, is None"),
        (change(2, id=True), "3: id: must be a whole number or a string, is True"),
        (change(2, id=2.0), "3: id: must be a whole number or a string, is 2.0"),
        (change(2, id="0"), "3: id: duplicate '0'"),
        (change(2, id=0), "3: id: duplicate 0"),
        ([*QUESTIONS, {}], "4: id: must be a whole number or a string, is missing"),
        ([*QUESTIONS, {"id": 3}], "4: question_type: must be one of .*, is missing"),
        ([*QUESTIONS, [3]], "4: must be a JSON object"),
        ([], " has no rows"),
    ],
)
def test_a_bad_question_is_named_with_its_line(files, rows, complaint):
    dataset, predictions = files
    write_lines(dataset, rows)
    with pytest.raises(UserError, match=f"^{re.escape(str(dataset))}:{complaint}"):
        vsi_bench.evaluate(predictions, dataset=dataset)


@pytest.mark.parametrize("option", ["predictions", "blind"])
@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        (ANSWERS[:2], " no prediction for 1 of 3 questions of .*test.jsonl, the first is id '1'"),
        ([*ANSWERS, {"id": "2", "prediction": "B"}], "4: id: duplicate '2'"),
        ([{"prediction": "B"}, *ANSWERS], "1: id: must be .*, is missing"),
        ([*ANSWERS, {"id": 3}], "4: prediction: must be a string, is missing"),
        ([*ANSWERS, {"id": 3, "prediction": 4}], "4: prediction: must be a string, is 4"),
        ([*ANSWERS, {"id": 3, "prediction": None}], "4: prediction: must be a string, is None"),
    ],
)
def test_a_bad_prediction_is_named_with_its_line(files, tmp_path, option, rows, complaint):
    dataset, predictions = files
    bad = write_lines(tmp_path / "bad.jsonl", rows)
    paths = {"predictions": predictions, "dataset": dataset, option: bad}
    with pytest.raises(UserError, match=f"^{re.escape(str(bad))}:{complaint}"):
        vsi_bench.evaluate(paths.pop("predictions"), **paths)


@pytest.mark.parametrize(
    "line", [b'{"id": 3, "predic', b"B", b'{"id": 3, "prediction": "\xff"}', b"[" * 100_000]
)
def test_a_broken_line_is_named(files, line):
    dataset, predictions = files
    predictions.write_bytes(predictions.read_bytes() + b"\n" + line + b"\n")
    with pytest.raises(UserError, match=f"^{re.escape(str(predictions))}:5: not JSON: "):
        vsi_bench.evaluate(predictions, dataset=dataset)


def test_predictions_alone_ask_for_the_dataset(files):
    _, predictions = files
    with pytest.raises(
        UserError, match=r"answers.jsonl:1: ground_truth: is missing; give the file"
    ):
        vsi_bench.evaluate(predictions)


@pytest.mark.parametrize("shared", [True, False])
def test_a_parquet_file_that_unpacks_to_much_is_refused(files, monkeypatch, shared):
    """1 MB in every row: said once for all (a dictionary), or compressed."""
    dataset, _ = files
    monkeypatch.setattr(row_files, "MAX_UNPACKED_BYTES", 1 << 23)
    rows = [QUESTIONS[0] | {"id": i, "more": "a" * 10**6} for i in range(20)]
    table = pyarrow.Table.from_pylist(rows)
    parquet = dataset.with_suffix(".parquet")
    pyarrow.parquet.write_table(table, parquet, use_dictionary=shared, compression="zstd")
    assert parquet.stat().st_size < 10**5
    with pytest.raises(UserError, match=r"test.parquet: unpacks to more than 8,388,608 bytes"):
        read_rows(parquet)
    monkeypatch.undo()
    assert len(read_rows(parquet).rows) == 20


def test_a_bad_parquet_file_is_refused(files):
    dataset, predictions = files
    parquet = dataset.with_suffix(".parquet")
    parquet.write_bytes(dataset.read_bytes())
    with pytest.raises(UserError, match=r"test.parquet: not parquet: "):
        vsi_bench.evaluate(predictions, dataset=parquet)
    rows = change(1, question_type="object_3d_box")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), parquet)
    with pytest.raises(UserError, match=r"test.parquet: row 1: question_type: must be one of"):
        vsi_bench.evaluate(predictions, dataset=parquet)
    table = pyarrow.table({"id": pyarrow.array([b"\xf4"], pyarrow.binary()).view(pyarrow.string())})
    pyarrow.parquet.write_table(table, parquet)
    with pytest.raises(UserError, match=r"test.parquet: not parquet: 'utf-8' codec"):
        vsi_bench.evaluate(predictions, dataset=parquet)


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("ids.txt", "0\n7\n", ": line 2: '7' is no id of .*test.jsonl"),
        ("ids.txt", "\n", ": has no entry"),
        ("pruned_ids.txt", "0\n", ": lists the questions that VSI-Bench-Debiased removes"),
    ],
)
def test_bad_ids_are_refused(files, tmp_path, name, text, complaint):
    dataset, predictions = files
    ids = tmp_path / name
    ids.write_text(text)
    with pytest.raises(UserError, match=f"^{re.escape(str(ids))}{complaint}"):
        vsi_bench.evaluate(predictions, dataset=dataset, debiased_ids=ids)


def test_table(files):
    dataset, predictions = files
    scores = vsi_bench.evaluate(predictions, dataset=dataset)["scores"]
    scores["blind"] = vsi_bench.averages({DIRECTIONS[0]: 12.34, DIRECTIONS[2]: 50.0})
    text = vsi_bench.table(scores)
    lines = {line[:28].strip(): line[28:].split() for line in text.splitlines()}
    assert lines[""] == ["model", "frequency", "random", "blind"]
    assert lines["overall"] == ["75.0", "100.0", "25.0", "31.2"]
    assert lines["object counting (MRA)"] == ["50.0", "100.0", "-", "-"]
    assert lines["choice tasks (MCA)"] == ["100.0", "100.0", "25.0", "31.2"]
    assert lines["relative direction, easy"] == ["-", "-", "-", "12.3"]
    assert lines["relative direction, medium"] == lines["room size (MRA)"] == ["-"] * 4
    assert len({len(line) for line in text.splitlines()}) == 1


@pytest.mark.parametrize(
    ("kind", "prediction", "question"),
    [
        ("object_size_estimation", "1900", {"answer": "1,900 mm", "value": 1900, "unit": "mm"}),
        ("object_size_estimation", "300", {"answer": "3 m", "value": 300.0, "unit": "cm"}),
        ("object_size_estimation", "71", {"answer": "5'11\"", "value": 71, "unit": "in"}),
        ("object_abs_distance", "2.0", {"answer": "about 2 m", "value": 2.0}),
        ("object_abs_distance", "2.0", {"answer": "2.0", "value": 2.04}),
        ("object_rel_distance", "A", {"answer": "A. chair", "options": ["A. chair", "B. bed"]}),
        ("route_planning", "B", {"answer": "(B) left", "options": ["(A) right", "(B) left"]}),
    ],
)
def test_a_question_of_an_export_has_the_score_of_the_spatial_metrics(kind, prediction, question):
    record = {"id": "q", "kind": kind, "question": "?", "prediction": prediction, **question}
    assert vsi_bench.score(vsi_bench.rows_of([record]))["overall"] == 100
    assert spatial.question_score(record) == 1
