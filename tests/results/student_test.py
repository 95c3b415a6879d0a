"""The end of a run is one act: whatever interrupts it, the same command finishes it."""

import json
import shutil

import jax
import pytest

from geode_jax.errors import UserError
from geode_jax.evaluate import finished_batches
from geode_jax.evaluate.evaluator import Evaluator
from geode_jax.results import student
from geode_jax.runs import summary
from geode_jax.runs.build import build
from geode_jax.runs.config import make_settings
from geode_jax.train import train_and_evaluate
from geode_jax.training.checkpoint import Checkpoints


class Killed(BaseException):
    """As if the machine had gone."""


@pytest.fixture
def unfinished(tiny_run, tmp_path):
    """A run whose evaluation has not begun: its folder, itself, its model and position."""
    workdir = tmp_path / "run"
    shutil.copytree(tiny_run.workdir, workdir)
    for name in ("summary.json", "predictions.jsonl", "report.html"):
        (workdir / name).unlink()
    run = build(make_settings(tiny_run.config), workdir)
    with jax.set_mesh(run.mesh), Checkpoints(workdir) as checkpoints:
        state, position = checkpoints.restore_best(run.state)
        yield workdir, run, state, position


def test_an_evaluation_killed_anywhere_ends_as_an_undisturbed_one(
    tiny_run, unfinished, monkeypatch
):
    workdir, run, state, position = unfinished
    facts = {"seconds": 1.0, "steps": 3}
    kept_batches = 0
    keep = finished_batches.FinishedBatches.append

    def counted(*arguments):
        nonlocal kept_batches
        keep(*arguments)
        kept_batches += 1

    monkeypatch.setattr(finished_batches.FinishedBatches, "append", counted)

    def killed_at(owner, name: str, call: int) -> None:
        calls, function = 0, getattr(owner, name)

        def die(*arguments, **settings):
            nonlocal calls
            calls += 1
            if calls == call:
                raise Killed
            return function(*arguments, **settings)

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(owner, name, die)
            student.evaluate_and_report(run, state, workdir, facts, position["best"])
        assert not (workdir / "summary.json").exists()

    killed_at(
        finished_batches.FinishedBatches, "append", 3
    )  # two batches are kept, the third is lost
    kept = workdir / "evaluation" / "model.jsonl"
    assert len(kept.read_bytes().splitlines()) == 1 + 2
    with kept.open("ab") as file:
        file.write(b'{"predictions": [{"id": "half')  # what was being written
    killed_at(Evaluator, "answer_batch", 1)  # which measures the speed, after all answers
    every = kept_batches
    killed_at(student, "write_predictions", 1)
    killed_at(student, "write_report", 1)
    killed_at(summary, "seal", 1)
    assert kept_batches == every  # no question was answered again
    end = student.evaluate_and_report(run, state, workdir, facts, position["best"])
    assert end["scores"] == tiny_run.summary["scores"]
    assert end["test_scenes"] == tiny_run.summary["test_scenes"]
    predictions = [d / "predictions.jsonl" for d in (workdir, tiny_run.workdir)]
    assert predictions[0].read_bytes() == predictions[1].read_bytes()
    assert (workdir / "report.html").exists() and not kept.parent.exists()
    assert summary.read_summary(workdir) == end


def test_a_finished_run_started_again_shows_its_end(tiny_run, capsys):
    again = train_and_evaluate(tiny_run.config, tiny_run.workdir)
    assert again == tiny_run.summary
    said = capsys.readouterr().out
    assert "the run has ended already" in said and "building" not in said
    assert "ROUGE-1 F" in said and f"report: {tiny_run.workdir / 'report.html'}" in said


def test_a_changed_end_is_refused(tiny_run, tmp_path):
    for name in ("summary.json", "predictions.jsonl"):
        shutil.copy(tiny_run.workdir / name, tmp_path)
    path = tmp_path / "predictions.jsonl"
    assert summary.read_predictions(path)
    path.write_text(path.read_text().replace('"prediction": "', '"prediction": "x', 1))
    with pytest.raises(UserError, match=r"predictions\.jsonl: is not what was written"):
        summary.read_predictions(path)
    kept = json.loads((tmp_path / "summary.json").read_text())
    kept["train"]["seconds"] += 1
    (tmp_path / "summary.json").write_text(json.dumps(kept))
    with pytest.raises(UserError, match=r"summary\.json: is not what was written"):
        summary.read_summary(tmp_path)
    del kept["checksum"], kept["files"]  # as runs of before wrote it
    (tmp_path / "summary.json").write_text(json.dumps(kept))
    assert summary.read_summary(tmp_path) == kept
