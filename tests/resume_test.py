"""Killed, stopped, and resumed runs end bitwise where an uninterrupted run ends."""

import json
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from geode_jax.training.metrics import read_metrics
from tests.helpers.runs import tiny_rooms

STEPS = 12
REPOSITORY = Path(__file__).resolve().parent.parent

SCRIPT = """
import sys
from pathlib import Path
from tests.helpers.runs import tiny_config
from geode_jax.train import train_and_evaluate
export, workdir, workers, steps = sys.argv[1:]
config = tiny_config(Path(export), steps=int(steps), checkpoint_every=3, eval_every=4)
with config.unlocked():
    config.data.workers = int(workers)
train_and_evaluate(config, Path(workdir))
"""


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    return tiny_rooms(tmp_path_factory.mktemp("resume") / "rooms")


@pytest.fixture(scope="module")
def uninterrupted(export, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("resume") / "whole"
    process = start(export, workdir)
    assert process.wait() == 0, output(workdir)
    return workdir


def start(export: Path, workdir: Path, workers: int = 1) -> subprocess.Popen:
    workdir.mkdir(exist_ok=True)
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    with (workdir / "output").open("a") as log:
        return subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(export), str(workdir), str(workers), str(STEPS)],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=REPOSITORY,
        )


def output(workdir: Path) -> str:
    return (workdir / "output").read_text()


def steps_done(workdir: Path) -> int:
    return max((row["step"] for row in read_metrics(workdir / "metrics.jsonl")), default=0)


def wait_for_step(process: subprocess.Popen, workdir: Path, step: int) -> None:
    while steps_done(workdir) < step:
        assert process.poll() is None, output(workdir)
        time.sleep(0.02)


def final_state(workdir: Path) -> list[np.ndarray]:
    folder = workdir / "checkpoints" / "latest"
    with ocp.training.Checkpointer(folder) as checkpointer:
        assert checkpointer.latest.step == STEPS
        with warnings.catch_warnings():
            # Orbax prefers to be told the shardings; here they are read from the checkpoint.
            warnings.filterwarnings("ignore", "Sharding info not provided")
            return [np.asarray(x) for x in jax.tree.leaves(checkpointer.load_checkpointables())]


def assert_same_end(workdir: Path, reference: Path) -> None:
    rows, expected = (
        [
            {name: x for name, x in row.items() if not name.startswith("speed/")}
            for row in read_metrics(folder / "metrics.jsonl")
        ]
        for folder in (workdir, reference)
    )
    assert rows == expected
    ours, theirs = final_state(workdir), final_state(reference)
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a, b)
    summaries = [json.loads((w / "summary.json").read_text()) for w in (workdir, reference)]
    assert summaries[0]["scores"] == summaries[1]["scores"]


@pytest.mark.slow
def test_a_killed_run_ends_where_an_uninterrupted_one_does(export, uninterrupted, tmp_path):
    workdir = tmp_path / "killed"
    process = start(export, workdir)
    wait_for_step(process, workdir, random.randint(1, STEPS - 1))
    process.kill()
    process.wait()
    assert not (workdir / "summary.json").exists()
    assert start(export, workdir).wait() == 0, output(workdir)
    assert_same_end(workdir, uninterrupted)


@pytest.mark.slow
def test_sigterm_saves_and_other_workers_resume(export, uninterrupted, tmp_path):
    workdir = tmp_path / "stopped"
    process = start(export, workdir)
    wait_for_step(process, workdir, 4)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 128 + signal.SIGTERM, output(workdir)
    assert "stopped by SIGTERM" in output(workdir)
    stopped = steps_done(workdir)
    assert 4 <= stopped < STEPS
    assert start(export, workdir, workers=2).wait() == 0, output(workdir)
    assert f"resuming at step {stopped}" in output(workdir)
    assert_same_end(workdir, uninterrupted)


@pytest.mark.slow
def test_ctrl_c_saves_and_sigterm_in_the_evaluation_keeps_what_was_answered(
    export, uninterrupted, tmp_path
):
    workdir = tmp_path / "stopped"
    process = start(export, workdir)
    wait_for_step(process, workdir, 5)
    process.send_signal(signal.SIGINT)
    assert process.wait() == 128 + signal.SIGINT, output(workdir)
    assert "stopped by Ctrl-C at step" in output(workdir)
    process = start(export, workdir)
    kept = workdir / "evaluation" / "model.jsonl"
    while not kept.exists() or kept.read_bytes().count(b"\n") < 3:
        assert process.poll() is None, output(workdir)
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    asked = time.monotonic()
    assert process.wait() == 128 + signal.SIGTERM, output(workdir)
    assert time.monotonic() - asked < 20
    assert "nothing is lost" in output(workdir) and not (workdir / "summary.json").exists()
    assert start(export, workdir).wait() == 0, output(workdir)
    assert_same_end(workdir, uninterrupted)
    predictions = [d / "predictions.jsonl" for d in (workdir, uninterrupted)]
    assert predictions[0].read_bytes() == predictions[1].read_bytes()


@pytest.mark.slow
def test_a_second_run_in_the_folder_is_told_of_the_first(export, tmp_path):
    workdir = tmp_path / "shared"
    first = start(export, workdir)
    wait_for_step(first, workdir, 1)
    rows = (workdir / "metrics.jsonl").read_bytes()
    second = start(export, workdir)
    assert second.wait() != 0
    assert f"process {first.pid} on " in output(workdir)
    assert (workdir / "metrics.jsonl").read_bytes().startswith(rows)
    first.kill()
    first.wait()
    assert start(export, workdir).wait() == 0, output(workdir)
