"""`geode-jax plan`: configurations, arithmetic on compiled figures, the search for a batch."""

import importlib.util
import json
import math

import jax
import ml_collections
import pytest

from geode_jax.errors import UserError
from geode_jax.plan import command
from geode_jax.plan.compiled import Program, Run
from geode_jax.runs.config import make_settings
from geode_jax.runs.config_file import read_settings
from geode_jax.runs.settings import Settings
from tests.helpers.runs import tiny_config


def test_configurations_are_read_with_their_arguments_and_changes():
    changes = ["train.microbatches=2", "model.remat=dots", "mesh=(1, 2, -1)"]
    settings = read_settings("configs/hidden_cot.py:full,thinking=4", changes, scenes=4)
    assert settings.model.thinking_tokens == 4
    assert (settings.train.microbatches, settings.model.remat) == (2, "dots")
    assert (settings.mesh, settings.data.scenes_per_batch) == ((1, 2, -1), 4)


@pytest.mark.parametrize(
    ("text", "changes", "said"),
    [
        ("configs/nothing.py", [], "no such file"),
        ("configs/hidden_cot.py:huge", [], "size=huge"),
        ("configs/common.py", [], "config: common.py: has no function get_config"),
        ("configs/hidden_cot.py", ["model.depth=3"], "config: no such field: 'depth'"),
        ("configs/hidden_cot.py", ["seed=many"], "--config.seed=many"),
        ("configs/hidden_cot.py", ["seed"], "--set: seed: is not FIELD=VALUE"),
        ("configs/hidden_cot.py", ["train.epochs=0"], "config: train.epochs: 0 is not at least 1"),
    ],
)
def test_configurations_that_cannot_be_read(text, changes, said):
    with pytest.raises(UserError, match=said):
        read_settings(text, changes)


def test_a_configuration_that_ends_the_process_is_one_line(tmp_path):
    (tmp_path / "ends.py").write_text("raise GeneratorExit\n")
    with pytest.raises(UserError, match="GeneratorExit"):
        read_settings(str(tmp_path / "ends.py"))


# --- Plans ----------------------------------------------------------------------------------------


def tiny(config: ml_collections.ConfigDict) -> Settings:
    """Rooms, described; a step that compiles in half a minute."""
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.data.export = "rooms"
        config.optimizer.name = "adamw"
    return make_settings(config)


def program(**changes):
    """A compiled step whose every figure is known: 2 s of an H100's arithmetic, 3 s of memory."""
    known = dict(
        arguments=3_000_000_000,
        outputs=50_000_000,
        temporaries=3_500_000_000,
        peak=6_550_000_000,
        refused="",
        flops=2 * 989 * 10**12,
        device_flops=2 * 989 * 10**12,
        collectives=(),
        unknown_loops=1,
        kernels=("attention_forward",),
        seconds=1.0,
    )
    return Program(**known | changes)


@pytest.fixture
def planned(tmp_path, monkeypatch):
    """`command.plan` of a tiny student on one device, whose programs are of the test's making."""

    def plan(step, answers=None, **options):
        monkeypatch.setattr(command, "devices_of", lambda _: jax.devices()[:1])
        monkeypatch.setattr(Run, "train_step", lambda _: step)
        monkeypatch.setattr(Run, "answers", lambda _: answers)
        monkeypatch.setattr(Run, "model_flops", lambda _: 989 * 10**12)
        return command.plan(tiny(tiny_config(tmp_path)), "h100:1x1", **options)

    return plan


def test_a_plan_is_arithmetic_on_what_was_compiled(planned):
    answers = program(device_flops=0, temporaries=0, unknown_loops=0)
    facts = planned(program(), answers)
    assert facts["seconds"] == {
        "compute": 2.0,
        "memory": pytest.approx((3.05 + 7) / 3350),
        "network": 0.0,
    }
    assert (facts["bound"], facts["step_seconds"]) == ("compute", 2.0)
    assert facts["mfu_ceiling"] == 0.5  # half of the work is done twice
    assert facts["tokens_per_step"] == 2 * 2 * 64
    assert facts["tokens_per_second"] == 128
    assert facts["steps"] == 3
    assert facts["chip_hours"] == facts["hours"] == pytest.approx(6 / 3600)
    assert facts["fits"]
    assert facts["decode"]["bound"] == "memory"
    assert facts["decode"]["answers"] == 2 * 4
    json.dumps(facts)
    text = command.table(facts)
    assert "peak 6.55 GB: fits" in text
    assert "compute 2 s" in text
    assert "unknown loops       1, counted once" in text
    assert "kernels             attention_forward" in text
    assert "50.0% of peak (MFU), 128 tokens/s" in text


def test_what_does_not_fit_is_said(planned):
    assert not planned(program(peak=81 * 10**9), decode=False)["fits"]
    refused = program(peak=90 * 10**9, refused="RESOURCE_EXHAUSTED: Used 90G of 79G hbm")
    facts = planned(refused, decode=False)
    assert not facts["fits"]
    assert facts["hbm_peak_bytes"] == 90 * 10**9
    assert "DOES NOT FIT: RESOURCE_EXHAUSTED" in command.table(facts)


def test_the_search_for_a_batch_closes_in():
    def search(peak, room, first):
        tried, count = {0: peak(0)}, first
        while count not in tried:
            tried[count] = peak(count)
            count = command.next_count(tried, room)
        return max(c for c in tried if tried[c] <= room), len(tried) - 1

    found, trials = search(lambda n: 10 + 3 * n, 1000, 1)  # 330 fit
    assert 330 * 7 / 8 <= found <= 330
    assert trials <= command.MAX_TRIALS
    found, trials = search(lambda n: 10 + n * n, 1000, 1)  # 31 fit
    assert 28 <= found <= 31
    assert trials <= command.MAX_TRIALS
    assert search(lambda n: 10 + 3 * n, 11, 4)[0] == 0  # not even one


def test_the_largest_batch_is_searched_for(planned, monkeypatch):
    sizes = []

    def step(run):
        sizes.append(run.settings.data.scenes_per_batch)
        return program(peak=(5 + 3 * sizes[-1]) * 10**9)

    monkeypatch.setattr(Run, "state_bytes", lambda _: 5 * 10**9)
    assert planned(program(), decode=False)["scenes_per_batch"] == 2
    monkeypatch.setattr(Run, "train_step", step)
    config = tiny(tiny_config("rooms"))
    facts = command.plan(config, "h100:1x1", search=True, decode=False)
    assert 22 <= facts["largest_batch"] <= 25  # 5 + 3 n of 80
    assert facts["scenes_per_batch"] == facts["largest_batch"]
    assert len(sizes) <= command.MAX_TRIALS + 1


@pytest.mark.slow
@pytest.mark.parametrize(("topology", "package"), [("v5e:2x2", "libtpu"), ("h100:2x2", "cuda13")])
def test_a_plan_is_compiled_for_hardware_that_is_not_there(topology, package, tmp_path):
    modules = {"libtpu": "libtpu", "cuda13": "jax_cuda13_plugin"}
    if importlib.util.find_spec(modules[package]) is None:
        pytest.skip(f"{modules[package]} is not installed: extra plan")
    settings = tiny(tiny_config(tmp_path))
    facts = command.plan(settings.with_scenes(4), topology, (1, 2, 2))
    assert facts["fits"]
    assert facts["mesh"] == {"data": 1, "fsdp": 2, "model": 2}
    assert facts["hbm_peak_bytes"] < facts["hbm_bytes"]
    spread = facts["flops_per_device"] * facts["devices"] / facts["flops_per_step"]
    assert 0.9 < spread < 4  # small heads may be left whole on the model axis
    assert any("fsdp" in axes for axes in facts["collective_bytes"])
    assert facts["bound"] in ("compute", "memory", "network")
    assert 0 < facts["mfu_ceiling"] < 1
    assert math.isfinite(facts["chip_hours"])
    assert facts["decode"]["fits"]
    json.dumps(facts)
    text = command.table(facts)
    assert "fits" in text
    assert "binds" in text
