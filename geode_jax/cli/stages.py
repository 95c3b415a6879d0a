"""`geode-jax stages`: trains GEODE's stages in order, alone or for the four rows of Table 4.

Every run is a process of its own, `python -m geode_jax.main`, that starts from the folder of the
stage before. The same command again continues: a run that has ended is not trained again. The rows
of Table 4 share the stages before the last: these have no regression head, and a row without the
rationale module starts from the stage before that module's. `geode` and `table4` share the runs of
seed 0.
"""

import argparse
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from geode_jax.cli.options import Commands, add_command
from geode_jax.errors import UserError

# What imports JAX is imported where it runs, so that the help of all commands stays fast.

ROWS = {
    "neither": "drm=off,drh=off",
    "regression head": "drm=off",
    "rationale module": "drh=off",
    "both": "",
}
"""Row of Table 4 -> argument of `configs/geode_joint.py`."""

BLIND = "vision=off"
"""Argument of the model that is trained without vision, for comparison."""


class StageRun(NamedTuple):
    """One run.

    Attributes:
        stage: "pretrain", "align", "drm" or "joint".
        arg: argument of the stage's configuration.
        folder: work directory.
        start: work directory of the run that it starts from; None: from scratch.
    """

    stage: str
    arg: str
    folder: Path
    start: Path | None


def plan(runs: Path, seed: int, args: tuple[str, ...]) -> list[StageRun]:
    """Returns the runs of a seed, the blind one included, each after the run it starts from.

    Args:
        runs: folder of all runs; those of a seed other than 0 are in a subfolder.
        seed: of these runs.
        args: arguments of `geode_joint`, one for each run of the last stage.
    """
    root = runs / f"seed_{seed}" if seed else runs
    pretrain, align, drm = (root / f"geode_{stage}" for stage in ("pretrain", "align", "drm"))

    def joint(arg: str) -> StageRun:
        name = "-".join(["geode_joint", *filter(None, arg.split(","))])
        without = arg == BLIND or "drm=off" in arg
        return StageRun("joint", arg, root / name, align if without else drm)

    return [
        StageRun("pretrain", "", pretrain, None),
        StageRun("align", "", align, pretrain),
        joint(BLIND),
        StageRun("drm", "", drm, align),
        *map(joint, args),
    ]


def command(run: StageRun, seed: int, rest: list[str]) -> list[str]:
    """Returns the command line of a run."""
    arg = f":{run.arg}" if run.arg else ""
    blind = run.folder.parent / f"geode_joint-{BLIND}"
    return [
        *(sys.executable, "-m", "geode_jax.main"),
        f"--config=geode_{run.stage}{arg}",
        f"--workdir={run.folder}",
        f"--config.seed={seed}",
        f"--config.init_from={run.start or ''}",
        f"--config.eval.blind={blind}",
        *rest,
    ]


def train(runs: list[StageRun], seed: int, rest: list[str]) -> None:
    """Trains one run after the other.

    Raises:
        SystemExit: a run failed. It has printed its error; the exit status is that of the run.
    """
    for run in runs:
        argv = command(run, seed, rest)
        print(f"\n== {shlex.join(['python', *argv[1:]])}", flush=True)
        done = subprocess.run(argv, check=False).returncode
        if done:
            raise SystemExit(done)


def table4(runs: Path, seeds: list[int]) -> dict[str, dict]:
    """Returns VSI-Bench's scores of the rows' finished runs, for each seed and as `mean` over them.

    The blind model and the frequency baseline are rows, too.
    """
    from geode_jax.runs.summary import read_ended

    rows: dict[str, dict] = {}
    for seed in seeds:
        joint = [run for run in plan(runs, seed, tuple(ROWS.values())) if run.stage == "joint"]
        summaries = [read_ended(run.folder) for run in joint]
        for name, summary in zip(("blind", *ROWS), summaries, strict=True):
            rows.setdefault(name, {})[f"seed {seed}"] = summary["vsi"]["model"]
        rows.setdefault("frequency", {})[f"seed {seed}"] = summaries[-1]["vsi"]["frequency"]
    for scores in rows.values():
        scores["mean"] = _mean(list(scores.values()))
    return rows


def _mean(scores: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns the mean of every number; a number that one of the scores lacks is left out."""
    out = {}
    for key, first in scores[0].items():
        values: list[Any] = [score.get(key) for score in scores]
        if isinstance(first, dict):
            out[key] = _mean(values)
        elif all(isinstance(value, int | float) for value in values):
            out[key] = sum(values) / len(values)
    return out


def add_commands(commands: Commands) -> None:
    """Adds the command of this file."""
    parser = add_command(
        commands,
        "stages",
        _stages,
        "Train GEODE's stages one after the other.\n\n"
        "geode trains all stages and a blind model; table4 trains the four rows of Table 4 and\n"
        "prints it. The same command again continues where it stopped. --config.FIELD=VALUE\n"
        "changes a field of every run.",
        "geode-jax stages geode\n"
        "geode-jax stages table4 --seeds 0,1 --runs runs/table4 --config.train.steps=100",
    )
    parser.add_argument("what", choices=("geode", "table4"), help="the runs to train")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs"), metavar="DIR", help="default: runs"
    )
    parser.add_argument("--seeds", default="0,1", metavar="LIST", help="of table4; default: 0,1")


def _stages(arguments: argparse.Namespace) -> None:
    from geode_jax.evaluate import vsi_bench
    from geode_jax.training.metrics import write_json

    runs, overrides = arguments.runs, arguments.overrides
    if arguments.what == "geode":
        train(plan(runs, 0, ("",)), 0, overrides)
        return
    try:
        seeds = [int(seed) for seed in arguments.seeds.split(",")]
    except ValueError:
        raise UserError(
            f"--seeds: {arguments.seeds} is not a list of numbers with commas between"
        ) from None
    for seed in seeds:
        train(plan(runs, seed, tuple(ROWS.values())), seed, overrides)
    rows = table4(runs, seeds)
    for column in (*(f"seed {seed}" for seed in seeds), "mean"):
        print(f"\nTable 4, {column}")
        print(vsi_bench.table({name: scores[column] for name, scores in rows.items()}))
    write_json(runs / "table4.json", rows)
    print(f"\n{runs / 'table4.json'}")
