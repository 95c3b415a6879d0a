"""A run's folder and its export: moved, replaced, or with files that are gone."""

import copy
import math
import shutil
from pathlib import Path

import pytest

from geode_jax.errors import UserError
from geode_jax.exports.files import read_json_object, write_json
from geode_jax.runs import identity
from geode_jax.runs.config import load_settings, make_settings
from geode_jax.runs.trained import open_trained
from geode_jax.train import find_ended, train_and_evaluate, update_best


def started(tiny_run, folder: Path, export: Path | str):
    """A copy of the finished run, and the configuration that names another place."""
    shutil.copytree(tiny_run.workdir, folder)
    config = copy.deepcopy(tiny_run.config)
    config.data.export = str(export)
    return config


def test_an_export_that_moved_is_the_same(tiny_run, tmp_path, capsys):
    moved = tmp_path / "moved"
    shutil.copytree(tiny_run.export, moved)
    manifest = read_json_object(moved / "manifest.json")
    # Made again at another time.
    write_json(moved / "manifest.json", manifest | {"created": "2000-01-01T00:00:00+00:00"})
    config = started(tiny_run, tmp_path / "run", f"{moved}/")
    assert train_and_evaluate(config, tmp_path / "run") == tiny_run.summary
    assert "the run has ended already" in capsys.readouterr().out
    assert load_settings(tmp_path / "run").data.export == f"{moved}/"


def test_another_export_at_the_same_place_is_refused(tiny_run, tmp_path, capsys):
    other = tmp_path / "export"
    shutil.copytree(tiny_run.export, other)
    manifest = read_json_object(other / "manifest.json")
    trained, tested = manifest["scenes"][0], manifest["scenes"][-1]
    trained["split"], tested["split"] = tested["split"], trained["split"]
    write_json(other / "manifest.json", manifest)
    workdir = tmp_path / "run"
    config = started(tiny_run, workdir, other)
    write_json(workdir / "config.json", config.to_dict())  # as if it had stood there all along
    for _ in range(2):  # a run that has ended, and one that has not
        with pytest.raises(UserError, match=r"14 scenes, .* checksum .*14 scenes, .* checksum"):
            train_and_evaluate(config, workdir)
        (workdir / "summary.json").unlink(missing_ok=True)
    open_trained(workdir)
    assert "made with another export" in capsys.readouterr().err
    with pytest.raises(UserError, match="made with another export"):
        open_trained(workdir, same_export=True)


def test_an_ended_run_says_what_is_gone(tiny_run, tmp_path, capsys):
    workdir, config = tmp_path / "run", tiny_run.config
    shutil.copytree(tiny_run.workdir, workdir)
    (workdir / "report.html").unlink()
    (workdir / "predictions.jsonl").write_text("damaged")
    assert find_ended(make_settings(config), workdir) is None  # it is evaluated again
    out = capsys.readouterr().out
    assert "report.html is missing" in out and "predictions.jsonl is not what was written" in out
    shutil.rmtree(workdir / "checkpoints")
    assert train_and_evaluate(config, workdir) == tiny_run.summary
    out = capsys.readouterr().out
    assert "it has no checkpoint" in out and str(workdir / "report.html") not in out


@pytest.mark.parametrize("gone", [("config.json",), ("config.json", "summary.json")])
def test_a_run_without_its_configuration_is_refused(tiny_run, tmp_path, gone):
    shutil.copytree(tiny_run.workdir, tmp_path / "run")
    for name in gone:
        (tmp_path / "run" / name).unlink()
    with pytest.raises(UserError, match=r"config\.json: missing, though the folder has a run's"):
        train_and_evaluate(tiny_run.config, tmp_path / "run")


def test_a_loss_that_is_not_finite_is_never_best(capsys):
    position = {"step": 1, "best": {}, "worse": 0, "stopped_early": False}
    losses = [math.nan, math.inf, 3.0, math.nan, 2.0]
    found = [update_best({"val/loss": loss}, "loss", position, 9) for loss in losses]
    assert found == [False, False, True, False, True]
    assert position["best"] == {"val/loss": 2.0}
    assert capsys.readouterr().out.count("there is no best yet") == 2
    position["best"] = {"val/loss": math.nan}  # of before such losses were refused
    assert update_best({"val/loss": 5.0}, "loss", position, 9)


@pytest.mark.parametrize("section", ["data", "loss", "model"])
def test_a_run_saved_before_a_field_existed_goes_on(tiny_run, tmp_path, section):
    workdir, now = tmp_path / "run", make_settings(tiny_run.config)
    shutil.copytree(tiny_run.workdir, workdir)
    saved = read_json_object(workdir / "config.json")
    later = {name.split("/")[1] for name in identity.LATER}
    gone = later & saved[section].keys()
    assert gone
    for name in gone:
        del saved[section][name]
    write_json(workdir / "config.json", saved)
    assert find_ended(now, workdir)["scores"] == tiny_run.summary["scores"]
    assert identity.made_with(load_settings(workdir), None) == identity.made_with(now, None)
    name = min(gone)
    other = 0.5 if name == "cross_view_weight" else not identity.LATER[f"{section}/{name}"]
    write_json(workdir / "config.json", saved | {section: saved[section] | {name: other}})
    with pytest.raises(UserError, match=f"holds a run with {section}/{name} = {other}, not"):
        find_ended(now, workdir)
