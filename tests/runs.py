"""A run small enough for tests: twelve rooms, a student of two layers, three steps."""

import dataclasses
from pathlib import Path

import ml_collections

from configs.hidden_cot import get_config
from geode_jax.data.rooms import make_rooms
from geode_jax.train import train_and_evaluate


@dataclasses.dataclass(frozen=True)
class TinyRun:
    """A finished run; read only: whoever breaks it makes a copy first.

    Attributes:
        workdir: its folder.
        export: the rooms it learned from.
        config: what it was started with.
        summary: the content of `summary.json`.
    """

    workdir: Path
    export: Path
    config: ml_collections.ConfigDict
    summary: dict


def tiny_rooms(folder: Path) -> Path:
    """Ten training and two val scenes and two test scenes."""
    make_rooms(folder, scenes=12, seed=0, test_scenes=2, workers=1, progress=False)
    return folder


def tiny_config(export: Path, arg: str = "", **train) -> ml_collections.ConfigDict:
    """The laptop configuration, made tiny.

    Args:
        export: of `tiny_rooms`.
        arg: as on the command line, "thinking=0" for example.
        train: fields of `config.train` beside 3 steps with one evaluation and checkpoint at the
            end.
    """
    config = get_config(arg)
    with config.unlocked():
        config.seed = 2  # whose untrained student does not say the same to everything
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
    """Rooms and a run on them in a new folder; most of its time is compiling."""
    export, workdir = tiny_rooms(folder / "rooms"), folder / "run"
    config = tiny_config(export)
    return TinyRun(workdir, export, config, train_and_evaluate(config, workdir))
