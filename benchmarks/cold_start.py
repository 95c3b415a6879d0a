"""Measures the start of a run without and with a compilation cache.

    python -m benchmarks.cold_start [--rounds 3]

Each run is a process that trains the laptop student for two steps on 16 rooms and evaluates it: it
imports, opens the data, and compiles or reads compiled programs. "Ours" is a run with a warm cache,
"theirs" the same run with an empty one.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import ledger

SMALL = {
    "data.rooms_scenes": 16,
    "train.steps": 2,
    "train.eval_every": 2,
    "train.checkpoint_every": 2,
    "eval.val_scenes": 1,
    "eval.test_scenes": 1,
}


def start(root: Path, cache: Path, run: str) -> None:
    """Runs two training steps and the smallest possible evaluation."""
    options = [f"--config.{name}={value}" for name, value in SMALL.items()]
    subprocess.run(
        [
            *(sys.executable, "-m", "geode_jax.main", "--config=configs/hidden_cot.py"),
            *(f"--workdir={root / run}", f"--config.data.root={root / 'data'}", *options),
        ],
        env=os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache)},
        check=True,
        capture_output=True,
    )


def main() -> None:
    """Measures, prints a table and writes `cold_start.json`."""
    arguments = ledger.parser(__doc__, rounds=3).parse_args()
    warm, cold = [], []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        start(root, root / "warm", "first")  # makes the rooms and fills the cache
        for i in range(arguments.rounds):
            cold.append(ledger.seconds(lambda i=i: start(root, root / f"cold{i}", f"cold run {i}")))
            warm.append(ledger.seconds(lambda i=i: start(root, root / "warm", f"warm run {i}")))
    name = "a run of two steps and its evaluation, cache warm against empty"
    row = ledger.row(name, warm, cold, unit="s", dtype="float32", shape=[2])
    ledger.write("cold_start", [row])


if __name__ == "__main__":
    main()
