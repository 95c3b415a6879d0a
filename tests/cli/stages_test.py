"""The order of GEODE's runs, what each starts from, and Table 4 of what they scored."""

import importlib
import json
import sys
from pathlib import Path

import pytest

from geode_jax.cli import stages
from geode_jax.cli.stages import BLIND, ROWS, command, plan, table4, train
from geode_jax.runs.shipped import config_names
from tests.helpers.command import one_error


def test_every_run_starts_from_one_that_ends_before_it():
    runs = plan(Path("runs"), 0, tuple(ROWS.values()))
    for i, run in enumerate(runs):
        assert run.start == "" if i == 0 else run.start in [str(r.folder) for r in runs[:i]]
    assert len({run.folder for run in runs}) == len(runs) == 8
    starts = {run.arg: Path(run.start).name for run in runs if run.stage == "joint"}
    # A row without the module shares the stages before the module's.
    assert starts == {
        "vision=off": "geode_align", "": "geode_drm", "drh=off": "geode_drm",
        "drm=off": "geode_align", "drm=off,drh=off": "geode_align",
    }  # fmt: skip


def test_seeds_share_nothing_and_geode_is_part_of_table_4():
    first, second = (plan(Path("runs"), seed, tuple(ROWS.values())) for seed in (0, 1))
    assert not {run.folder for run in first} & {run.folder for run in second}
    assert all(run.start == "" or "seed_1" in Path(run.start).parts for run in second)
    whole = plan(Path("runs"), 0, ("",))
    assert set(whole) <= set(plan(Path("runs"), 0, tuple(ROWS.values())))


@pytest.mark.parametrize("run", plan(Path("runs"), 1, tuple(ROWS.values())))
def test_a_command_names_a_config_that_there_is(run):
    argv = command(run, 1, ["--config.train.steps=3"])
    assert argv[1:3] == ["-m", "geode_jax.main"] and argv[-1] == "--config.train.steps=3"
    name, _, arg = argv[3].removeprefix("--config=").partition(":")
    assert name in config_names()
    config = importlib.import_module(f"geode_jax.configs.{name}").get_config(arg)
    assert config.system == f"geode_{run.stage}" == name
    assert config.loss.vision == (arg != BLIND)
    assert f"--config.eval.blind={run.folder.parent / 'geode_joint-vision=off'}" in argv
    assert f"--config.init_from={run.start}" in argv and f"--workdir={run.folder}" in argv


def test_the_papers_size_starts_from_pretrained_folders_and_given_exports():
    inputs = stages._inputs("full", "qwen,vit", ["data", "joint=last"])
    runs = plan(Path("runs"), 0, tuple(ROWS.values()), inputs)
    assert [run.stage for run in runs] == ["align", "joint", "drm", *["joint"] * 4]
    assert runs[0].start == "qwen,vit" and runs[2].start == str(runs[0].folder)
    laptop = plan(Path("runs"), 0, tuple(ROWS.values()))
    assert not {run.folder for run in runs} & {run.folder for run in laptop}
    drm = importlib.import_module("geode_jax.configs.geode_drm")
    assert drm.get_config("").data.asks_rationales
    assert drm.get_config("full,question=on").data.asks_rationales
    for run in runs:
        argv = command(run, 0, [], inputs)
        name, _, arg = argv[3].removeprefix("--config=").partition(":")
        config = importlib.import_module(f"geode_jax.configs.{name}").get_config(arg)
        assert config.model.decoder.width == 1536
        assert config.data.asks_rationales == (run.stage != "drm")  # eq. 4
        wanted = "last" if run.stage == "joint" else "data"
        assert f"--config.data.export={wanted}" in argv
        assert ("--config.tokenizer=qwen" in argv) == (run.stage == "align")
        assert f"--config.eval.blind={runs[1].folder}" in argv
        assert config.loss.vision == (run is not runs[1])


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        (["geode", "--pretrained", "a"], "--pretrained, --export: are for geode:full"),
        (["geode:full", "--export", "a"], "--pretrained: is needed"),
        (["table4:full", "--pretrained", "a"], "--export: is missing for align, drm, joint"),
        (["geode:full", "--pretrained", "a", "--export", "drm=a"], "missing for align, joint"),
        (["geode:full", "--pretrained", "a", "--export", "x=a"], "'x' is not one of align, drm"),
    ],
)
def test_inputs_that_do_not_fit_the_size_are_one_line(run, arguments, rule):
    assert rule in one_error(run("stages", *arguments))


def says(text: str, status: int = 0) -> list[str]:
    return [sys.executable, "-c", f"import sys; print({text!r}); sys.exit({status})"]


def test_a_failed_run_ends_all(tmp_path, monkeypatch, capfd):
    fails = {"align": 3}
    monkeypatch.setattr(
        stages, "command", lambda run, *_: says(f"its {run.stage}", fails.get(run.stage, 0))
    )
    with pytest.raises(SystemExit) as ended:
        train(plan(tmp_path, 0, ("",)), 0, [])
    assert ended.value.code == 3
    lines = capfd.readouterr().out.splitlines()
    assert lines.count("its align") == lines.count("its pretrain") == 1 and "its drm" not in lines
    fails["align"] = 0
    train(plan(tmp_path, 0, ("",)), 0, [])
    lines = [line for line in capfd.readouterr().out.splitlines() if line.startswith("its")]
    assert lines == ["its pretrain", "its align", "its joint", "its drm", "its joint"]


def test_table_4_is_of_all_seeds(tmp_path):
    for seed in (0, 1):
        joint = [run for run in plan(tmp_path, seed, tuple(ROWS.values())) if run.stage == "joint"]
        for i, run in enumerate(joint):
            run.folder.mkdir(parents=True)
            model = {"overall": 10.0 * i + seed, "per_type": {"room_size_estimation": 1.0 + i}}
            frequency = {"overall": 33.0, "per_type": {}}
            summary = {"vsi": {"model": model, "frequency": frequency}}
            (run.folder / "summary.json").write_text(json.dumps(summary))
    rows = table4(tmp_path, [0, 1])
    assert set(rows) == {*ROWS, "blind", "frequency"}
    assert rows["both"]["seed 0"]["overall"] == 40 and rows["both"]["seed 1"]["overall"] == 41
    assert rows["both"]["mean"] == {"overall": 40.5, "per_type": {"room_size_estimation": 5.0}}
    assert rows["blind"]["mean"]["overall"] == 0.5 and rows["frequency"]["mean"]["overall"] == 33


def test_seeds_are_numbers(run):
    assert "--seeds: one,two" in one_error(run("stages", "table4", "--seeds=one,two"))


def test_a_field_of_every_run_can_be_changed(run, monkeypatch):
    trained = []
    monkeypatch.setattr(stages, "train", lambda runs, seed, rest, _: trained.append((seed, rest)))
    assert run("stages", "geode", "--config.train.steps=3", "--runs", "x")[0] == 0
    assert trained == [(0, ["--config.train.steps=3"])]
