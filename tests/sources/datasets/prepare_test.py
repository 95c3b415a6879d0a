"""From a data set in its own layout to a trained model, with one command and a run."""

import re

import pytest

from geode_jax.cli.command import main
from geode_jax.errors import UserError
from geode_jax.exports import Export
from geode_jax.sources.datasets import front3d
from geode_jax.sources.datasets.prepare import SOURCES
from tests.sources.datasets.front3d_test import write_front
from tests.sources.datasets.scannet_test import write_scan, write_scannet


def test_the_command_says_what_it_made_and_what_it_left_out(tmp_path, capsys):
    for n in range(3):
        write_scan(tmp_path / "in" / "scans", f"scene{n:04d}_00", seed=n)
    exclude = tmp_path / "vsi.txt"
    exclude.write_text("".join(f"scene{n:04d}_00\n" for n in range(3)))
    given = {"root": tmp_path / "in", "out": tmp_path / "out", "exclude-scenes": exclude}
    arguments = [text for name, value in given.items() for text in (f"--{name}", str(value))]
    (tmp_path / "in" / "scannetv2_train.txt").write_text("scene0000_00\n")  # not asked for
    drawn = ["--views", "2", "--split", "80/20"]
    main(["prepare", "--source", "scannet", *arguments, *drawn])
    printed = capsys.readouterr().out
    assert "1 scenes, " in printed and f"{tmp_path / 'out'}: 1 scenes (1 val)" in printed
    assert "dropped 2: scene: would be trained on" in printed
    exclude.write_bytes(b"\xef\xbb\xbfscene0001_00;scene0002_00\r\n\r\nscene_0000_00\r\n")
    arguments[3] = str(tmp_path / "other")
    with pytest.raises(SystemExit):
        main(["prepare", "--source", "scannet", *arguments, *drawn])
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{exclude}: line 3: 'scene_0000_00' is no scene of {tmp_path / 'in'}" in line
    main(["prepare", "--source", "scannet", *arguments, *drawn, "--allow-missing"])
    printed = capsys.readouterr().out
    assert "dropped 1: entry of --exclude-scenes: names no scene of" in printed
    splits = {e["id"]: e["split"] for e in Export(tmp_path / "other").manifest["scenes"]}
    assert not {"scene0001_00", "scene0002_00"} & {s for s, p in splits.items() if p == "train"}


def test_an_unknown_source_is_refused_with_the_known_ones(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["prepare", "--source", "x", "--root", str(tmp_path), "--out", str(tmp_path / "out")])
    (line,) = capsys.readouterr().err.splitlines()
    assert all(name in line for name in SOURCES)


@pytest.mark.parametrize(
    ("source", "arguments", "rule"),
    [
        ("scannet", ["--part", "train"], "--part: ScanNet has none"),
        ("scannet", ["--scenes", "export"], "--scenes: ScanNet has scenes of its own"),
        ("3d-front", ["--part", "train"], "--part: 3D-FRONT has none"),
        ("3d-front", ["--scenes", "export"], "--scenes: 3D-FRONT has scenes of its own"),
        ("3d-front", ["--grid", "4", "8"], "--grid: the views are square"),
        ("scanqa", [], "--scenes: scanqa asks about scenes"),
        ("scanqa", ["--part", "x"], "--part: scanqa has no part 'x'|--scenes: scanqa asks"),
        ("scannet", ["--seed", "-1"], "is not from 0 to"),
        ("scannet", ["--views", "0"], "0 is less than 1"),
        ("3d-front", ["--split", "80-20"], "--split: '80-20' is not percentages"),
        ("scanqa", ["--split", "80/20"], "--split: scanqa has its own splits or those of --scenes"),
    ],
)
def test_what_a_source_does_not_know_is_refused(tmp_path, capsys, source, arguments, rule):
    places = ["--root", str(tmp_path), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as end:
        main(["prepare", "--source", source, *places, *arguments])
    assert end.value.code == 2 and re.search(rule, capsys.readouterr().err.splitlines()[-1])
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "write"), [("scannet", write_scannet), ("3d-front", write_front)]
)
def test_one_command_makes_what_a_run_trains_on(tmp_path, monkeypatch, source, write):
    from geode_jax.train import train_and_evaluate
    from tests.helpers.runs import tiny_config

    monkeypatch.setattr(front3d, "IMAGE_SIDE", 32)
    root, out = write(tmp_path / "in"), tmp_path / "export"
    main(["prepare", "--source", source, "--root", str(root), "--out", str(out), "--views", "3"])
    epoch = len(Export(out).scene_ids("train")) // 2
    config = tiny_config(out, steps=epoch, eval_every=epoch, checkpoint_every=epoch)
    with config.unlocked():
        config.data.row_length = 128
        config.optimizer.name = "adamw"  # compiles faster
    with pytest.raises(UserError, match=r"export_vggt\.py --export .* data.stand_in_tokens=True"):
        train_and_evaluate(config, tmp_path / "run")
    config.data.stand_in_tokens = True
    with pytest.raises(UserError, match="depth_kl learns from teacher/depth_bins; feature"):
        train_and_evaluate(config, tmp_path / "run")
    config.data.on_missing_targets = "skip"
    summary = train_and_evaluate(config, tmp_path / "run")
    assert summary["train"]["steps"] == epoch and summary["train"]["skipped_steps"] == 0
    assert summary["scores"]["model"]["questions"] > 10
