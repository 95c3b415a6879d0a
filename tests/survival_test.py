"""A run that is killed over and over, while it saves too, ends bitwise as one that is not."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from geode_jax.training.metrics import read_metrics
from tests.helpers.toy_run import EVERY

REPOSITORY = Path(__file__).resolve().parent.parent
STEPS = 120

FAULTS = (
    "before:save:1", "after:save:1", "before:save:2", "after:save:3",
    "before:save_best:1", "after:save_best:1",
    "before:finish:2", "after:finish:3",
    "after:fingerprint:1", "before:fingerprint:3",
    "before:write:2", "after:write:4",
    "before:shard_batch:5", "after:shard_batch:2",
    "before:restore:1", "after:restore:1",
    "event:os.mkdir:6", "event:os.rename:2", "event:os.rename:3", "event:os.rmdir:1",
)  # fmt: skip
"""Where a start is killed; see `toy_run`. Those of files fall into the writing of checkpoints."""


def start(workdir: Path, *fault: str) -> subprocess.Popen:
    workdir.mkdir(exist_ok=True)
    with (workdir / "output").open("a") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.toy_run", str(workdir), str(STEPS), *fault],
            env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
            cwd=REPOSITORY,
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def saved(workdir: Path) -> int:
    """Step of the newest checkpoint that is complete."""
    names = [p.name for p in (workdir / "checkpoints" / "latest").glob("*")]
    return max((int(name) for name in names if name.isdecimal()), default=0)


def trained(workdir: Path) -> int:
    return max((row["step"] for row in read_metrics(workdir / "metrics.jsonl")), default=0)


def check_resumed(workdir: Path, saved_before: int) -> None:
    """Whoever came to resume began behind the last complete checkpoint."""
    output = (workdir / "output").read_text()
    (workdir / "output").write_text("")
    assert "damaged" not in output
    if "training:" in output:
        assert f"resuming at step {saved_before}\n" in output or not saved_before, output


@pytest.mark.slow
def test_twenty_faults_and_three_kills(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert start(whole).wait() == 0, (whole / "output").read_text()
    for fault in FAULTS:
        before = saved(broken)
        code = start(broken, fault).wait()
        assert code == -9, (fault, code, (broken / "output").read_text())
        check_resumed(broken, before)
        # A save may be under way while the steps of the next interval run.
        assert trained(broken) - saved(broken) <= 2 * EVERY, fault
    for _ in range(3):
        before, at = saved(broken), trained(broken) + random.randint(1, 2 * EVERY)
        process = start(broken)
        while trained(broken) < at:
            assert process.poll() is None, (broken / "output").read_text()
            time.sleep(0.005)
        process.kill()
        process.wait()
        check_resumed(broken, before)
    before = saved(broken)
    assert before < STEPS  # there is something left to do
    assert start(broken).wait() == 0, (broken / "output").read_text()
    check_resumed(broken, before)
    np.testing.assert_array_equal(*(np.load(d / "weights.npy") for d in (whole, broken)))
    rows = [
        [{n: x for n, x in row.items() if "speed/" not in n} for row in read_metrics(path)]
        for path in (whole / "metrics.jsonl", broken / "metrics.jsonl")
    ]
    assert rows[0] == rows[1]
