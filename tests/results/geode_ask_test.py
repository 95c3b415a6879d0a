"""GEODE runs are asked, scored and started from: tiny runs of three of its stages."""

import dataclasses
import hashlib
import itertools
import json
import re
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from geode_jax.data.control import BOX, REG
from geode_jax.data.tokens import load_tokenizer
from geode_jax.errors import UserError
from geode_jax.evaluate import vsi_bench
from geode_jax.exports import Export
from geode_jax.models.decoder import Decoder
from geode_jax.models.internvl import INTERNVL_TOKENS
from geode_jax.models.vit import InternViT
from geode_jax.objectives.geode import GeodeStage
from geode_jax.results import predict
from geode_jax.results.predict import Predictor
from geode_jax.results.vsi import evaluate_run
from geode_jax.runs import build
from geode_jax.runs.config import make_settings
from geode_jax.runs.trained import open_trained
from geode_jax.sources.rooms.export import make_rooms
from geode_jax.weights import save_pretrained
from tests.helpers.command import one_error
from tests.helpers.runs import tiny_geode_config
from tests.helpers.tiny_models import materialize

pytestmark = pytest.mark.slow  # three stages compile for minutes on a busy machine


@pytest.fixture(scope="module")
def joint(geode_runs) -> Predictor:
    return Predictor(geode_runs["joint"].workdir)


@pytest.fixture(scope="module")
def predictions(geode_runs) -> list[dict]:
    lines = (geode_runs["joint"].workdir / "predictions.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture
def answered_by(geode_runs, monkeypatch):
    """Makes every answer a control token, as a trained model's would be."""
    answer = GeodeStage.answer
    tokenizer = load_tokenizer(geode_runs["joint"].workdir / "tokenizer")

    def by(name: str) -> None:
        def forced(self, model, prefix, batch, eos_id, sampling=None):
            out = answer(self, model, prefix, batch, eos_id, sampling)
            tokens = jnp.full_like(out["tokens"], eos_id)
            return out | {"tokens": tokens.at[..., 0].set(tokenizer.id_of(name))}

        monkeypatch.setattr(GeodeStage, "answer", forced)

    return by


# --- Answers --------------------------------------------------------------------------------------


def test_answers_are_those_of_the_evaluation(joint, predictions):
    """The evaluation asked in batches of two scenes with four questions each."""
    assert {p["scene_id"] for p in predictions} == set(joint.export.scene_ids("test"))
    for expected in predictions[:: len(predictions) // 8]:
        answer = joint.answer(expected["scene_id"], expected["question"])
        assert answer.text == expected["prediction"]
        assert answer.kind == expected["kind"]
        if "predicted_value" in expected:
            np.testing.assert_allclose(answer.value, expected["predicted_value"], rtol=1e-4)
        if "predicted_box" in expected:
            np.testing.assert_allclose(answer.box, expected["predicted_box"], atol=2e-4)
        assert answer.thinking_tokens is None


def test_boxes_are_asked_where_something_can_say_them(joint, geode_runs):
    scene_id = joint.export.scene_ids("test")[0]
    assert "object_box" in {record["kind"] for record in joint.questions(scene_id)}
    stage_1 = Predictor(geode_runs["drm"].workdir)
    kinds = {record["kind"] for record in stage_1.questions(scene_id)}
    assert kinds and "object_box" not in kinds


@pytest.mark.parametrize(
    ("question", "kind", "unit"),
    [
        ("How many lamp(s) are in this room?", "object_counting", "items"),
        ("Is the lamp touching the chair?", "contact", None),
        ("Which lamp is nicest?", "", None),
    ],
)
def test_a_free_question_has_the_unit_of_its_kind(joint, question, kind, unit):
    record = joint.record(joint.export.scene_ids("train")[0], question)
    assert (record["kind"], record.get("unit")) == (kind, unit)


def test_every_unit_of_the_export_is_found_by_wording(joint):
    scene_id = joint.export.scene_ids("test")[0]
    stored = [q for i in joint.export.scene_ids("train") for q in joint.questions(i)]
    # In small letters a question is none of the scene's own, but has the wording of its kind.
    records = [joint.record(scene_id, q["question"].lower(), q.get("options")) for q in stored]
    found = {(record["kind"], record.get("unit")) for record in records}
    assert {
        ("object_abs_distance", "m"),
        ("object_size_estimation", "cm"),
        ("room_size_estimation", "m2"),
        ("object_box", None),
    } <= found


def ask(joint_run, *arguments, scene: int = 0) -> tuple:
    scene_id = Export(joint_run.export).scene_ids("test")[scene]
    return ("ask", "--workdir", joint_run.workdir, "--scene", scene_id, *arguments)


def test_a_control_token_is_printed_as_its_value(run, geode_runs, answered_by):
    own = [r for r in Export(geode_runs["joint"].export).questions() if r.get("unit") == "cm"]
    scene_id, question = own[0]["scene_id"], own[0]["question"]
    asked = ("ask", "--workdir", geode_runs["joint"].workdir, "--scene", scene_id)
    asked += ("--question", question)
    answered_by(REG)
    status, out, err = run(*asked)
    assert (status, err) == (0, "")
    assert re.fullmatch(r"\d+ cm\n", out)
    said = json.loads(run(*asked, "--json")[1])
    assert list(said) == ["scene_id", "question", "kind", "prediction", "predicted_value", "unit"]
    assert (said["scene_id"], said["question"], said["unit"]) == (scene_id, question, "cm")
    assert said["kind"] == "object_size_estimation"
    assert said["prediction"] == f"{said['predicted_value']:.0f}" == out.split()[0]
    # A question that nobody stored, of a kind without a unit.
    free = run(*asked[:-1], "Is the lamp near the lamp?")[1]
    assert re.fullmatch(r"\d+\.\d\n", free)

    answered_by(BOX)
    numbers = run(*asked)[1].split()
    assert len(numbers) == 7
    said = json.loads(run(*asked, "--json")[1])
    assert list(said) == ["scene_id", "question", "kind", "prediction", "predicted_box"]
    assert [f"{x:.2f}" for x in said["predicted_box"]] == numbers == said["prediction"].split()


def test_json_is_an_object_a_question(run, geode_runs, joint):
    status, out, err = run(*ask(geode_runs["joint"], "--json"))
    assert (status, err) == (0, "")
    rows = [json.loads(line) for line in out.splitlines()]
    records = joint.questions(rows[0]["scene_id"])
    assert [row["question"] for row in rows] == [record["question"] for record in records]
    assert [row["kind"] for row in rows] == [record["kind"] for record in records]
    assert all(isinstance(row["prediction"], str) and "thinking_tokens" not in row for row in rows)


def test_json_of_a_student_has_its_thinking_tokens(run, tiny_run):
    scene_id = Export(tiny_run.export).scene_ids("test")[0]
    asked = ("ask", "--workdir", tiny_run.workdir, "--scene", scene_id, "--question")
    asked += ("How many lamp(s) are in this room?",)
    said = json.loads(run(*asked, "--json")[1])
    assert list(said) == ["scene_id", "question", "kind", "prediction", "thinking_tokens"]
    assert said["prediction"] + "\n" == run(*asked)[1]
    assert len(said["thinking_tokens"]) == tiny_run.config.model.thinking_tokens
    assert "--json prints the thinking tokens" in one_error(run(*asked, "--json", "--diagnostic"))
    assert "not hidden_cot" in one_error(run(*asked, "--rationale"))


def test_thinking_tokens_are_the_students(run, geode_runs):
    line = one_error(run(*ask(geode_runs["joint"], "--diagnostic")))
    assert "--diagnostic: a geode_joint run has no thinking tokens" in line


# --- Rationales -----------------------------------------------------------------------------------


def test_the_rationale_is_what_stage_1_says_behind_the_same_tokens(geode_runs, monkeypatch):
    """Of the joint run's own parameters: here its decoder is put back to stage 1's."""
    stage_1 = Predictor(geode_runs["drm"].workdir)
    same = Predictor(geode_runs["drm"].workdir, rationale=True)
    before = open_trained(geode_runs["drm"].workdir)
    trained = open_trained(geode_runs["joint"].workdir, rationale=True)
    assert trained.objective.prefix_parts() == ("spatio",)
    assert trained.pipeline.config.answer_length == before.pipeline.config.answer_length
    merged = flat(before.state.frozen) | flat(before.state.params)
    parts = {name: replaced(getattr(trained.state, name), merged) for name in ("params", "frozen")}
    state = dataclasses.replace(trained.state, **parts)
    with monkeypatch.context() as patch:
        opened = dataclasses.replace(trained, state=state)
        patch.setattr(predict, "open_trained", lambda *_, **__: opened)
        joint = Predictor(geode_runs["joint"].workdir, rationale=True)
    assert joint.truth_field == stage_1.truth_field == "rationale"
    scene_id = stage_1.export.scene_ids("test")[0]
    record = stage_1.questions(scene_id)[0]
    said = stage_1.answer(scene_id, record["question"]).text
    assert same.answer(scene_id, record["question"]).text == said

    assert joint.answer(scene_id, record["question"]).text == said


def flat(state) -> dict:
    return dict(nnx.to_flat_state(state))


def replaced(state, by_path: dict):
    pairs = [(path, by_path[path]) for path, _ in nnx.to_flat_state(state)]
    return nnx.from_flat_state(pairs)


def test_rationales_are_printed_beside_the_true_ones(run, geode_runs):
    status, out, err = run(*ask(geode_runs["joint"], "--rationale"))
    assert (status, err) == (0, "")
    own = Predictor(geode_runs["joint"].workdir, rationale=True)
    scene_id = own.export.scene_ids("test")[0]
    true = [" ".join(record["rationale"].split()) for record in own.questions(scene_id)]
    assert [line.partition("    true: ")[2] for line in out.splitlines()[1::2]] == true


# --- VSI-Bench ------------------------------------------------------------------------------------


def test_a_run_is_predicted_and_scored_in_one_go(run, geode_runs, predictions, tmp_path):
    workdir = Path(shutil.copytree(geode_runs["joint"].workdir, tmp_path / "run"))
    status, out, _ = run("evaluate", "vsi", "--workdir", workdir)
    assert status == 0
    assert out.endswith(f"result: {workdir / 'vsi.json'}\n")
    result = json.loads((workdir / "vsi.json").read_text())
    assert list(result["scores"]) == ["model", "vision_removed", "frequency", "random"]
    manifest = geode_runs["joint"].export / "manifest.json"
    assert result["dataset"]["file"] == str(manifest)
    assert result["dataset"]["sha256"] == hashlib.sha256(manifest.read_bytes()).hexdigest()
    assert (result["decoding"], result["frames"]) == ("greedy", 4)

    file = workdir / "vsi_predictions.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    asked = [p for p in predictions if p["kind"] in vsi_bench.QUESTION_TYPES]
    assert len(rows) == result["questions"] == len(asked) > 10
    assert {row["id"]: row["prediction"] for row in rows} == {
        p["id"]: p["prediction"] for p in asked
    }
    again = vsi_bench.evaluate(file)
    assert list(result) == list(again)
    for column in ("model", "frequency", "random"):
        assert again["scores"][column] == result["scores"][column]
    assert again["predictions"] == result["predictions"]


def test_a_student_is_scored_on_another_export(run, tiny_run, tmp_path):
    make_rooms(tmp_path / "more", scenes=4, seed=3, test_scenes=1, workers=1, progress=False)
    out = tmp_path / "more.json"
    evaluate = ("evaluate", "vsi", "--workdir", tiny_run.workdir, "--out", out)
    assert run(*evaluate, "--export", tmp_path / "more")[0] == 0
    result = json.loads(out.read_text())
    scenes = Export(tmp_path / "more").scene_ids("test")
    asked = [
        record["id"]
        for record in Export(tmp_path / "more").questions()
        if record["scene_id"] in scenes and record["kind"] in vsi_bench.QUESTION_TYPES
    ]
    lines = (tmp_path / "more_predictions.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["id"] for line in lines) == sorted(asked)
    assert result["questions"] == len(asked)
    assert not (tiny_run.workdir / "vsi.json").exists()


def test_fewer_rationale_tokens_are_seen(geode_runs):
    workdir = geode_runs["joint"].workdir
    seen = {}
    for slots in (None, 4, 16):
        trained = open_trained(workdir, slots=slots)
        [(_, batch)] = itertools.islice(trained.pipeline.eval_batches(2), 1)
        out = trained.evaluator.answer_batch(trained.state, batch)
        seen[slots] = np.asarray(out["values"])
    np.testing.assert_array_equal(seen[16], seen[None])  # of 16
    assert (seen[4] != seen[16]).any()


def test_the_notes_name_the_tokens_and_the_checkpoint(geode_runs, tmp_path):
    result = evaluate_run(geode_runs["joint"].workdir, tmp_path / "4.json", spatio=4)
    notes = "\n".join(result["notes"])
    assert "rationale tokens: the first 4 of 16" in notes
    assert "step 3" in notes and "rooms are synthetic" in notes


def test_what_cannot_be_scored_is_one_line(run, geode_runs, tiny_run, tmp_path):
    joint = geode_runs["joint"].workdir
    evaluate = ("evaluate", "vsi", "--workdir")
    for arguments, complaint in [
        ((tiny_run.workdir, "--spatio", 4), "--spatio: .* not hidden_cot"),
        ((geode_runs["drm"].workdir,), "a geode_drm run writes rationales"),
        ((joint, "--dataset", "x"), "--dataset: does not go with --workdir"),
        ((joint, "--debiased-ids", "x"), "--debiased-ids: does not go with --workdir"),
        ((joint, "--out", joint / "config.json"), "is a file of a run"),
        ((joint, "--out", tmp_path / "no" / "x.json"), "--out: .*missing"),
        ((joint, "--export", tmp_path), "manifest.json"),
        ((joint, "--export", tiny_run.export), "images"),
        ((tmp_path,), "no run was started in this folder"),
    ]:
        assert re.search(complaint, one_error(run(*evaluate, *arguments)))
    of_file = ("evaluate", "vsi", "--predictions", tmp_path / "x")
    assert "--spatio: does not go with" in one_error(run(*of_file, "--spatio", 4))
    assert "--export: does not go with" in one_error(run(*of_file, "--export", tmp_path))
    status, _, err = run(*of_file, "--workdir", joint)
    assert status == 2 and "not allowed with" in err.splitlines()[-1]
    assert not (joint / "vsi.json").exists()


def test_what_a_model_has_not_is_refused(geode_runs, tmp_path):
    config = json.loads((geode_runs["joint"].workdir / "config.json").read_text())
    config["model"]["drm"]["on"] = False
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"--rationale: .*has no rationale module"):
        open_trained(tmp_path, rationale=True)
    with pytest.raises(UserError, match=r"--spatio: .*has no rationale module"):
        open_trained(tmp_path, slots=4)
    config["model"]["drm"].update(on=True, slots=8)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"--spatio 16: .* has 8 rationale tokens"):
        open_trained(tmp_path, slots=16)


def test_stage_1_is_measured_against_an_empty_and_a_shuffled_prefix(geode_runs):
    found = geode_runs["drm"].summary["val"]
    own, empty, shuffled = (
        found[f"val/text{suffix}"] for suffix in ("", "_prefix_empty", "_prefix_shuffled")
    )
    assert len({own, empty, shuffled}) == 3 and np.isfinite([own, empty, shuffled]).all()


# --- Starting from a run --------------------------------------------------------------------------


def test_a_stage_starts_from_the_one_before(geode_runs):
    """What the last stage leaves frozen is bitwise what stage 1 learned."""
    stage_1, joint = (open_trained(geode_runs[name].workdir).state for name in ("drm", "joint"))
    learned, kept = flat(stage_1.params), flat(joint.frozen)
    assert learned.keys() <= kept.keys()
    for path, variable in learned.items():
        np.testing.assert_array_equal(np.asarray(kept[path][...]), np.asarray(variable[...]))


@pytest.mark.parametrize(
    ("source", "changes", "said"),
    [
        ("drm", {"width": 48}, r"is \(.*\) there and \(.*\) here"),
        ("nothing", {}, "nothing/config.json: no run was started in this folder"),
        ("student", {}, "is a hidden_cot run, not a stage of GEODE"),
        ("pretrain", {}, "the rationale module has not learned in .*; start from a geode_drm"),
    ],
)
def test_what_a_stage_cannot_start_from_is_one_line(
    geode_runs, tiny_run, tmp_path, source, changes, said
):
    folders = {name: run.workdir for name, run in geode_runs.items()}
    folders["student"] = tiny_run.workdir
    start = folders.get(source, tmp_path / "nothing")
    config = tiny_geode_config("joint", geode_runs["joint"].export, start)
    with config.unlocked():
        config.model.drm.update(changes)
    with pytest.raises(UserError, match=said) as caught:
        build.build(make_settings(config), tmp_path / "run")
    assert "\n" not in str(caught.value)


def test_a_blind_model_starts_before_the_rationale_module(geode_runs, tmp_path):
    export, start = geode_runs["pretrain"].export, geode_runs["pretrain"].workdir
    settings = make_settings(tiny_geode_config("joint", export, start, "vision=off"))
    run = build.build(settings, tmp_path / "run")
    learned, found = flat(open_trained(start).state.params), flat(run.state.params)
    shared = [path for path in learned if path in found]
    assert shared and not any("drm" in path for path in shared)
    for path in shared:
        np.testing.assert_array_equal(found[path][...], learned[path][...])


def test_a_stage_starts_from_pretrained_folders(geode_runs, tmp_path):
    """A decoder and a vision encoder of Hugging Face, and their tokenizer."""
    export, before = geode_runs["pretrain"].export, geode_runs["pretrain"].workdir
    settings = make_settings(tiny_geode_config("pretrain", export))
    vlm = build.build(settings, tmp_path / "a").objective.internvl
    grown = load_tokenizer(before / "tokenizer").with_tokens(INTERNVL_TOKENS).vocab_size
    sizes = dataclasses.replace(vlm.decoder, vocab_size=grown)
    models = {
        "decoder": materialize(lambda rngs: Decoder(sizes, rngs=rngs)),
        "vision": materialize(lambda rngs: InternViT(vlm.vision, rngs=rngs)),
    }
    for name, model in models.items():
        save_pretrained(model, tmp_path / name)
    config = tiny_geode_config("align", export, f"{tmp_path / 'decoder'},{tmp_path / 'vision'}")
    with config.unlocked():
        config.tokenizer = str(before / "tokenizer")
    joint = tiny_geode_config("joint", export, config.init_from)
    with pytest.raises(UserError, match=r"the rationale module has not learned in .*decoder,"):
        build.build(make_settings(joint), tmp_path / "c")
    run = build.build(make_settings(config), tmp_path / "b")
    assert run.tokenizer.vocab_size == grown
    state = flat(run.state.frozen)
    for name, model in models.items():
        for path, variable in nnx.to_flat_state(nnx.state(model)):
            np.testing.assert_array_equal(state["vlm", name, *path][...], variable[...])
