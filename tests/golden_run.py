"""Prints the losses that `golden_test` compares, as JSON: python -m tests.golden_run FOLDER"""

import json
import platform
import sys
from pathlib import Path

import jax

from geode_jax.train import train_and_evaluate
from tests.helpers.runs import tiny_config, tiny_geode_config, tiny_rooms

STEPS = 20
ONCE = {"steps": STEPS, "eval_every": STEPS, "checkpoint_every": STEPS}

VECTOR_FLAGS = ("avx", "avx2", "fma", "avx512", "amx", "asimd", "sve")
"""What the flags of a CPU that decide which instructions XLA compiles to begin with."""


def main(folder: Path) -> dict:
    """Trains `hidden_cot` and the four stages of GEODE, each from the one before, on tiny rooms."""
    losses = {}
    config = tiny_config(tiny_rooms(folder / "rooms"), **ONCE)
    train_and_evaluate(config, folder / "hidden_cot")
    losses["hidden_cot"] = read_losses(folder / "hidden_cot")
    export, before = tiny_rooms(folder / "rooms_with_images", images=32), None
    for stage in ("pretrain", "align", "drm", "joint"):
        config = tiny_geode_config(stage, export, before)
        with config.unlocked():
            config.train.update(ONCE)
        before = folder / stage
        train_and_evaluate(config, before)
        losses[stage] = read_losses(before)
    return {"made_with": made_with(), "losses": losses}


def read_losses(workdir: Path) -> list[str]:
    """Returns the training losses of a run as hexadecimal floats, which lose no bit."""
    rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [float(row["loss"]).hex() for row in rows if "loss" in row]


def made_with() -> dict:
    """Returns what the last bits of a loss depend on, other than this repository."""
    flags = {
        flag
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.lower().startswith(("flags", "features"))
        for flag in line.split(":")[1].split()
        if flag.startswith(VECTOR_FLAGS)
    }
    return {
        "jax": jax.__version__,
        "jaxlib": jax.lib.__version__,
        "machine": platform.machine(),
        "cpu_flags": sorted(flags),
    }


if __name__ == "__main__":
    out = main(Path(sys.argv[1]))
    print(json.dumps(out))
