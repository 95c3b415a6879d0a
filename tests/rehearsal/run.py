"""Runs a recipe on the miniatures, undisturbed or killed again and again."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.rehearsal import raw

REPOSITORY = Path(__file__).resolve().parent.parent.parent
RECIPES = ("hidden_cot", "geode")
SMALL = {
    # The vocabulary, K, the number of epochs, rows and batches are those of the configuration.
    "hidden_cot": {
        **{"model.width": 32, "model.layers": 2, "model.heads": 2, "model.mlp_width": 64},
        **{"model.projector_width": 32, "model.cross_layers": "(0,1)", "model.heads_width": 16},
        **{"model.queries": 4, "model.detection_layers": 1},
    },
    "geode": {
        **{f"model.decoder.{n}": size for n, size in raw.QWEN.items() if n != "head_width"},
        **{f"model.vision.{name}": size for name, size in raw.INTERNVIT.items()},
        **{"model.drm.width": 16, "model.drm.heads": 2, "model.drm.layers": 1},
        "model.drh_width": 16,
    },
}
"""Widths and depths of the miniatures: all that differs from the papers' configurations."""


def environment(recipe: str, inputs: Path, out: Path) -> dict[str, str]:
    """Returns the environment in which a recipe reads `inputs` and writes to `out`."""
    fields = SMALL[recipe]
    given = "--commit none --device cpu --licence none"
    return os.environ | {
        "RAW": str(inputs),
        "OUT": str(out),
        "VIEWS": "4",
        "GRID": "4 4",
        "GEODE": f"{sys.executable} -m geode_jax.cli.command",
        "TRAIN": " ".join(f"--config.{name}={value}" for name, value in fields.items()),
        "VGGT_OPTIONS": f"{given} --size 56 --weights random",
        "SONATA_OPTIONS": f"{given} --weights {inputs}/sonata/sonata.pth",
        "LLAVA_OPTIONS": f"{given} --model {inputs}/LLaVA-3D/llava-3d-tiny --max-new-tokens 6",
        # Compiling is most of what tiny models do.
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "HF_HUB_OFFLINE": "1",
    }


def run(recipe: str, inputs: Path, out: Path, *options: str, kills: int = 0, seed: int = 0) -> int:
    """Runs a recipe to its end and returns its exit status.

    Args:
        recipe: "hidden_cot" or "geode".
        inputs: folder written by `raw.write_raw`.
        out: folder of the results.
        options: of the recipe.
        kills: number of times that the recipe and all that it started is killed before.
        seed: of the moments at which it is killed, from 1 to 40 s after a start.
    """
    command = ["bash", str(REPOSITORY / "launch" / "recipes" / f"{recipe}.sh"), *options]
    moments = random.Random(seed)
    for left in range(kills, -1, -1):
        process = subprocess.Popen(
            command, env=environment(recipe, inputs, out), start_new_session=True, cwd=REPOSITORY
        )
        try:
            wait = moments.uniform(1, 40) if left else None
            status = process.wait(wait)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            print(f"-- killed after {wait:.1f} s, {left - 1} kills are left", flush=True)
            continue
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        if left:
            print(f"-- ended before it was killed, {left} kills are left", flush=True)
        return status
    raise AssertionError("unreachable")


def facts(recipe: str, out: Path) -> dict:
    """Returns what a finished recipe found.

    Returns:
        For "hidden_cot": `counts`, {term of eq. 2: targets learned from}, and `scores`, {column:
        scores}. For "geode": `scores`, {"model", "blind"} -> VSI-Bench's questions and scores. For
        both `predictions`, the answers as text, and `weights`, the bytes of the exported folder.
    """
    folder = out / {"hidden_cot": "student", "geode": "model"}[recipe]
    weights = b"".join(p.read_bytes() for p in sorted(folder.glob("*.safetensors")))
    if recipe == "hidden_cot":
        lines = (out / "run" / "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        counts: dict[str, float] = {}
        for row in rows:
            for name, value in row.items():
                if name.startswith("count/"):
                    term = name.split("/")[1]
                    counts[term] = counts.get(term, 0) + value
        scores = json.loads((out / "run" / "summary.json").read_text())["scores"]
        predictions = (out / "run" / "predictions.jsonl").read_text()
        return {"counts": counts, "scores": scores, "predictions": predictions, "weights": weights}
    names = {"model": "joint", "blind": "blind"}
    reports = {
        column: json.loads((out / "runs" / name / "vsi-bench.json").read_text())
        for column, name in names.items()
    }
    # A report also names its files, whose folder differs between two rehearsals.
    kept = ("questions", "scores")
    scores = {column: {key: report[key] for key in kept} for column, report in reports.items()}
    predictions = (out / "runs" / "joint" / "predictions.jsonl").read_text()
    return {"scores": scores, "predictions": predictions, "weights": weights}


def timed(recipe: str, inputs: Path, out: Path, **options) -> tuple[int, float]:
    """Runs a recipe; returns its exit status and seconds."""
    began = time.monotonic()
    return run(recipe, inputs, out, **options), time.monotonic() - began
