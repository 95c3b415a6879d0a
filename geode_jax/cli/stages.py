"""`geode-jax stages`: trains GEODE's stages in order, alone or for the four rows of Table 4.

Every run is a process of its own, `python -m geode_jax.main`, that starts from the folder of the
stage before. The same command again continues: a run that has ended is not trained again. The rows
of Table 4 share the stages before the last: these have no regression head, and a row without the
rationale module starts from the stage before that module's. `geode` and `table4` share the runs of
seed 0.

At the paper's size, `:full`, the first stage starts from pretrained folders instead of a run of
`geode_pretrain`, and the stages learn from exports that are given.
"""

import argparse
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
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


FULL = "full"
"""Size of the paper, in the arguments of the configurations."""


class StageRun(NamedTuple):
    """One run.

    Attributes:
        stage: "pretrain", "align", "drm" or "joint".
        arg: argument of the stage's configuration.
        folder: work directory.
        start: work directory of the run that it starts from, or pretrained folders with commas
            between; "": from scratch.
    """

    stage: str
    arg: str
    folder: Path
    start: str


class Inputs(NamedTuple):
    """What the runs at the paper's size need; at the laptop's they need nothing.

    Attributes:
        pretrained: folders of the pretrained decoder and vision encoder, commas between; "" for
            the laptop's size.
        exports: stage -> folder of the export that it learns from.
    """

    pretrained: str = ""
    exports: Mapping[str, str] = {}


LAPTOP = Inputs()


def plan(runs: Path, seed: int, args: tuple[str, ...], inputs: Inputs = LAPTOP) -> list[StageRun]:
    """Returns the runs of a seed, the blind one included, each after the run it starts from.

    Args:
        runs: folder of all runs; those of a seed other than 0 are in a subfolder.
        seed: of these runs.
        args: arguments of `geode_joint`, one for each run of the last stage.
        inputs: of the paper's size.
    """
    root = runs / f"seed_{seed}" if seed else runs
    size = [FULL] if inputs.pretrained else []
    pretrain, align, drm = (
        root / "-".join([f"geode_{stage}", *size]) for stage in ("pretrain", "align", "drm")
    )

    def sized(arg: str) -> list[str]:
        return [*size, *filter(None, arg.split(","))]

    def joint(arg: str) -> StageRun:
        name = "-".join(["geode_joint", *sized(arg)])
        without = arg == BLIND or "drm=off" in arg
        return StageRun("joint", ",".join(sized(arg)), root / name, str(align if without else drm))

    first = [] if inputs.pretrained else [StageRun("pretrain", "", pretrain, "")]
    start = inputs.pretrained or str(pretrain)
    return [
        *first,
        StageRun("align", ",".join(size), align, start),
        joint(BLIND),
        StageRun("drm", ",".join(size), drm, str(align)),
        *map(joint, args),
    ]


def command(run: StageRun, seed: int, rest: list[str], inputs: Inputs = LAPTOP) -> list[str]:
    """Returns the command line of a run."""
    arg = f":{run.arg}" if run.arg else ""
    blind = run.folder.parent / "-".join(
        ["geode_joint", *([FULL] if inputs.pretrained else []), BLIND]
    )
    given = [f"--config.data.export={inputs.exports[run.stage]}"] if inputs.exports else []
    if run.start == inputs.pretrained != "":
        given.append(f"--config.tokenizer={inputs.pretrained.partition(',')[0]}")
    return [
        *(sys.executable, "-m", "geode_jax.main"),
        f"--config=geode_{run.stage}{arg}",
        f"--workdir={run.folder}",
        f"--config.seed={seed}",
        f"--config.init_from={run.start}",
        f"--config.eval.blind={blind}",
        *given,
        *rest,
    ]


def train(runs: list[StageRun], seed: int, rest: list[str], inputs: Inputs = LAPTOP) -> None:
    """Trains one run after the other.

    Raises:
        SystemExit: a run failed. It has printed its error; the exit status is that of the run.
    """
    for run in runs:
        argv = command(run, seed, rest, inputs)
        print(f"\n== {shlex.join(['python', *argv[1:]])}", flush=True)
        done = subprocess.run(argv, check=False).returncode
        if done:
            raise SystemExit(done)


def table4(runs: Path, seeds: list[int], inputs: Inputs = LAPTOP) -> dict[str, dict]:
    """Returns VSI-Bench's scores of the rows' finished runs, for each seed and as `mean` over them.

    The blind model and the frequency baseline are rows, too.
    """
    from geode_jax.runs.summary import read_ended

    rows: dict[str, dict] = {}
    for seed in seeds:
        planned = plan(runs, seed, tuple(ROWS.values()), inputs)
        joint = [run for run in planned if run.stage == "joint"]
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
        "changes a field of every run.\n\n"
        "geode:full and table4:full train the paper's sizes. They start from pretrained folders,\n"
        "and each stage learns from the export that is given for it.",
        "geode-jax stages geode\n"
        "geode-jax stages table4 --seeds 0,1 --runs runs/table4 --config.train.steps=100\n"
        "geode-jax stages table4:full \\\n"
        "    --pretrained Qwen2.5-1.5B-Instruct,InternViT-300M-448px-V2_5 \\\n"
        "    --export align=data/stage0 --export drm=data/stage1 --export joint=data/stage2 \\\n"
        "    --config.data.fraction=0.1",
    )
    parser.add_argument(
        "what",
        choices=("geode", "table4", f"geode:{FULL}", f"table4:{FULL}"),
        help="the runs to train",
    )
    parser.add_argument(
        "--pretrained",
        default="",
        metavar="DIR[,DIR]",
        help="full: folders of the decoder, whose tokenizer is used, and of the vision encoder",
    )
    parser.add_argument(
        "--export",
        action="append",
        default=[],
        metavar="[STAGE=]DIR",
        help="full: export that the stages align, drm and joint, or one of them, learn from",
    )
    parser.add_argument(
        "--runs", type=Path, default=Path("runs"), metavar="DIR", help="default: runs"
    )
    parser.add_argument("--seeds", default="0,1", metavar="LIST", help="of table4; default: 0,1")


def _stages(arguments: argparse.Namespace) -> None:
    from geode_jax.evaluate import vsi_bench
    from geode_jax.training.metrics import write_json

    runs, overrides = arguments.runs, arguments.overrides
    what, _, size = arguments.what.partition(":")
    inputs = _inputs(size, arguments.pretrained, arguments.export)
    if what == "geode":
        train(plan(runs, 0, ("",), inputs), 0, overrides, inputs)
        return
    try:
        seeds = [int(seed) for seed in arguments.seeds.split(",")]
    except ValueError:
        raise UserError(
            f"--seeds: {arguments.seeds} is not a list of numbers with commas between"
        ) from None
    for seed in seeds:
        train(plan(runs, seed, tuple(ROWS.values()), inputs), seed, overrides, inputs)
    rows = table4(runs, seeds, inputs)
    for column in (*(f"seed {seed}" for seed in seeds), "mean"):
        print(f"\nTable 4, {column}")
        print(vsi_bench.table({name: scores[column] for name, scores in rows.items()}))
    out = runs / ("table4-full.json" if size else "table4.json")
    write_json(out, rows)
    print(f"\n{out}")


def _inputs(size: str, pretrained: str, exports: list[str]) -> Inputs:
    """Returns the inputs of the paper's size.

    Raises:
        UserError: an input is missing, unknown, or given for the laptop's size.
    """
    stages = ("align", "drm", "joint")
    if not size:
        if pretrained or exports:
            raise UserError("--pretrained, --export: are for geode:full and table4:full")
        return LAPTOP
    if not pretrained:
        raise UserError("--pretrained: is needed, the folders of the decoder and vision encoder")
    found: dict[str, str] = {}
    for text in exports:
        stage, equals, folder = text.partition("=")
        if equals and stage not in stages:
            raise UserError(f"--export: {text}: {stage!r} is not one of {', '.join(stages)}")
        found |= {stage: folder} if equals else dict.fromkeys(stages, text)
    missing = [stage for stage in stages if stage not in found]
    if missing:
        raise UserError(f"--export: is missing for {', '.join(missing)}")
    return Inputs(pretrained, found)
