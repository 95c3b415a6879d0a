"""Targets in a run's own folder: what changes what it says or learns must not pass in silence."""

import functools
import importlib
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from tests.campaign.damage import Damage
from tests.campaign.machine import REPOSITORY, Target, command, shared
from tests.campaign.outside import bits, tokenizer_content

STEPS, STOP = 9, 6
"""Of the run of one matrix: how many, and where it stands when it is damaged."""


def _write_run(folder: Path) -> None:
    """A finished run; its export stays where it was, since the run names it."""
    from tests.runs import make_tiny_run

    made = shared("tiny_run", lambda folder: make_tiny_run(folder))
    shutil.copytree(made / "run", folder / "run")


def _ask(folder: Path) -> str:
    from geode_jax.inference.trained import open_trained

    trained = open_trained(folder / "run")
    import jax

    ids = trained.tokenizer.encode_batch(["How many chairs are there?", "A. chair\nB. table"])
    flat = jax.tree.leaves((trained.state.params, trained.state.frozen))
    return json.dumps([[bits(leaf) for leaf in flat], ids, trained.tokenizer.decode(ids[0])])


def _finished(folder: Path) -> Any:
    from geode_jax.build import load_config
    from geode_jax.train import train_and_evaluate

    config = load_config_of_template(folder)
    load_config(folder / "run")
    if not (folder / "run" / "summary.json").exists():
        return "evaluated again"  # which takes its time, and is what the documentation says
    return train_and_evaluate(config, folder / "run")


def load_config_of_template(folder: Path):
    """The configuration that the run was started with, as its command would give it again."""
    from tests.runs import tiny_config

    return tiny_config(json.loads((folder / "export.json").read_text()))


def _write_finished(folder: Path) -> None:
    """A finished run's folder without checkpoints, which a finished run does not read."""
    from geode_jax.build import save_config
    from tests.runs import tiny_config

    (folder / "export.json").write_text(json.dumps("nowhere"))
    save_config(tiny_config("nowhere"), folder / "run")
    summary = {
        "scores": {"model": {"overall": 41.5}}, "train": {"seconds": 12.5, "steps": 3},
        "notes": ["none"],
    }  # fmt: skip
    (folder / "run" / "summary.json").write_text(json.dumps(summary, indent=1))


def _finished_silent(before: Any, after: Any, done: Damage, folder: Path) -> str:
    if after == "evaluated again":
        return ""
    # The figures of a summary have no checksum; what is no summary has to be said.
    return "" if isinstance(after, dict) and not done.plain else "what is returned is no summary"


def _write_metrics(folder: Path) -> None:
    from geode_jax.metrics import MetricsWriter

    writer = MetricsWriter(folder, 0)
    for step in range(1, 13):
        writer.write(step, {"loss": 1 / step, "loss/text": 0.5 / step, "speed/steps": 2.0})
    writer.close()
    shutil.rmtree(folder / "events")


def _read_metrics(folder: Path) -> list:
    from geode_jax.metrics import MetricsWriter, read_metrics

    rows = read_metrics(folder / "metrics.jsonl")
    MetricsWriter(folder, 12).close()  # as a run does that goes on
    return [rows, read_metrics(folder / "metrics.jsonl")]


def _metrics_silent(before: list, after: list, done: Damage, folder: Path) -> str:
    """Every row that is intact in the file is among the rows; no row is of text."""
    intact = [row for row in before[0] if row in _rows_of(folder / "metrics.jsonl.damaged")]
    for rows in after:
        if any(row not in rows for row in intact):
            return "an intact row is lost"
    return ""


def _rows_of(path: Path) -> list:
    rows = []
    for line in path.read_bytes().split(b"\n") if path.is_file() else ():
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError):
            continue
    return rows


def _read_metrics_kept(folder: Path) -> list:
    file, copy = folder / "metrics.jsonl", folder / "metrics.jsonl.damaged"
    if file.is_file() and not file.is_symlink():
        shutil.copyfile(file, copy)
    return _read_metrics(folder)


@functools.cache
def _toy():
    """The toy run's module, which keeps what it has compiled."""
    return importlib.import_module("tests.toy_run")


def _write_toy(folder: Path) -> None:
    """Killed when it takes the batch behind the checkpoint of step STOP."""
    arguments = [folder / "run", STEPS, f"before:shard_batch:{STOP + 2}"]
    command = [sys.executable, "-m", "tests.toy_run", *map(str, arguments)]
    code = subprocess.run(command, cwd=REPOSITORY, check=False).returncode
    assert code == -signal.SIGKILL, code
    shutil.rmtree(folder / "run" / "events", ignore_errors=True)


def _resume(folder: Path) -> list:
    from geode_jax.metrics import read_metrics

    run = folder / "run"
    _toy().main(run, STEPS)
    rows = read_metrics(run / "metrics.jsonl")
    rows = [{k: v for k, v in row.items() if "speed/" not in k} for row in rows]
    return [bits(np.load(run / "weights.npy")), rows]


def _resume_silent(before: list, after: list, done: Damage, folder: Path) -> str:
    if before[0] != after[0]:
        return "the weights at the end are others"
    lost = [row["step"] for row in before[1] if row not in after[1]]
    if lost and done.path != "run/metrics.jsonl":
        return f"rows of steps {lost} are lost or have changed"
    return ""


def _write_cache(folder: Path) -> None:
    from geode_jax.data.question_records import open_question_records
    from geode_jax.exports import Export
    from tests.data.conftest import write_tiny_export

    write_tiny_export(folder / "export", train=2, val=1)
    open_question_records(Export(folder / "export"))


def _read_cache(folder: Path) -> dict:
    from geode_jax.data.question_records import open_question_records, question_lengths
    from geode_jax.exports import Export

    records = open_question_records(Export(folder / "export"))
    found = {split: list(records.of_split(split)) for split in ("train", "val")}
    lengths = question_lengths(records, "train", _tokenizer())
    return found | {"lengths": {name: bits(array) for name, array in lengths.items()}}


@functools.cache
def _tokenizer():
    from geode_jax.data.tokens import train_tokenizer

    return train_tokenizer(["How many chair are there? 4", "a table and a lamp"], ["chair"], 2)


def _write_tokenizer(folder: Path) -> None:
    _tokenizer().save(folder)


def _export_run(folder: Path) -> Any:
    from safetensors.numpy import load_file

    out = folder.parent / "out"
    shutil.rmtree(out, ignore_errors=True)
    command(["convert", "export", "--workdir", folder / "run", "--out", out])
    found = {name: bits(array) for name, array in load_file(out / "model.safetensors").items()}
    return [found, tokenizer_content(out)]


TARGETS = {
    "run/ask": Target(
        _write_run, _ask, 0.7, ("run/config.json", "run/tokenizer/*", "run/checkpoints/best/**/*")
    ),
    "run/export": Target(
        _write_run, _export_run, 0.3,
        ("run/config.json", "run/summary.json", "run/tokenizer/*", "run/checkpoints/best/**/*"),
    ),
    "run/finished": Target(_write_finished, _finished, 1.5, ("run/*",), _finished_silent),
    "run/metrics": Target(
        _write_metrics, _read_metrics_kept, 2, ("metrics.jsonl",), _metrics_silent
    ),
    "run/resume": Target(
        _write_toy, _resume, 3, ("run/checkpoints/**/*", "run/metrics.jsonl"), _resume_silent
    ),
    "run/questions": Target(_write_cache, _read_cache, 2, ("export/.questions/**/*",)),
    "run/tokenizer": Target(
        _write_tokenizer, tokenizer_content, 2,
        silent=lambda before, after, done, folder: "a file is none" if done.plain else "",
    ),
}  # fmt: skip
"""Name -> target."""
