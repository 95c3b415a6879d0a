"""Trained runs as Hugging Face folders: asked without JAX, imported again, described."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from geode_jax.cli.command import main
from geode_jax.errors import UserError
from geode_jax.exports.prompts import prompt
from geode_jax.models.packed import pick
from geode_jax.results.publish import export_run
from geode_jax.runs.trained import Trained, open_trained
from geode_jax.shapes import Batch
from geode_jax.weights import load_pretrained
from tests.helpers.weights import close

WITHOUT_JAX = Path(__file__).parent / "without_jax.py"
QUESTIONS = 50
STUDENT_ARRAYS = {
    "vision_tokens": "vision_SVPC",
    "view_mask": "view_mask_SV",
    "depth_hint": "depth_hint_SVP",
    "camera_tokens": "camera_SVC",
    "camera_mask": "camera_mask_S",
}
GEODE_ARRAYS = {
    "images": "image_SVhw3",
    "view_mask": "view_mask_SV",
    "places": "points_SVP3",
    "places_mask": "points_mask_SVP",
    "points": "point_SJC",
    "coords": "coord_SJ3",
    "point_mask": "point_mask_SJ",
    "extrinsic": "extrinsic_SV34",
}

pytestmark = pytest.mark.slow  # runs are trained and asked, which compiles for a minute


def export(workdir: Path, out: Path, *more: str) -> None:
    main(["convert", "export", "--workdir", str(workdir), "--out", str(out), *more])


def model_of(trained: Trained) -> nnx.Module:
    model = nnx.merge(trained.graph, trained.state.params, trained.state.frozen)
    return model.student if hasattr(model, "student") else model


@jax.jit
def student_logits(model, batch):
    return model.decoder.logits(model.read(model.encode_scene(batch), batch)[0])


def geode_logits(parts):
    @jax.jit
    def logits(model, batch):
        states = model.read(batch, model.prefix(batch, parts))
        return model.vlm.decoder.logits(pick(states, batch.answer_column_SQA))

    return logits


def ask_without_jax(jobs: list[tuple[Path, Path, Path]], home: Path) -> None:
    """Runs `without_jax.py`; nothing of this project is on its path."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    subprocess.run(
        [sys.executable, WITHOUT_JAX, *(path for job in jobs for path in job)],
        cwd=home,
        env=environment | {"HF_HOME": str(home / "huggingface"), "HF_HUB_OFFLINE": "1"},
        check=True,
        timeout=600,
    )


def write_questions(path: Path, records: list[list[dict]], batch: Batch, arrays: dict) -> None:
    """A batch's scenes and questions, for `without_jax.py`."""
    Q = batch.answer_SQA.shape[1]

    def rows(of, missing):
        return json.dumps([[*map(of, own), *[missing] * (Q - len(own))] for own in records])

    np.savez(
        path,
        prompts=rows(prompt, ""),
        units=rows(lambda record: record.get("unit"), None),
        answers=batch.answer_SQA[..., :-1].astype(np.int64),
        **{f"scene/{name}": getattr(batch, field) for name, field in arrays.items()},
    )


def compare(trained: Trained, folder: Path, home: Path, arrays: dict, logits) -> int:
    """Asks both the same questions; returns how many."""
    expected, jobs, asked = [], [], 0
    with jax.set_mesh(trained.mesh):
        for i, (records, batch) in enumerate(trained.pipeline.eval_batches()):
            answers = jax.device_get(trained.evaluator.answer_batch(trained.state, batch))
            expected.append((records, batch, answers, logits(model_of(trained), batch)))
            job = (folder, home / f"{i}.npz", home / f"{i}_said.npz")
            write_questions(job[1], records, batch, arrays)
            jobs.append(job)
            asked += sum(map(len, records))
            if asked >= QUESTIONS:
                break
    ask_without_jax(jobs, home)
    for (records, batch, answers, own), job in zip(expected, jobs, strict=True):
        with np.load(job[2]) as file:
            said = dict(file)
        A = batch.answer_SQA.shape[-1]
        paid = np.arange(A) < batch.answer_length_SQ[..., None]
        close(said["logits"][paid], np.asarray(own)[paid], 1e-4)
        texts = json.loads(str(said["texts"]))
        for row, of_row in enumerate(records):
            for column, record in enumerate(of_row):
                place, length = (row, column), said["tokens"].shape[-1]
                np.testing.assert_array_equal(
                    said["tokens"][place], answers["tokens"][place][:length]
                )
                text = trained.objective.decode_answer(answers, place, record, trained.tokenizer)
                assert texts[row][column] == text["prediction"]
                if "values" in said:
                    codes = np.clip(answers["values"][place][:length], np.log(0.01), 11)
                    np.testing.assert_allclose(said["values"][place], np.exp(codes), rtol=1e-4)
                    boxes = answers["boxes"][place][:length]
                    np.testing.assert_allclose(said["boxes"][place], boxes, rtol=1e-4, atol=1e-4)
    return asked


def same_parameters(trained: Trained, folder: Path) -> None:
    again = load_pretrained(folder)
    mine, theirs = (nnx.to_flat_state(nnx.state(m)) for m in (model_of(trained), again))
    for (path, a), (other, b) in zip(mine, theirs, strict=True):
        assert path == other
        assert np.asarray(a[...]).tobytes() == np.asarray(b[...]).tobytes(), path


def test_a_student_answers_without_jax_and_comes_back(torch, tiny_run, tmp_path, capfd):
    out, middle = tmp_path / "student", tmp_path / "middle"
    export(tiny_run.workdir, out)
    assert f"{out}: Student, " in capfd.readouterr().out
    trained = open_trained(tiny_run.workdir)
    assert compare(trained, out, tmp_path, STUDENT_ARRAYS, student_logits) >= QUESTIONS
    main(["convert", "import", "--source", str(out), "--out", str(middle)])
    same_parameters(trained, middle)

    card = (out / "README.md").read_text()
    accuracy = tiny_run.summary["scores"]["frequency"]
    assert "license: apache-2.0" in card and "inherits no terms" in card
    assert "geode_jax rooms" in card and accuracy and "frequency" in card
    assert "no number here compares" in card
    # The words that the model was trained on, not the bare question.
    assert "video.\\nHow many chair(s) are in this room?\\nPlease answer" in card
    ids = json.loads((out / "generation_config.json").read_text())
    assert ids["eos_token_id"] == trained.tokenizer.eos_id and not ids["do_sample"]
    with pytest.raises(UserError, match="not empty"):
        export_run(tiny_run.workdir, out)
    with pytest.raises(UserError, match="the student's decoder attends"):
        export_run(tiny_run.workdir, tmp_path / "new", "decoder")


def test_a_geode_answers_without_jax_and_comes_back(torch, geode_runs, tmp_path):
    workdir, out, middle = geode_runs["joint"].workdir, tmp_path / "geode", tmp_path / "middle"
    export(workdir, out)
    trained = open_trained(workdir)
    logits = geode_logits(trained.objective.prefix_parts())
    assert compare(trained, out, tmp_path, GEODE_ARRAYS, logits) >= QUESTIONS
    main(["convert", "import", "--source", str(out), "--out", str(middle)])
    same_parameters(trained, middle)
    assert "blind" in (out / "README.md").read_text() or "vision" in (out / "README.md").read_text()


def test_geodes_decoder_is_a_qwen2_of_transformers(torch, geode_runs, tmp_path):
    export(geode_runs["joint"].workdir, tmp_path / "decoder", "--part", "decoder")
    decoder = model_of(open_trained(geode_runs["joint"].workdir)).vlm.decoder
    vocabulary = decoder.config.vocab_size
    tokens = np.random.default_rng(0).integers(0, vocabulary, (2, 12))
    np.savez(tmp_path / "asked.npz", tokens=tokens)
    ask_without_jax(
        [(tmp_path / "decoder", tmp_path / "asked.npz", tmp_path / "said.npz")], tmp_path
    )
    close(np.load(tmp_path / "said.npz")["logits"], jax.jit(lambda m, x: m(x))(decoder, tokens))


def test_runs_that_cannot_run_alone_are_refused(geode_runs, tmp_path):
    with pytest.raises(UserError, match="geode_pretrain reads true boxes"):
        export_run(geode_runs["pretrain"].workdir, tmp_path / "out")
    with pytest.raises(UserError, match="no run was started"):
        export_run(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
