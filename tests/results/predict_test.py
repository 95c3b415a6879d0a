import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from geode_jax.data.pipeline import Pipeline
from geode_jax.data.tokens import load_tokenizer
from geode_jax.errors import UserError
from geode_jax.exports import Export, units
from geode_jax.models.generate import Sampling
from geode_jax.results import predict
from geode_jax.results.predict import Answer, Predictor
from geode_jax.runs.config import make_settings
from geode_jax.runs.data import pipeline_config
from geode_jax.runs.trained import open_run_export, open_trained


@pytest.fixture(scope="module")
def predictor(tiny_run) -> Predictor:
    return Predictor(tiny_run.workdir)


@pytest.fixture
def copied_run(tiny_run, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_run.workdir, tmp_path / "run"))


def predictions(tiny_run) -> list[dict]:
    lines = (tiny_run.workdir / "predictions.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def contents(folder: Path) -> dict[str, tuple]:
    paths = sorted(folder.rglob("*"))
    return {str(p): (p.stat().st_mtime_ns, p.is_file() and p.read_bytes()) for p in paths}


def leaves_equal(a, b) -> bool:
    same = jax.tree.map(lambda x, y: np.array_equal(x, y), a, b)
    return len(jax.tree.leaves(same)) > 0 and all(jax.tree.leaves(same))


def test_answers_are_those_of_the_evaluation(predictor, tiny_run):
    """The evaluation asked in batches of two scenes with four questions each."""
    found = predictions(tiny_run)
    assert {p["scene_id"] for p in found} == set(predictor.export.scene_ids("test"))
    for expected in found[:: len(found) // 12]:
        answer = predictor.answer(expected["scene_id"], expected["question"])
        assert answer.text == expected["prediction"]
        assert list(answer.thinking_tokens) == expected["thinking_tokens"]
    assert len({p["prediction"] for p in found}) > 1  # else anything would pass


def test_a_single_question_is_batched_as_the_evaluation_batches_it(tiny_run):
    export, settings = Export(tiny_run.export), make_settings(tiny_run.config)
    tokenizer = load_tokenizer(tiny_run.workdir / "tokenizer")
    one = dataclasses.replace(
        pipeline_config(settings, export, tokenizer),
        scenes_per_batch=1,
        questions_per_scene=1,
        kind_weights={},
    )
    train, test = (Pipeline(export, tokenizer, one, split) for split in ("train", "test"))
    unasked = (
        "answer_",
        "packed_",
        "encoding_",
        "relations_",
        "objects_",
        "object_",
        "gaps_",
        "angle_",
        "value_",
        "base_unit_",
        "topk_",
    )
    compared = 0
    for [[record]], expected in test.eval_batches(1):
        # The pipeline of another split, and nothing of the record but what is asked.
        asked = {k: record[k] for k in ("scene_id", "kind", "question", "options") if k in record}
        batch = train.one_question(asked, train.one_scene(record["scene_id"]))
        for field in dataclasses.fields(batch):
            if not field.name.startswith((*unasked, "teacher_relations")):
                ours, theirs = getattr(batch, field.name), getattr(expected, field.name)
                np.testing.assert_array_equal(ours, theirs, field.name)
                assert ours.dtype == theirs.dtype
        assert batch.answer_SQA.shape == expected.answer_SQA.shape
        compared += 1
    assert compared >= 15


def test_a_question_longer_than_any_in_training_is_asked_whole(predictor):
    scene_id = predictor.export.scene_ids("test")[0]
    question = "Is the chair touching the lamp? " * 20
    pipeline = open_trained(predictor.workdir).pipeline
    scene = pipeline.one_scene(scene_id)
    batch = pipeline.one_question(predictor.record(scene_id, question), scene)
    usual = pipeline.config.question_length
    length = int(batch.question_length_SQ[0, 0])
    assert length > usual
    assert batch.question_SQL.shape[-1] in (2 * usual, 4 * usual)
    ids = batch.question_SQL[0, 0, -length:]
    assert load_tokenizer(predictor.workdir / "tokenizer").decode(ids) == question
    assert predictor.answer(scene_id, question).text


def test_a_scene_is_looked_at_once_for_all_its_questions(predictor, monkeypatch):
    read, one_scene = [], Pipeline.one_scene
    monkeypatch.setattr(Pipeline, "one_scene", lambda *a: read.append(a[1]) or one_scene(*a))
    first, second = predictor.export.scene_ids("train")[:2]
    asked = [q["question"] for q in predictor.questions(first)[:3]]
    said = [predictor.answer(first, question) for question in asked]
    assert read == [first]
    predictor.answer(second, "How many lamp(s) are in this room?")
    assert [predictor.answer(first, question) for question in asked] == said
    assert read == [first, second, first]


def test_words_can_be_drawn_and_matrices_rounded(predictor, tiny_run, monkeypatch):
    scene_id = predictor.export.scene_ids("test")[0]
    question = predictor.questions(scene_id)[0]["question"]
    greedy = predictor.answer(scene_id, question)
    only = Sampling(jax.random.key(0), top_k=1)
    assert predictor.answer(scene_id, question, sampling=only) == greedy
    hot = [
        predictor.answer(scene_id, question, sampling=Sampling(jax.random.key(i), 50.0)).text
        for i in range(2)
    ]
    assert hot[0] != hot[1]
    dtypes, with_decoding = set(), predict.with_decoding

    def recorded(model, *, int8):
        ready = with_decoding(model, int8=int8)
        dtypes.update(leaf.dtype for leaf in jax.tree.leaves(nnx.state(ready)))
        return ready

    monkeypatch.setattr(predict, "with_decoding", recorded)
    rounded = Predictor(tiny_run.workdir, int8=True)
    assert rounded.answer(scene_id, question).kind == greedy.kind
    assert np.dtype(np.int8) in dtypes


def test_stored_questions_are_recognised_however_they_are_broken_into_lines(predictor):
    seen = set()
    for scene_id in predictor.export.scene_ids():
        for own in predictor.questions(scene_id):
            typed = "  ".join(own["question"].split()) + " "
            record = predictor.record(scene_id, typed)
            assert record["question"] == own["question"]
            assert record["kind"] == own["kind"]
            assert record.get("options") == own.get("options")
            seen.add(own["kind"])
    assert {"object_counting", "object_rel_distance", "proximity"} <= seen


@pytest.mark.parametrize(
    ("question", "kind"),
    [
        ("How many piano(s) are in this room?", ""),
        ("How many lamp(s) are in this room?", "object_counting"),
        ("how many LAMP(s)  are in this room?", "object_counting"),
        ("Is the lamp touching the chair?", "contact"),
        ("Is the lamp near the chair?", ""),
    ],
)
def test_kind_is_told_by_the_wording(predictor, question, kind):
    # An empty scene of questions: none is recognised as the scene's own.
    scene_id = predictor.export.scene_ids("train")[0]
    assert predictor.record(scene_id, question)["kind"] == kind


def test_choices_need_options_unless_the_scene_has_them(predictor, monkeypatch):
    scene_id = predictor.export.scene_ids("test")[0]
    question = (
        "If I am standing by the lamp and facing the chair, is the sofa to the left or the right "
        "of the chair?"
    )
    easy = [
        (s, own)
        for s in predictor.export.scene_ids()
        for own in predictor.questions(s)
        if own["kind"] == "object_rel_direction_easy"
    ]
    assert easy and all(own["question"] != question for _, own in easy)
    with pytest.raises(UserError, match=r"--options") as caught:
        predictor.record(scene_id, question)
    assert "\n" not in str(caught.value)
    for options in (["left", "right"], ["A. left", "B. right"]):
        assert predictor.record(scene_id, question, options)["options"] == ["A. left", "B. right"]
    refused = {
        "at most 26, are 27": [f"thing {i}" for i in range(27)],
        "must be A, B, ...": ["A. x", "A. y"],
        "their letters": ["A. x", "chair"],
        "none may have one": ["B. x", "A. y"],
        "number 2 must not be empty": ["x", " "],
    }
    for complaint, options in refused.items():
        with pytest.raises(UserError, match=complaint):
            predictor.record(scene_id, question, options)
    scene_id, own = easy[0]
    assert predictor.record(scene_id, own["question"])["options"] == own["options"]
    others = predictor.record(scene_id, own["question"], ["up", "down"])["options"]
    assert others == ["A. up", "B. down"]
    # Options without letters are put as the model was trained on them.
    bare = {**own, "options": ["left", "right"]}
    monkeypatch.setattr(predictor, "questions", lambda _: [bare])
    for given in (None, bare["options"]):
        assert predictor.record(scene_id, own["question"], given)["options"] == bare["options"]


def test_unknown_words_are_named_once_in_order(predictor):
    text = "Does the giraffe see the chair, the quokka or the giraffe? 12 §"
    assert predictor.unknown_words(text) == ["Does", "giraffe", "see", "quokka", "§"]
    known = [q["question"] for q in predictor.questions(predictor.export.scene_ids("train")[0])]
    assert predictor.unknown_words(" ".join(known)) == []


def test_the_parameters_are_the_best_ones_and_the_run_is_left_alone(predictor, copied_run):
    unfinished = copied_run / "checkpoints" / "best" / "9.orbax-checkpoint-tmp"
    unfinished.mkdir()
    before = contents(copied_run)
    best = open_trained(predictor.workdir).state.params
    found = Predictor(copied_run)
    scene_id = found.export.scene_ids("test")[0]
    found.answer(scene_id, "How many lamp(s) are in this room?")
    assert contents(copied_run) == before
    assert found.step == 3
    assert leaves_equal(open_trained(copied_run).state.params, best)

    # The best one is taken although a later one is there, the latest where none is best.
    latest = copied_run / "checkpoints" / "latest"
    shutil.copytree(latest / "3", latest / "4")
    assert Predictor(copied_run).step == 3
    shutil.rmtree(copied_run / "checkpoints" / "best")
    with pytest.raises(UserError, match=r"latest/4: damaged: its position is of step 3"):
        Predictor(copied_run)
    shutil.rmtree(latest / "4")
    found = Predictor(copied_run)
    assert found.step == 3
    assert leaves_equal(open_trained(copied_run).state.params, best)


def test_a_run_without_checkpoint_or_export_says_so_in_one_line(copied_run, tmp_path):
    config = json.loads((copied_run / "config.json").read_text())
    config["data"]["export"] = str(tmp_path / "gone")
    (copied_run / "config.json").write_text(json.dumps(config))
    for call in (Predictor, open_run_export):
        with pytest.raises(UserError, match=r"gone: not here, and .*run was trained on it"):
            call(copied_run)
    shutil.rmtree(copied_run / "checkpoints")
    with pytest.raises(UserError, match=r"run: no checkpoint yet"):
        Predictor(copied_run)
    with pytest.raises(UserError, match=r"config\.json: no run was started"):
        Predictor(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


def test_a_checkpoint_of_another_model_is_refused(copied_run):
    config = json.loads((copied_run / "config.json").read_text())
    config["model"]["mlp_width"] = 48
    (copied_run / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"was made with another configuration than the one here"):
        Predictor(copied_run)


@pytest.mark.parametrize(
    ("value", "unit", "shown"),
    [
        (2.34, "m", "2.3 m"),
        (120.2, "cm", "120 cm"),
        (18.2, "m2", "18.2 m2"),
        (3.0, "items", "3 items"),
    ],
)
def test_a_value_is_shown_with_its_unit(value, unit, shown):
    assert Answer(units.write_number(value, unit), "x", value, unit).shown == shown
    # A text of more than the value, or with a unit that nobody knows, stays as it is.
    assert Answer(units.write_number(value, unit) + " or so", "x", value, unit).shown.endswith(
        "or so"
    )
    assert Answer(units.write_number(value, None), "x", value).shown == f"{value:.1f}"
    assert Answer("2", "x").shown == "2"
