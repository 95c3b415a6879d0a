"""GEODE's stages one after the other: all of them, or the four rows of Table 4.

    python -m geode_jax.cli.stages geode  [--runs=FOLDER] [--config.FIELD=VALUE ...]
    python -m geode_jax.cli.stages table4 [--runs=FOLDER] [--seeds=0,1] [--config.FIELD=VALUE ...]

Every run is a process of its own, `python -m geode_jax.main` with the folder of the stage before.
The same command again goes on where it stood: a run that has ended is not trained again. Rows of
Table 4 share the stages before the last, which have neither a regression head nor, where a row
goes without the rationale module, that module; and with `geode` the runs of seed 0.
"""

import argparse
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from geode_jax.errors import UserError, reported
from geode_jax.evaluate import vsi_bench
from geode_jax.runs.summary import read_ended
from geode_jax.training.metrics import write_json

ROWS = {
    "neither": "drm=off,drh=off",
    "regression head": "drm=off",
    "rationale module": "drh=off",
    "both": "",
}
"""Rows of Table 4 -> what is off."""
BLIND = "vision=off"


class StageRun(NamedTuple):
    """One run.

    Attributes:
        stage: "pretrain", "align", "drm" or "joint".
        arg: of the stage's config file.
        folder: work directory.
        start: the run that it starts from; None: from scratch.
    """

    stage: str
    arg: str
    folder: Path
    start: Path | None


def plan(runs: Path, seed: int, args: tuple[str, ...]) -> list[StageRun]:
    """The runs of a seed, the blind one too, in the order in which each finds its start.

    Args:
        runs: folder of all seeds; another seed than 0 has a folder of its own in it.
        seed: of these runs.
        args: of `geode_joint`, one of each run of the last stage.
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
    """The command line of a run."""
    arg = f":{run.arg}" if run.arg else ""
    blind = run.folder.parent / f"geode_joint-{BLIND}"
    return [
        *(sys.executable, "-m", "geode_jax.main"),
        f"--config=configs/geode_{run.stage}.py{arg}",
        f"--workdir={run.folder}",
        f"--config.seed={seed}",
        f"--config.init_from={run.start or ''}",
        f"--config.eval.blind={blind}",
        *rest,
    ]


def train(runs: list[StageRun], seed: int, rest: list[str]) -> None:
    """Trains one run after the other.

    Raises:
        SystemExit: one failed; its own words stand above, the status is its own.
    """
    for run in runs:
        argv = command(run, seed, rest)
        print(f"\n== {shlex.join(['python', *argv[1:]])}", flush=True)
        done = subprocess.run(argv, check=False).returncode
        if done:
            raise SystemExit(done)


def table4(runs: Path, seeds: list[int]) -> dict[str, dict]:
    """VSI-Bench's scores of the rows' finished runs, by seed and, as `mean`, over the seeds.

    Beside the rows stand the blind model and the frequency baseline.
    """
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


def _mean(scores: list[dict]) -> dict:
    """Entry-wise; what is missing in one is missing."""
    out = {}
    for key, first in scores[0].items():
        values = [score.get(key) for score in scores]
        if isinstance(first, dict):
            out[key] = _mean(values)
        elif all(isinstance(value, int | float) for value in values):
            out[key] = sum(values) / len(values)
    return out


def main(argv: list[str]) -> None:
    """Trains what is asked for, and prints Table 4."""
    parser = argparse.ArgumentParser(
        prog="geode_jax.cli.stages", description=__doc__.split("\n")[0]
    )
    parser.add_argument("what", choices=("geode", "table4"))
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--seeds", default="0,1")
    asked, rest = parser.parse_known_args(argv)
    if asked.what == "geode":
        train(plan(asked.runs, 0, ("",)), 0, rest)
        return
    try:
        seeds = [int(seed) for seed in asked.seeds.split(",")]
    except ValueError:
        raise UserError(f"--seeds: {asked.seeds} is not numbers with commas between") from None
    for seed in seeds:
        train(plan(asked.runs, seed, tuple(ROWS.values())), seed, rest)
    rows = table4(asked.runs, seeds)
    for column in (*(f"seed {seed}" for seed in seeds), "mean"):
        print(f"\nTable 4, {column}")
        print(vsi_bench.table({name: scores[column] for name, scores in rows.items()}))
    write_json(asked.runs / "table4.json", rows)
    print(f"\n{asked.runs / 'table4.json'}")


if __name__ == "__main__":
    with reported():
        main(sys.argv[1:])
