"""What `processes_test` starts: one process of a tiny student's run.

    python -m tests.processes_run EXPORT WORKDIR STEPS MESH [ADDRESS PROCESSES PROCESS]

Notes in WORKDIR/seen_PROCESSES_PROCESS.jsonl which scenes of every step this process read.
"""

import hashlib
import json
import sys
from pathlib import Path

from geode_jax.cli.reported import reported
from geode_jax.data.pipeline import Pipeline
from geode_jax.runtime import distributed
from geode_jax.train import train_and_evaluate
from tests.helpers.runs import tiny_config


def note_what_is_read(path: Path) -> None:
    """Every batch of `Pipeline.batch` leaves a line: its step, and a digest of each scene."""
    read = Pipeline.batch

    def batch(self, step, rows=None):
        found = read(self, step, rows)
        scenes = [hashlib.sha256(x.tobytes()).hexdigest() for x in found.vision_SVPC]
        with path.open("a") as file:
            file.write(json.dumps({"step": step, "scenes": scenes}) + "\n")
        return found

    Pipeline.batch = batch


def main(export: str, workdir: str, steps: str, mesh: str, *others: str) -> None:
    """See the module's docstring."""
    address, processes, process = others or ("", "1", "0")
    if address:
        distributed.initialize(address, int(processes), int(process))
    note_what_is_read(Path(workdir) / f"seen_{processes}_{process}.jsonl")
    config = tiny_config(Path(export), steps=int(steps), checkpoint_every=3, eval_every=6)
    with config.unlocked():
        config.mesh = tuple(map(int, mesh.split("x")))
        config.data.scenes_per_batch = 8
        config.optimizer.name = "adamw"  # compiles faster
    with distributed.ends_together():
        train_and_evaluate(config, Path(workdir))


if __name__ == "__main__":
    with reported():
        main(*sys.argv[1:])
