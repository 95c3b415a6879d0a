"""What a run says of its speed, and the trace it leaves."""

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from geode_jax import train
from geode_jax.measure import meter as metering
from geode_jax.measure.chips import CHIPS
from geode_jax.training.metrics import read_metrics
from tests.helpers.runs import tiny_config


@pytest.fixture
def clock(monkeypatch):
    """Time that passes only where a test says so."""
    now = types.SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(metering.time, "monotonic", lambda: now.seconds)
    return now


@pytest.fixture
def batch():
    """Two scenes' questions, of which this process reads one: 5 + 2 and 3 + 1 tokens, one empty."""
    return types.SimpleNamespace(
        question_length_SQ=np.array([[5, 3, 4]]),
        answer_length_SQ=np.array([[2, 1, 0]]),
        packed_start_SWT=np.array([[[0] * 6 + [6] * 3 + [10]]]),
    )


def step(meter, clock, batch, waits: float, computes: float, inside=lambda: None) -> dict:
    with meter.waiting():
        clock.seconds += waits
    with meter.computing(batch):
        inside()
        clock.seconds += computes
    clock.seconds += 1000  # an evaluation, a checkpoint
    return meter.last


def test_a_step_is_measured_without_what_lies_between(monkeypatch, clock, batch):
    chip = CHIPS["h100"]
    monkeypatch.setattr(metering, "chip_of", lambda _: chip)
    devices = [object()] * 4
    meter = metering.Meter(flops=int(chip.flops), devices=devices, share=0.5)
    assert step(meter, clock, batch, 5, 50) == {}  # it compiles
    row = step(meter, clock, batch, 0.5, 1.5)
    assert row["speed/step_seconds"] == 2 and row["speed/input_wait"] == 0.25
    assert row["speed/occupancy"] == 0.9  # 6 and 3 columns of text, one of padding
    assert row["speed/tokens_per_second"] == 11 / 0.5 / 2
    assert row["speed/mfu"] == pytest.approx(1 / (2 * 4))
    for seconds in (4, 3):
        step(meter, clock, batch, 0, seconds)
    assert meter.summary()["step_seconds"] == 3
    meter.close()


def test_an_unknown_device_has_no_utilisation(clock, batch):
    meter = metering.Meter(flops=10**9, devices=jax.devices(), share=1.0)
    for _ in range(2):
        row = step(meter, clock, batch, 1, 1)
    assert row and "speed/mfu" not in row
    meter.close()


def test_a_step_that_compiles_anew_is_warned_of(clock, batch, capsys):
    meter = metering.Meter(flops=0, devices=jax.devices(), share=1.0)
    double = jax.jit(lambda x: x * 2)
    sizes = [3, 3, 3, 4]
    for n in sizes:
        step(meter, clock, batch, 0, 1, lambda n=n: double(jnp.zeros(n)))
    assert "step 4 of this start was compiled again" in capsys.readouterr().out
    before = meter.summary()["compilations"]
    assert before >= 2
    meter.close()
    double(jnp.zeros(5))
    assert meter.summary()["compilations"] == before


def test_a_finished_run_tells(tiny_run):
    rows = [row for row in read_metrics(tiny_run.workdir / "metrics.jsonl") if "loss" in row]
    assert not any(name.startswith("speed/") for name in rows[0])
    assert rows[-1]["speed/step_seconds"] > 0 and 0 <= rows[-1]["speed/input_wait"] <= 1
    speed = json.loads((tiny_run.workdir / "summary.json").read_text())["train"]["speed"]
    assert speed["tokens_per_second"] > 0 and speed["compilations"] > 0


@pytest.mark.slow
def test_a_profile_is_left(tiny_run, tmp_path, capsys):
    train.train_and_evaluate(tiny_config(tiny_run.export, steps=12), tmp_path, profile=True)
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    assert f"profile: {tmp_path / 'profile'}" in capsys.readouterr().out


def test_too_few_steps_for_a_profile(tmp_path, capsys):
    metering.Profile(tmp_path, False, first=0).close()
    assert not capsys.readouterr().out
    metering.Profile(tmp_path, True, first=0).close()
    assert "profile: none" in capsys.readouterr().out
