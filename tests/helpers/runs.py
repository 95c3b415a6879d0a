"""Runs small enough for tests: twelve rooms, models of one or two layers, three steps."""

import dataclasses
import importlib
from pathlib import Path

import ml_collections

from configs.hidden_cot import get_config
from geode_jax.sources.rooms.export import make_rooms
from geode_jax.train import train_and_evaluate


@dataclasses.dataclass(frozen=True)
class TinyRun:
    """A finished run, shared by tests: a test that changes it makes a copy first.

    Attributes:
        workdir: folder of the run.
        export: folder of the rooms that it was trained on.
        config: its configuration.
        summary: the content of `summary.json`.
    """

    workdir: Path
    export: Path
    config: ml_collections.ConfigDict
    summary: dict


def tiny_rooms(folder: Path, images: int = 0) -> Path:
    """Makes ten training, two validation and two test scenes in a folder; returns the folder."""
    make_rooms(folder, scenes=12, seed=0, images=images, test_scenes=2, workers=1, progress=False)
    return folder


def tiny_config(export: Path, arg: str = "", **train) -> ml_collections.ConfigDict:
    """Returns the laptop configuration with tiny sizes.

    Args:
        export: folder made by `tiny_rooms`.
        arg: argument of the configuration, such as "thinking=0".
        train: changed fields of `config.train`; by default 3 steps with one evaluation and
            checkpoint at the end.
    """
    config = get_config(arg)
    with config.unlocked():
        config.seed = 2  # with it the untrained student's answers differ
        config.data.update(
            export=str(export),
            scenes_per_batch=2,
            questions_per_scene=4,
            rows_per_scene=2,
            row_length=64,
        )
        config.model.update(
            width=32,
            layers=2,
            heads=2,
            mlp_width=64,
            cross_layers=(0,),
            heads_width=16,
            queries=4,
            detection_layers=1,
        )
        config.train.update({"steps": 3, "eval_every": 3, "checkpoint_every": 3} | train)
        config.eval.update(val_scenes=2, test_scenes=2, examples=2)
    return config


def make_tiny_run(folder: Path) -> TinyRun:
    """Makes rooms and a run on them in a new folder; most of the time is compilation."""
    export, workdir = tiny_rooms(folder / "rooms"), folder / "run"
    config = tiny_config(export)
    return TinyRun(workdir, export, config, train_and_evaluate(config, workdir))


def tiny_geode_config(
    stage: str, export: Path, init_from: Path | str | None = None, arg: str = ""
) -> ml_collections.ConfigDict:
    """Returns the laptop configuration of a stage of GEODE with tiny sizes.

    Args:
        stage: "pretrain", "align", "drm" or "joint".
        export: folder made by `tiny_rooms` with images.
        init_from: the run, or the pretrained folders, that the stage starts from.
        arg: argument of the configuration, such as "drh=off".
    """
    config = importlib.import_module(f"configs.geode_{stage}").get_config(arg)
    with config.unlocked():
        config.init_from = str(init_from or "")
        config.data.update(
            export=str(export), scenes_per_batch=2, questions_per_scene=4, rows_per_scene=2
        )
        config.model.decoder.update(width=32, layers=1, heads=2, kv_heads=1, mlp_width=64)
        config.model.vision.update(width=16, layers=1, heads=2, mlp_width=32)
        config.model.drm.update(width=16, heads=2, bands=2)
        config.model.drh_width = config.model.drh_width and 16
        config.optimizer.name = "adamw"  # compiles faster
        config.train.update(steps=3, eval_every=3, checkpoint_every=3)
        config.eval.update(val_scenes=2, test_scenes=2)
    return config


def make_tiny_geode_runs(folder: Path) -> dict[str, TinyRun]:
    """Makes rooms with pictures and runs of three stages of GEODE, each from the one before."""
    export, before, runs = tiny_rooms(folder / "rooms", images=32), None, {}
    for stage in ("pretrain", "drm", "joint"):
        config, workdir = tiny_geode_config(stage, export, before), folder / stage
        summary = train_and_evaluate(config, workdir)
        runs[stage] = TinyRun(workdir, export, config, summary)
        before = workdir
    return runs
