"""Targets in a run's folder: a damage must not silently change its results or its training."""

import contextlib
import dataclasses
import functools
import importlib
import io
import itertools
import json
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.campaign.damage import Damage
from tests.campaign.machine import REPOSITORY, Target, command, shared
from tests.campaign.outside import bits, tokenizer_content

STEPS, STOP = 9, 6
"""Steps of the toy run, and the step of its checkpoint when it is damaged."""


def _with_output(act: Callable[[], Any]) -> tuple[Any, str]:
    """Returns (what a function returns, what it prints)."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        return act(), printed.getvalue()


# --- A run of the real loop -----------------------------------------------------------------------


def _tiny_run() -> Path:
    """Returns a folder with an export `rooms` and a finished run `run`."""
    from tests.helpers.runs import make_tiny_run

    return shared("tiny_run", lambda folder: make_tiny_run(folder))


def _write_run(folder: Path) -> None:
    """Copies a finished run, without its export, whose path the run holds."""
    shutil.copytree(_tiny_run() / "run", folder / "run")


@functools.cache
def _built():
    """Returns the run with its state, as a resuming process builds it."""
    from geode_jax.runs.build import build
    from geode_jax.runs.config import make_settings
    from tests.helpers.runs import tiny_config

    return build(make_settings(tiny_config(_tiny_run() / "rooms")), _tiny_run() / "run")


def _bits_of(tree: Any) -> list[str]:
    import jax

    return [bits(leaf) for leaf in jax.tree.leaves(tree)]


def _config(folder: Path) -> list:
    """What the configuration says of what was learned; the rest may be another."""
    from geode_jax.runs.identity import made_with, open_run

    settings, checkpoint = open_run(folder / "run")
    return [checkpoint.name, made_with(settings, None)]


def _ask(folder: Path) -> list:
    from geode_jax.runs.trained import open_trained

    trained = open_trained(folder / "run")
    ids = trained.tokenizer.encode_batch(["How many chairs are there?", "A. chair\nB. table"])
    leaves = _bits_of((trained.state.params, trained.state.frozen))
    return [leaves, ids, trained.tokenizer.decode(ids[0])]


def _run_tokenizer(folder: Path) -> list:
    from geode_jax.runs.identity import load_run_tokenizer, open_run

    _, checkpoint = open_run(folder / "run")
    load_run_tokenizer(folder / "run" / "tokenizer", checkpoint)
    return tokenizer_content(folder / "run" / "tokenizer")


def _leaves(folder: Path) -> list:
    """Returns the parameters that a next stage takes from a run."""
    from flax import nnx

    from geode_jax.runs.identity import open_run
    from geode_jax.training.checkpoint import load_leaves

    _, checkpoint = open_run(folder / "run")
    some = nnx.to_flat_state(_built().state.params)[:5]
    return [bits(x.get_value()) for _, x in load_leaves(checkpoint, some)]


def _write_latest(folder: Path) -> None:
    """Writes the same run with one more checkpoint, after that of step 3."""
    import jax

    from geode_jax.training.checkpoint import Checkpoints

    _write_run(folder)
    own, run = _made_with(), folder / "run"
    with jax.set_mesh(_built().mesh), Checkpoints(run, own) as checkpoints:
        state, position = checkpoints.restore(_built().state)
        newer = dataclasses.replace(state, step=state.step + 1)
        checkpoints.save(newer, {**position, "step": 4, "worse": 1})
    (folder / "before.json").write_text(json.dumps([position, _bits_of(state)]))


def _made_with() -> dict[str, str]:
    from geode_jax.runs.identity import made_with

    return made_with(_built().settings, _built().tokenizer)


def _restore(folder: Path) -> dict:
    import jax

    from geode_jax.training.checkpoint import Checkpoints

    def act():
        run = folder / "run"
        with jax.set_mesh(_built().mesh), Checkpoints(run, _made_with()) as checkpoints:
            state, position = checkpoints.restore(_built().state)
        return json.loads(json.dumps([position, _bits_of(state)]))

    found, printed = _with_output(act)
    return {"found": found, "reported": "damaged" in printed}


def _restore_silent(before: dict, after: dict, done: Damage, folder: Path) -> str:
    """Requires that a damaged checkpoint is replaced by the one before, with a message."""
    older = json.loads((folder / "before.json").read_text())
    if after["found"] == before["found"] or (after["found"] == older and after["reported"]):
        return ""
    return "neither the newest state nor, with a message, the one before"


def _export_run(folder: Path) -> Any:
    from safetensors.numpy import load_file

    out = folder.parent / "out"
    shutil.rmtree(out, ignore_errors=True)
    command(["convert", "export", "--workdir", folder / "run", "--out", out])
    found = {name: bits(array) for name, array in load_file(out / "model.safetensors").items()}
    return [found, tokenizer_content(out)]


# --- Files of a finished run -----------------------------------------------------------------


def _write_end(folder: Path) -> None:
    """Writes a finished run's folder without checkpoints, which it does not need."""
    from geode_jax.runs.config import make_settings, save_settings
    from geode_jax.runs.summary import end, write_predictions
    from tests.helpers.runs import tiny_config

    run = folder / "run"
    save_settings(make_settings(tiny_config("nowhere")), run)
    asked = {"kind": "object_counting", "answer": "4"}
    records = [{"id": f"q{n}", "prediction": f"{n} chairs"} | asked for n in range(3)]
    write_predictions(run, records)
    column = {"overall": 41.5, "object_counting": 50.0}
    summary = {"scores": {"model": column, "blind": column}, "notes": ["none"]}
    end(run, summary | {"train": {"seconds": 12.5, "steps": 3}})


def _read_end(folder: Path) -> dict:
    from geode_jax.runs.summary import SUMMARY, read_predictions
    from geode_jax.train import train_and_evaluate
    from tests.helpers.runs import tiny_config

    run = folder / "run"
    ended = (run / SUMMARY).exists()  # else it is evaluated again, as documented
    found = _with_output(lambda: train_and_evaluate(tiny_config("nowhere"), run)) if ended else None
    return {"summary": found, "predictions": read_predictions(run / "predictions.jsonl")}


def _end_silent(before: dict, after: dict, done: Damage, folder: Path) -> str:
    if after["summary"] not in (before["summary"], None):
        return "the summary has changed"
    if after["predictions"] != before["predictions"]:
        return "predictions have changed"
    return ""


def _write_answered(folder: Path) -> None:
    from geode_jax.evaluate.finished_batches import FinishedBatches

    with FinishedBatches(folder / "model.jsonl", "x") as finished:
        for n in range(4):
            batch = [{"id": str(n), "prediction": "a chair"}]
            finished.append({"predictions": batch, "scenes": [{"loss": n / 3}]})


def _read_answered(folder: Path) -> list:
    from geode_jax.evaluate.finished_batches import FinishedBatches

    with FinishedBatches(folder / "model.jsonl", "x") as finished:
        return list(finished.earlier)


def _answered_silent(before: list, after: list, done: Damage, folder: Path) -> str:
    # Lost batches are evaluated again.
    return "" if after == before[: len(after)] else "a batch has changed"


# --- Metrics --------------------------------------------------------------------------------------


def _write_metrics(folder: Path) -> None:
    from geode_jax.training.metrics import MetricsWriter

    writer = MetricsWriter(folder, 0)
    for step in range(1, 13):
        writer.write(step, {"loss": 1 / step, "loss/text": 0.5 / step, "speed/steps": 2.0})
    (folder / "written.json").write_text(json.dumps(writer.written))
    writer.close()
    shutil.rmtree(folder / "events")


def _read_resumed(folder: Path, *, checked: bool) -> dict:
    """Reads the rows of a resumed run; `checked`: its checkpoint holds their checksum."""
    from geode_jax.training.metrics import MetricsWriter, read_metrics

    file, copy = folder / "metrics.jsonl", folder / "metrics.jsonl.damaged"
    if file.is_file() and not file.is_symlink():
        shutil.copyfile(file, copy)
    written = json.loads((folder / "written.json").read_text()) if checked else None
    _, printed = _with_output(lambda: MetricsWriter(folder, 12, written).close())
    return {"rows": read_metrics(file), "reported": "kept as" in printed}


def _metrics_silent(before: dict, after: dict, done: Damage, folder: Path) -> str:
    return (
        _lost(before, after, folder)
        if after["reported"]
        else "the rows have changed without a message"
    )


def _older_metrics_silent(before: dict, after: dict, done: Damage, folder: Path) -> str:
    """Requires no lost row; without a checksum, changed numbers cannot be noticed."""
    return _lost(before, after, folder)


def _lost(before: dict, after: dict, folder: Path) -> str:
    """Returns a fault unless every intact row is kept, or is in the damaged file that is kept."""
    damaged, kept = folder / "metrics.jsonl.damaged", folder / "metrics_damaged_12.jsonl"
    data = damaged.read_bytes() if damaged.is_file() else b""
    if after["reported"] and damaged.is_file() and kept.read_bytes() != data:
        return "the damaged file is not kept"
    lines = [line.rstrip(b"\r") for line in data.split(b"\n")]
    pairs = [(row, json.dumps(row).encode()) for row in before["rows"]]
    if after["reported"]:  # rows after one with a changed step are out of order
        same = itertools.takewhile(
            lambda both: both[0][1] == both[1], zip(pairs, lines, strict=False)
        )
        pairs = [pair for pair, _ in same]
    intact = [row for row, line in pairs if line in lines]
    return "an intact row is lost" if any(row not in after["rows"] for row in intact) else ""


# --- A toy run that is resumed -------------------------------------------------------------


@functools.cache
def _toy():
    """Returns the toy run's module, which caches its compiled step."""
    return importlib.import_module("tests.helpers.toy_run")


def _write_toy(folder: Path) -> None:
    """Writes a run that was killed at the batch after the checkpoint of step STOP."""
    arguments = [folder / "run", STEPS, f"before:shard_batch:{STOP + 2}"]
    command = [sys.executable, "-m", "tests.helpers.toy_run", *map(str, arguments)]
    code = subprocess.run(command, cwd=REPOSITORY, check=False).returncode
    assert code == -signal.SIGKILL, code
    shutil.rmtree(folder / "run" / "events", ignore_errors=True)


def _resume(folder: Path) -> dict:
    from geode_jax.training.metrics import read_metrics

    run = folder / "run"
    _, printed = _with_output(lambda: _toy().main(run, STEPS))
    rows = read_metrics(run / "metrics.jsonl")
    rows = [{k: v for k, v in row.items() if "speed/" not in k} for row in rows]
    return {"weights": bits(np.load(run / "weights.npy")), "rows": rows, "printed": printed}


def _resume_silent(before: dict, after: dict, done: Damage, folder: Path) -> str:
    if before["weights"] != after["weights"]:
        return "the final weights differ"
    lost = [row["step"] for row in before["rows"] if row not in after["rows"]]
    reported = "metrics.jsonl" in done.path and "kept as" in after["printed"]
    return f"rows of steps {lost} are lost or have changed" if lost and not reported else ""


# --- Cached questions -----------------------------------------------------------------------------


def _write_cache(folder: Path) -> None:
    from geode_jax.data.question_records import open_question_records
    from geode_jax.exports import Export
    from tests.helpers.exports import write_tiny_export

    write_tiny_export(folder / "export", train=2, val=1)
    open_question_records(Export(folder / "export"))


def _read_cache(folder: Path) -> dict:
    from geode_jax.data.question_records import open_question_records, question_lengths
    from geode_jax.exports import Export

    # A process checks the records of a folder once, so this folder gets a new name every time.
    export = folder / f"export-{uuid.uuid4().hex}"
    export.symlink_to("export")
    records = open_question_records(Export(export))
    found = {split: list(records.of_split(split)) for split in ("train", "val")}
    lengths = question_lengths(records, "train", _tokenizer())
    return found | {"lengths": {name: bits(array) for name, array in lengths.items()}}


@functools.cache
def _tokenizer():
    from geode_jax.data.tokens import train_tokenizer

    return train_tokenizer(["How many chair are there? 4", "a table and a lamp"], ["chair"], 2)


_MODEL = ("run/config.json", "run/tokenizer/*", "run/checkpoints/best/**/*")

TARGETS = {
    "run/config": Target(
        _write_run, _config, 1, ("run/config.json", "run/checkpoints/best/*/_CHECKPOINT_METADATA")
    ),
    "run/ask": Target(_write_run, _ask, 0.5, _MODEL),
    "run/export": Target(_write_run, _export_run, 0.2, (*_MODEL, "run/summary.json")),
    "run/leaves": Target(_write_run, _leaves, 0.3, ("run/checkpoints/best/**/*",)),
    "run/tokenizer": Target(_write_run, _run_tokenizer, 1.5, ("run/tokenizer/*",)),
    "run/restore": Target(
        _write_latest, _restore, 0.2, ("run/checkpoints/latest/4/**/*",), _restore_silent
    ),
    "run/end": Target(_write_end, _read_end, 2, ("run/*",), _end_silent),
    "run/answered": Target(_write_answered, _read_answered, 1, silent=_answered_silent),
    "run/metrics": Target(
        _write_metrics, lambda folder: _read_resumed(folder, checked=True), 2, ("metrics.jsonl",),
        _metrics_silent,
    ),
    "run/metrics/older": Target(
        _write_metrics, lambda folder: _read_resumed(folder, checked=False), 1, ("metrics.jsonl",),
        _older_metrics_silent,
    ),
    "run/resume": Target(
        _write_toy, _resume, 1, ("run/checkpoints/**/*", "run/metrics.jsonl"), _resume_silent
    ),
    "run/questions": Target(_write_cache, _read_cache, 2, ("export/.questions/**/*",)),
}  # fmt: skip
"""The targets of this module by name."""
