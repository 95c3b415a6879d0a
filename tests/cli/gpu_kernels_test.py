"""`--gpu-kernels` changes the programs that a command compiles.

No kernel runs on a CPU. A cache of keys does: with the kernels its columns are whole tiles. Here
CPUs count as GPUs, and the caches of the programs that a command compiles are collected.
"""

import json

import jax
import pytest

from geode_jax.models import generate
from geode_jax.ops import gpu
from geode_jax.ops.attention_gpu import TILE
from geode_jax.plan import command
from geode_jax.plan.compiled import Run
from tests.helpers.command import one_error
from tests.plan.command_test import program


@pytest.fixture
def columns(monkeypatch) -> list[int]:
    """Numbers of columns of the caches for which programs were traced."""
    found, cache_columns = [], generate.cache_columns

    def collected(keys: int) -> int:
        found.append(cache_columns(keys))
        return found[-1]

    monkeypatch.setattr(gpu, "PLATFORMS", (jax.default_backend(),))
    monkeypatch.setattr(generate, "cache_columns", collected)
    return found


def check(columns: list[int], on: bool) -> None:
    assert columns
    assert all(count % TILE == 0 for count in columns) == on


@pytest.mark.parametrize("on", [True, False])
def test_ask(run, tiny_run, columns, on):
    prediction = json.loads((tiny_run.workdir / "predictions.jsonl").read_text().splitlines()[0])
    ask = ("ask", "--workdir", tiny_run.workdir, "--scene", prediction["scene_id"])
    asked = run(*ask, "--question", prediction["question"], *["--gpu-kernels"] * on)
    assert asked == (0, prediction["prediction"] + "\n", "")
    check(columns, on)


@pytest.mark.parametrize("on", [True, False])
def test_evaluate(run, tiny_run, columns, tmp_path, on):
    out = tmp_path / "vsi.json"
    evaluate = ("evaluate", "vsi", "--workdir", tiny_run.workdir, "--out", out)
    status, _, err = run(*evaluate, *["--gpu-kernels"] * on)
    assert status == 0, err
    check(columns, on)


@pytest.mark.parametrize("benchmark", ["vsi", "text"])
def test_evaluate_refuses_it_where_no_model_runs(run, tmp_path, benchmark):
    line = one_error(run("evaluate", benchmark, "--predictions", tmp_path / "x", "--gpu-kernels"))
    assert "--gpu-kernels: does not go with" in line


@pytest.mark.parametrize("on", [True, False])
def test_plan(run, tiny_run, columns, monkeypatch, tmp_path, on):
    config = tmp_path / "config.py"
    config.write_text(
        "from tests.helpers.runs import tiny_config\n\n"
        f"def get_config(arg=''):\n    return tiny_config({str(tiny_run.export)!r})\n"
    )
    monkeypatch.setattr(command, "devices_of", lambda _: jax.devices()[:1])
    monkeypatch.setattr(Run, "train_step", lambda _: program())
    monkeypatch.setattr(Run, "model_flops", lambda _: 1)
    plan = ("plan", "--config", config, "--topology", "h100:1x1", "--set", "data.export=rooms")
    status, _, err = run(*plan, *["--gpu-kernels"] * on)
    assert status == 0, err
    check(columns, on)
