"""A finished run's files, damaged at random: one line, or the undamaged result; never a guess.

Each input is one file with one damage, read by what reads that file: 40 inputs always, 600 with
`-m slow`.
"""

import contextlib
import copy
import dataclasses
import io
import json
import os
import random
import shutil
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from geode_jax import build as building
from geode_jax.checkpoint import Checkpoints, load_leaves, load_model
from geode_jax.data import question_records
from geode_jax.errors import UserError
from geode_jax.evaluate.answered import Answered
from geode_jax.evaluate.final import show
from geode_jax.evaluate.summary import read_predictions, read_summary
from geode_jax.exports import Export
from geode_jax.metrics import MetricsWriter, read_metrics
from tests.runs import TinyRun

LONGEST = 20  # seconds
VALUES = (None, True, -1, 0, 7, 1e308, "x", "", [], [1], {}, {"a": 1}, [[]], "1e400")
TEXTS = (b"1" * 5000, b"1e999", b"NaN", b"-Infinity", b"[" * 100_000, b'"\\ud800"')


def leaves(tree) -> list[np.ndarray]:
    return [np.asarray(x) for x in jax.tree.leaves(tree)]


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b, equal_nan=a.dtype.kind == "f")
    return a == b


class Reader:
    """Reads a copy of a run's folder as the commands do."""

    def __init__(self, tiny: TinyRun, folder: Path):
        shutil.copytree(tiny.workdir, folder)
        shutil.copytree(tiny.export, folder / "export")
        shutil.rmtree(folder / "events")
        self.config = copy.deepcopy(tiny.config)
        self.config.data.export = str(folder / "export")
        building.save_config(self.config, folder)
        self.run = building.build(self.config, folder)
        self.folder = folder
        self.made_with = building.made_with(self.config, self.run.tokenizer)
        with jax.set_mesh(self.run.mesh), Checkpoints(folder) as checkpoints:
            state, position = checkpoints.restore(self.run.state)
            older = dataclasses.replace(state, step=state.step + 1)
            checkpoints.save(older, {**position, "step": 4, "worse": 1})
        rows = read_metrics(folder / "metrics.jsonl")
        writer = MetricsWriter(folder, 99)
        self.written = writer.written
        writer.close()
        assert len(rows) == self.written["rows"]
        with Answered(folder / "evaluation" / "model.jsonl", "x") as answered:
            for i in range(3):
                answered.keep({"predictions": [{"id": str(i)}], "scenes": []})
        self.state_like = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
            {"params": self.run.state.params, "frozen": self.run.state.frozen},
        )

    def readers(self, file: Path) -> list[str]:
        """Names of what reads a file of the folder."""
        part = file.parts[0]
        by_name = {"config.json": ["config"], "summary.json": ["summary", "predictions"],
                   "predictions.jsonl": ["predictions"], "metrics.jsonl": ["metrics"],
                   "tokenizer": ["tokenizer"], "evaluation": ["answered"],
                   "export": ["questions"]}  # fmt: skip
        if part == "checkpoints":
            return {"latest": ["restore"], "best": ["model", "leaves", "best"]}[file.parts[1]]
        return by_name[part]

    def read(self, name: str, folder: Path) -> Any:
        """What a command gets to see."""
        with jax.set_mesh(self.run.mesh):
            return getattr(self, "_" + name)(folder)

    def _config(self, folder):
        config, _ = building.open_run(folder)
        skipped = (*building.MAY_CHANGE, *building._PLACES)
        values = building.flat(building.plain(config))
        return [config.system, {n: x for n, x in values.items() if n not in skipped}]

    def _summary(self, folder):
        summary, said = read_summary(folder), io.StringIO()
        if summary:  # else the run is evaluated again
            with contextlib.redirect_stdout(said):
                show(summary, Path("run"))
        return said.getvalue() or None

    def _predictions(self, folder):
        return read_predictions(folder / "predictions.jsonl")

    def _metrics(self, folder):
        writer = MetricsWriter(folder, 3, self.written)
        writer.close()
        return read_metrics(folder / "metrics.jsonl")

    def _tokenizer(self, folder):
        _, checkpoint = building.open_run(folder)
        tokenizer = building.load_run_tokenizer(folder / "tokenizer", checkpoint)
        return [tokenizer.sha256, tokenizer.eos_id, tokenizer.pad_id, tokenizer.encode("How many")]

    def _answered(self, folder):
        return Answered(folder / "evaluation" / "model.jsonl", "x").before

    def _questions(self, folder):
        question_records._INTACT.clear()
        records = question_records.open_question_records(Export(folder / "export"))
        lengths = question_records.question_lengths(records, "train", self.run.tokenizer)
        return [list(records.of_split("train")), [lengths[n].tolist() for n in sorted(lengths)]]

    def _restore(self, folder):
        with Checkpoints(folder, self.made_with) as checkpoints:
            state, position = checkpoints.restore(self.run.state)
        return [json.dumps(position), leaves(state)]

    def _best(self, folder):
        with Checkpoints(folder, self.made_with) as checkpoints:
            found = checkpoints.restore_best(self.run.state)
        return None if found is None else [json.dumps(found[1]), leaves(found[0].params)]

    def _model(self, folder):
        _, checkpoint = building.open_run(folder)
        return [checkpoint.name, leaves(load_model(checkpoint, self.state_like))]

    def _leaves(self, folder):
        from flax import nnx

        _, checkpoint = building.open_run(folder)
        some = nnx.to_flat_state(self.run.state.params)[:5]
        return leaves([x.get_value() for _, x in load_leaves(checkpoint, some)])


def places(value: Any) -> list[tuple]:
    """Where in a JSON value something can be changed."""
    found = []
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in items:
        found.append((value, key))
        if isinstance(item, dict | list):
            found += places(item)
    return found


def damage(file: Path, chance: random.Random) -> str:
    """Damages a file; says how."""
    data = file.read_bytes()
    file.unlink()  # it may be a link to the undamaged one
    kinds = ["flip", "flip", "zeros", "bytes", "cut", "delete", "empty", "garbage"]
    try:
        lines = [json.loads(line) for line in data.splitlines()] if "jsonl" in file.name else None
        value = lines if lines is not None else json.loads(data)
        if isinstance(value, dict | list) and value:
            kinds += ["type", "type", "type", "field", "text", "text", "utf-16", "other"]
    except ValueError:
        value = None
    kind = chance.choice(kinds)
    at = chance.randrange(max(len(data), 1))
    size = chance.choice((1, 8, 64))
    if kind == "flip" and data:
        data = data[:at] + bytes([data[at] ^ (1 << chance.randrange(8))]) + data[at + 1 :]
    elif kind == "zeros":
        data = data[:at] + bytes(min(size, len(data) - at)) + data[at + size :]
    elif kind == "bytes":
        data = data[:at] + chance.randbytes(min(size, len(data) - at)) + data[at + size :]
    elif kind == "cut":
        data = data[:at]
    elif kind == "delete":
        return kind
    elif kind == "empty":
        data = b""
    elif kind == "garbage":
        data = chance.randbytes(len(data))
    elif kind == "utf-16":
        data = data.decode().encode("utf-16")
    elif kind == "other":
        data = chance.choice((b"[]", b"{}", b"3", b"null", b'"x"', b"[{}]", b"[" * 100_000))
    elif kind in ("type", "field", "text"):
        holder, key = chance.choice(places(value))
        if kind == "type":
            holder[key] = chance.choice(VALUES)
        elif kind == "field":
            del holder[key]
        else:
            holder[key] = "@@"
        whole = [json.dumps(x) for x in lines] if lines is not None else [json.dumps(value)]
        data = ("\n".join(whole) + "\n").encode().replace(b'"@@"', chance.choice(TEXTS))
    file.write_bytes(data)
    return f"{kind} at {at}"


def judged(name: str, got: Any, expected: Any, fallback: Any, said: str) -> str:
    """Whether a result is the undamaged one, another that was announced, or a wrong one."""
    if equal(got, expected):
        return "same"
    announced = {
        "restore": equal(got, fallback) and "damaged" in said,
        "metrics": "kept as" in said,
        "answered": got == (expected or [])[: len(got or ())],  # the rest is evaluated again
        "summary": got is None,  # there is none: the run is evaluated again
        "best": got is None,  # there is none: the last state is used
    }
    return "said" if announced.get(name) else "SILENT"


def campaign(tiny: TinyRun, folder: Path, inputs: int, seed: int) -> list[str]:
    """What went wrong with each of so many damaged files."""
    reader = Reader(tiny, folder / "whole")
    whole = reader.folder
    relative = [
        p.relative_to(whole) for p in sorted(whole.rglob("*"))
        if p.is_file() and "lock" not in p.name and "downloads" not in p.parts
        and (p.parts[len(whole.parts)] != "export" or ".questions" in p.parts)
        and p.name != "report.html" and "events" not in p.parts
    ]  # fmt: skip
    expected = {n: reader.read(n, whole) for f in relative for n in reader.readers(f)}
    older = shutil.copytree(whole, folder / "older")
    shutil.rmtree(older / "checkpoints" / "latest" / "4")
    fallback = reader.read("restore", older)
    chance = random.Random(seed)
    groups = [list(g) for g in dict.fromkeys(tuple(reader.readers(f)) for f in relative)]
    wrong: list[str] = []
    counts = {"line": 0}
    shown: list[str] = []
    for number in range(inputs):
        read_by = groups[number % len(groups)]  # each reader gets as many
        file = chance.choice([f for f in relative if reader.readers(f) == read_by])
        copied = folder / f"copy_{number}"
        # Links are enough: what is written takes a new file's place.
        shutil.copytree(whole, copied, copy_function=os.link)
        how = damage(copied / file, chance)
        for name in reader.readers(file):
            case = f"{number}: {file} {how}, {name}"
            said, began = io.StringIO(), time.monotonic()
            try:
                with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                    got = reader.read(name, copied)
                verdict = judged(name, got, expected[name], fallback, said.getvalue())
                counts[verdict] = counts.get(verdict, 0) + 1
                if verdict == "SILENT":
                    wrong.append(f"SILENT {case}: {str(got)[:300]}")
            except UserError as error:
                counts["line"] += 1
                if "\n" in str(error) or len(str(error)) > 600:
                    wrong.append(f"LONG {case}: {error}")
            except Exception as error:
                wrong.append(f"TRACEBACK {case}: {type(error).__name__}: {str(error)[:200]}")
            if time.monotonic() - began > LONGEST:
                wrong.append(f"SLOW {case}")
        shutil.rmtree(copied)
        print(*wrong[len(shown) :], sep="\n", end="\n" if wrong[len(shown) :] else "")
        shown = list(wrong)
    print(f"{inputs} inputs: {counts}, {len(wrong)} wrong")
    return wrong


def test_damage_is_one_line_or_does_not_matter(tiny_run, tmp_path):
    wrong = campaign(tiny_run, tmp_path, 40, seed=0)
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
def test_much_damage_is_one_line_or_does_not_matter(tiny_run, tmp_path):
    wrong = campaign(tiny_run, tmp_path, 600, seed=1)
    assert not wrong, "\n".join(wrong)
