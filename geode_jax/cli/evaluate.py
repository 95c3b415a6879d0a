"""`geode-jax evaluate`: benchmark scores of a trained run or of a file of predictions."""

import argparse
import os
from pathlib import Path
from typing import Any

from geode_jax.cli.options import Commands, add_command, add_gpu_kernels, positive
from geode_jax.errors import UserError

_PREDICTIONS_OPTIONS = ("dataset", "debiased_ids", "allow_missing")
_PREDICTIONS_OPTIONS += ("revision", "frames", "decoding")
_RUN_OPTIONS = ("export", "spatio", "gpu_kernels")
_TEXT_OPTIONS = ("dataset", "revision", "frames", "decoding")


def add_commands(commands: Commands) -> None:
    """Adds the command of this file."""
    parser = add_command(
        commands,
        "evaluate",
        _evaluate,
        "Score a trained run or a file of predictions on a benchmark.\n\n"
        "vsi is VSI-Bench; text is ScanQA and SQA3D, which score --predictions only. Predictions\n"
        "of any model are JSON lines with an id and a prediction.",
        "geode-jax evaluate vsi --workdir runs/geode_joint\n"
        "geode-jax evaluate vsi --workdir runs/geode_joint --export data/vsi-bench\n"
        "geode-jax evaluate vsi --predictions answers.jsonl --dataset test.jsonl\n"
        "geode-jax evaluate text --predictions answers.jsonl --dataset ScanQA_v1.0_val.json",
    )
    parser.add_argument("benchmark", choices=("vsi", "text"), help="the benchmark")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--predictions", type=Path, metavar="FILE", help="JSON lines: id, prediction"
    )
    source.add_argument("--workdir", type=Path, metavar="RUN", help="predict with a trained run")
    add = parser.add_argument
    add(
        "--export",
        type=Path,
        metavar="DIR",
        help="export whose test split is asked; default: the run's own",
    )
    add("--spatio", type=int, choices=(4, 8, 16), help="number of the run's rationale tokens")
    add(
        "--dataset",
        type=Path,
        metavar="FILE",
        help="rows or questions of the benchmark; default: the predictions have them",
    )
    add("--debiased-ids", type=Path, metavar="FILE", help="list: score these questions only")
    add(
        "--allow-missing",
        action="store_true",
        help="count entries of that list that are no id, instead of refusing them",
    )
    add("--blind", type=Path, metavar="FILE", help="predictions made without frames, to compare")
    add(
        "--out",
        type=Path,
        metavar="FILE",
        help="result; default: RUN/vsi.json, or PREDICTIONS with .vsi.json or .text.json",
    )
    add("--revision", metavar="TEXT", help="revision of the dataset, noted in the result")
    add("--frames", type=positive, metavar="N", help="frames of a video, noted in the result")
    add("--decoding", metavar="TEXT", help="such as greedy, noted in the result")
    add_gpu_kernels(parser)


def _evaluate(arguments: argparse.Namespace) -> None:
    from geode_jax.evaluate import text_answers, vsi_bench

    if arguments.benchmark == "text":
        unused = ("workdir", *_RUN_OPTIONS, "debiased_ids", "allow_missing", "blind")
        _refuse_options(arguments, unused, "evaluate text")
        (result, out), table = _score_text(arguments), text_answers.table
    elif arguments.workdir is not None:
        _refuse_options(arguments, _PREDICTIONS_OPTIONS, "--workdir")
        (result, out), table = _score_run(arguments), vsi_bench.table
    else:
        _refuse_options(arguments, _RUN_OPTIONS, "--predictions")
        (result, out), table = _score_predictions(arguments), vsi_bench.table
    print(table(result["scores"]))
    print("\n".join(f"note: {note}" for note in result["notes"]))
    print(f"result: {out}")


def _score_text(arguments: argparse.Namespace) -> tuple[dict[str, Any], Path]:
    """Returns the scores of text answers, and the file that they were written to."""
    from geode_jax.evaluate import text_answers
    from geode_jax.training.metrics import write_json

    predictions = arguments.predictions
    options = {name: getattr(arguments, name) for name in _TEXT_OPTIONS}
    out = arguments.out or predictions.parent / f"{predictions.stem}.text.json"
    _refuse_input(out, [path for path in (predictions, arguments.dataset) if path])
    result = text_answers.evaluate(predictions, **options)
    write_json(out, result)
    return result, out


def _score_run(arguments: argparse.Namespace) -> tuple[dict[str, Any], Path]:
    """Returns the VSI-Bench scores of a run's model, and the file that they were written to."""
    from geode_jax.ops.gpu import use_kernels
    from geode_jax.results.vsi import evaluate_run

    workdir, export = arguments.workdir, arguments.export
    out = arguments.out or workdir / "vsi.json"
    inputs = [arguments.blind, export / "manifest.json" if export else None]
    _refuse_input(out, [path for path in inputs if path])
    with use_kernels(arguments.gpu_kernels):
        return evaluate_run(
            workdir, out, export=export, spatio=arguments.spatio, blind=arguments.blind
        ), out


def _score_predictions(arguments: argparse.Namespace) -> tuple[dict[str, Any], Path]:
    """Returns the VSI-Bench scores of predictions, and the file that they were written to."""
    from geode_jax.evaluate import vsi_bench
    from geode_jax.training.metrics import write_json

    predictions = arguments.predictions
    options = {name: getattr(arguments, name) for name in ("blind", *_PREDICTIONS_OPTIONS)}
    out = arguments.out or predictions.parent / f"{predictions.stem}.vsi.json"
    paths = [path for path in options.values() if isinstance(path, Path)]
    _refuse_input(out, [predictions, *paths])
    result = vsi_bench.evaluate(predictions, **options)
    write_json(out, result)
    return result, out


def _refuse_options(arguments: argparse.Namespace, names: tuple[str, ...], other: str) -> None:
    for name in names:
        if getattr(arguments, name) not in (None, False):
            raise UserError(f"--{name.replace('_', '-')}: does not go with {other}")


_RUN_FILES = ("config.json", "summary.json", "metrics.jsonl", "predictions.jsonl", "report.html")


def _refuse_input(out: Path, inputs: list[Path]) -> None:
    """Refuses a result in place of a file that is read, or that a training run has written."""
    place = Path(os.path.realpath(out))
    if place.name in _RUN_FILES and (place.parent / "config.json").exists():
        raise UserError(f"--out: {out} is a file of a run")
    if os.path.realpath(out) in map(os.path.realpath, inputs):
        raise UserError(f"--out: {out} is one of the files to read")
