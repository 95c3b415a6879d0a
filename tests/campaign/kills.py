"""Kills a run at random moments; it must end bitwise like an uninterrupted run."""

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from geode_jax.training.metrics import read_metrics
from tests.campaign.machine import REPOSITORY

STEPS_PER_KILL = 12
"""Steps by which a run is longer for every kill."""


def _start(workdir: Path, steps: int) -> subprocess.Popen:
    workdir.mkdir(exist_ok=True)
    with (workdir / "output").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.toy_run", str(workdir), str(steps)],
            cwd=REPOSITORY,
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def _rows(workdir: Path) -> list[dict]:
    rows = read_metrics(workdir / "metrics.jsonl")
    return [{n: x for n, x in row.items() if "speed/" not in n} for row in rows]


def _step(workdir: Path) -> int:
    """Returns the last step in metrics.jsonl, which is being written."""
    file = workdir / "metrics.jsonl"
    return file.read_bytes().count(b'"loss"') if file.exists() else 0


def kill(kills: int, seed: int, report: Callable[[str], None] = lambda _: None) -> str:
    """Kills a toy run at random moments and compares its end with that of an uninterrupted run.

    A moment is some milliseconds after the start, or after a new step, so that kills fall on
    imports, restoring, steps, saving and the end.

    Args:
        kills: number of kills.
        seed: seed of the moments.
        report: function that gets lines about the progress.

    Returns:
        A summary line.

    Raises:
        AssertionError: a process ended in an error, weights or metrics differ, or a checkpoint was
            found damaged.
    """
    draw, steps = random.Random(seed), STEPS_PER_KILL * (kills + 2)
    with tempfile.TemporaryDirectory(prefix="kills") as folder:
        whole, broken = Path(folder) / "whole", Path(folder) / "broken"
        assert _start(whole, steps).wait() == 0, (whole / "output").read_text()
        done = 0
        while done < kills:
            process, before = _start(broken, steps), _step(broken)
            early = draw.random() < 0.2
            goal = before + draw.randrange(1, STEPS_PER_KILL)
            while not early and process.poll() is None and _step(broken) < goal:
                time.sleep(0.002)
            time.sleep(draw.uniform(0, 3 if early else 0.05))
            if process.poll() is not None:
                assert process.returncode == 0, (broken / "output").read_text()[-3000:]
                break  # the run has ended: there is nothing left to kill
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            done += 1
            if done % 10 == 0:
                report(f"{done} kills, step {_step(broken)} of {steps}")
        process = _start(broken, steps)
        output = (broken / "output").read_text
        assert process.wait() == 0, output()[-3000:]
        weights = [np.load(run / "weights.npy") for run in (whole, broken)]
        np.testing.assert_array_equal(*weights)
        assert _rows(whole) == _rows(broken), "metrics differ"
        found = [line for line in output().splitlines() if "damaged" in line]
        assert not found, found
    return f"{done} kills of {steps} steps: weights and metrics equal those without kills"
