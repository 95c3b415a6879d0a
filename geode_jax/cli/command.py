"""The command `geode-jax`: data, questions to a trained run, benchmark scores, weights.

    geode-jax validate DIR                      is this folder a good export?
    geode-jax rooms --scenes 100 --out DIR      an export of synthetic rooms
    geode-jax rgbd --source DIR --out DIR       an export of a real RGB-D folder
    geode-jax prepare --source scannet --root DIR --out DIR     an export of a data set
    geode-jax scenes --workdir RUN              what can be asked about
    geode-jax ask --workdir RUN --scene ID --question "How many chair(s) are in this room?"
    geode-jax evaluate vsi --workdir RUN                        a run's score on VSI-Bench's tasks
    geode-jax evaluate vsi --predictions FILE --dataset FILE    the score of any model's answers
    geode-jax evaluate text --predictions FILE --dataset FILE   the same on ScanQA and SQA3D
    geode-jax convert import --source DIR --out DIR     a Hugging Face folder -> a checkpoint
    geode-jax convert export --source DIR --out DIR     a checkpoint -> a Hugging Face folder
    geode-jax convert export --workdir RUN --out DIR    a trained run -> a Hugging Face folder
    geode-jax convert inspect DIR                       what a Hugging Face folder holds
    geode-jax plan --config FILE:ARG --topology v5p:4x4x4   what a run needs, before it is paid for

Whatever the user can mend is one line on stderr and exit status 2.
"""

import argparse
import contextlib
import json
import os
import sys
import time
from pathlib import Path
from typing import NoReturn

# Quiet by default, as in geode_jax.main.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from geode_jax import exports
from geode_jax.errors import UserError, one_line, refuse_undecodable, reported

# A command imports what it needs when it runs: checking a folder shall not wait for JAX.


def main(argv: list[str] | None = None) -> None:
    """Runs the command of `argv` (`sys.argv` where None); exits with 2 on an error."""
    argv = sys.argv[1:] if argv is None else argv
    with reported():
        refuse_undecodable(argv)
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.command is None:
        parser.print_help(sys.stderr)
        sys.exit(2)
    with reported():
        arguments.run(arguments)


def _validate(arguments: argparse.Namespace) -> None:
    on_error = "skip" if arguments.skip else "stop"
    summary = exports.validate(arguments.folder, on_error=on_error, progress=True)
    print(exports.format_summary(summary))


def _rooms(arguments: argparse.Namespace) -> None:
    from geode_jax.sources.rooms.export import make_rooms

    started = time.monotonic()
    try:
        with _making(arguments.out):
            make_rooms(
                arguments.out,
                scenes=arguments.scenes,
                seed=arguments.seed,
                images=arguments.images,
                workers=arguments.workers,
            )
    except exports.ExportError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from None
    print(_made(arguments.out, started))


def _rgbd(arguments: argparse.Namespace) -> None:
    from geode_jax.sources.rgbd.export import make_rgbd_export

    started = time.monotonic()
    with _making(arguments.out):
        make_rgbd_export(  # says what was dropped and why, on stderr
            arguments.source,
            arguments.out,
            views_per_scene=arguments.views,
            patch_grid=tuple(arguments.grid),
            questions_per_scene=arguments.questions,
            max_frames=arguments.max_frames,
            intrinsic=arguments.intrinsic,
            depth_scale=arguments.depth_scale,
            seed=arguments.seed,
        )
    print(_made(arguments.out, started))


def _prepare(arguments: argparse.Namespace) -> None:
    from geode_jax.sources.datasets import Request
    from geode_jax.sources.datasets.prepare import prepare

    started = time.monotonic()
    exclude = arguments.exclude_scenes
    request = Request(
        arguments.root,
        arguments.out,
        arguments.scenes,
        tuple(arguments.part or ()),
        tuple(exports.files.read_list(exclude)) if exclude else (),
        arguments.views,
        tuple(arguments.grid),
        arguments.seed,
        arguments.allow_missing,
    )
    with _making(arguments.out):
        report = prepare(arguments.source, request)
    print("\n".join(report.lines()))
    print(_made(arguments.out, started))


def _internvit(arguments: argparse.Namespace) -> None:
    from geode_jax.results.encode_frames import encode_export

    started = time.monotonic()
    with _making(arguments.out):
        encode_export(arguments.weights, arguments.export, arguments.out)
    print(_made(arguments.out, started))


def _making(folder: Path) -> contextlib.AbstractContextManager[None]:
    """Nobody else makes this folder meanwhile."""
    from geode_jax.runtime.lock import beside, locked

    return locked(beside(folder), f"--out: {folder}")


def _made(folder: Path, started: float) -> str:
    """The line that closes the making of an export."""
    manifest = exports.Export(folder).manifest
    splits = [scene["split"] for scene in manifest["scenes"]]
    counts = ", ".join(f"{splits.count(s)} {s}" for s in exports.SPLITS if s in splits)
    return (
        f"{folder}: {len(splits)} scenes ({counts}), {manifest['questions']['count']} questions, "
        f"{time.monotonic() - started:.0f} s"
    )


def _scenes(arguments: argparse.Namespace) -> None:
    from geode_jax.runs.trained import open_run_export

    for scene_id in open_run_export(arguments.workdir).scene_ids(arguments.split):
        print(scene_id)


def _ask(arguments: argparse.Namespace) -> None:
    from geode_jax.results.predict import Predictor
    from geode_jax.runs.config import load_settings

    if arguments.question is None and arguments.options:
        raise UserError("--options: belong to a --question")
    if arguments.diagnostic and arguments.json:
        raise UserError("--diagnostic: --json has the thinking tokens already")
    system = load_settings(arguments.workdir).system
    if arguments.diagnostic and not system.has_thinking_tokens:
        raise UserError(
            f"--diagnostic: thinking tokens are the student's, this run is {system.name}"
        )
    sampling = _sampling(arguments)
    predictor = Predictor(arguments.workdir, rationale=arguments.rationale, int8=arguments.int8)
    if arguments.question is None:
        _ask_own(predictor, arguments, sampling)
        return
    text = " ".join([arguments.question, *(arguments.options or ())])
    unknown = predictor.unknown_words(text)
    answer = predictor.answer(arguments.scene, arguments.question, arguments.options, sampling)
    if unknown:
        print(f"warning: words the model never read: {', '.join(unknown)}", file=sys.stderr)
    if arguments.json:
        print(_json(arguments.scene, arguments.question, answer))
    elif arguments.diagnostic:
        print(f"answer:   {answer.shown}\nthinking: {_shown(answer.thinking_tokens)}")
    else:
        print(answer.shown)


def _sampling(arguments: argparse.Namespace):
    """How tokens are drawn; None: greedily."""
    import jax

    from geode_jax.models.generate import Sampling
    from geode_jax.runtime.devices import find_devices

    asked = {"temperature": arguments.temperature, "top_k": arguments.top_k}
    asked = {k: v for k, v in (asked | {"top_p": arguments.top_p}).items() if v is not None}
    if not asked:
        if arguments.seed is not None:
            raise UserError("--seed: greedy answers have none; goes with --temperature, --top-k")
        return None
    find_devices()
    return Sampling(jax.random.key(arguments.seed or 0), **asked)


def _ask_own(predictor, arguments: argparse.Namespace, sampling) -> None:
    """The questions that the export has of a scene, the model's answers beside the true ones."""
    scene_id = arguments.scene
    records = predictor.questions(scene_id)
    if not records:
        raise UserError(f"scene {scene_id}: has no question of its own; give a --question")
    for number, record in enumerate(records):
        answer = predictor.answer(scene_id, record["question"], record.get("options"), sampling)
        if arguments.json:
            print(_json(scene_id, record["question"], answer))
            continue
        if arguments.diagnostic and number == 0:  # they stand before the question: one set a scene
            print(f"thinking: {_shown(answer.thinking_tokens)}")
        print(f"{record['kind']}: {_one_line(record['question'], *record.get('options', ()))}")
        true = _one_line(record.get(predictor.truth_field, "-"))
        print(f"    model: {_one_line(answer.shown)}    true: {true}")


def _json(scene_id: str, question: str, answer) -> str:
    return json.dumps({"scene_id": scene_id, "question": question, **answer.facts()})


def _one_line(*texts: str) -> str:
    return " ".join(" ".join(texts).split())


def _shown(thinking_tokens: tuple[str, ...]) -> str:
    """Decoded tokens apart from each other; a token may be several words, or a line break."""
    if not thinking_tokens:
        return "none (K = 0)"
    return " | ".join(token.strip(" ").replace("\n", "\\n") or "␣" for token in thinking_tokens)


_OF_PREDICTIONS = ("dataset", "debiased_ids", "allow_missing", "blind")
_OF_PREDICTIONS += ("revision", "frames", "decoding")
_OF_RUN = ("export", "spatio")
_OF_TEXT = ("dataset", "revision", "frames", "decoding")


def _evaluate(arguments: argparse.Namespace) -> None:
    if arguments.benchmark == "text":
        _evaluate_text(arguments)
        return
    from geode_jax.evaluate import vsi_bench

    by_run = arguments.workdir is not None
    source, others = ("workdir", _OF_PREDICTIONS) if by_run else ("predictions", _OF_RUN)
    for name in others:
        if getattr(arguments, name) is not None:
            raise UserError(f"--{name.replace('_', '-')}: does not go with --{source}")
    result, out = _vsi_of_run(arguments) if by_run else _vsi_of_predictions(arguments)
    print(vsi_bench.table(result["scores"]))
    print("\n".join(f"note: {note}" for note in result["notes"]))
    print(f"result: {out}")


def _evaluate_text(arguments: argparse.Namespace) -> None:
    from geode_jax.evaluate import text_answers
    from geode_jax.training.metrics import write_json

    for name in ("workdir", *_OF_RUN, "debiased_ids", "allow_missing", "blind"):
        if getattr(arguments, name) is not None:
            raise UserError(f"--{name.replace('_', '-')}: does not go with evaluate text")
    predictions, told = arguments.predictions, {name: getattr(arguments, name) for name in _OF_TEXT}
    out = arguments.out or predictions.parent / f"{predictions.stem}.text.json"
    _refuse_input(out, [path for path in (predictions, arguments.dataset) if path])
    result = text_answers.evaluate(predictions, **told)
    write_json(out, result)
    print(text_answers.table(result["scores"]))
    print("\n".join(f"note: {note}" for note in result["notes"]))
    print(f"result: {out}")


def _vsi_of_run(arguments: argparse.Namespace) -> tuple[dict, Path]:
    """The result of a run's own model, and its file."""
    from geode_jax.results.vsi import evaluate_run

    workdir, export = arguments.workdir, arguments.export
    out = arguments.out or workdir / "vsi.json"
    kept = [workdir / name for name in ("config.json", "summary.json")]
    _refuse_input(out, kept if export is None else [*kept, export / "manifest.json"])
    return evaluate_run(workdir, out, export=export, spatio=arguments.spatio), out


def _vsi_of_predictions(arguments: argparse.Namespace) -> tuple[dict, Path]:
    """The result of a file of predictions, and its file."""
    from geode_jax.evaluate import vsi_bench
    from geode_jax.training.metrics import write_json

    told = {name: getattr(arguments, name) for name in _OF_PREDICTIONS}
    told["allow_missing"] = bool(told["allow_missing"])
    out = arguments.out or arguments.predictions.parent / f"{arguments.predictions.stem}.vsi.json"
    paths = [path for path in told.values() if isinstance(path, Path)]
    _refuse_input(out, [arguments.predictions, *paths])
    result = vsi_bench.evaluate(arguments.predictions, **told)
    write_json(out, result)
    return result, out


def _refuse_input(out: Path, inputs: list[Path]) -> None:
    if os.path.realpath(out) in map(os.path.realpath, inputs):
        raise UserError(f"--out: {out} is one of the files to read")


def _import(arguments: argparse.Namespace) -> None:
    from geode_jax.weights.convert import import_folder

    with _making(arguments.out):
        model = import_folder(arguments.source, arguments.out)
    print(_converted(arguments.out, model))


def _export(arguments: argparse.Namespace) -> None:
    from geode_jax.results.publish import export_run
    from geode_jax.weights.convert import export_folder

    by_run = arguments.workdir is not None
    if getattr(arguments, "model_type" if by_run else "part") is not None:
        other = "--model-type: does not go with --workdir"
        raise UserError(other if by_run else "--part: does not go with --source")
    with _making(arguments.out):
        if by_run:
            model = export_run(arguments.workdir, arguments.out, arguments.part)
        else:
            model = export_folder(arguments.source, arguments.out, arguments.model_type)
    print(_converted(arguments.out, model))


def _converted(folder: Path, model) -> str:
    """The line that closes a conversion."""
    from flax import nnx

    from geode_jax.measure.cost import parameter_counts

    count = parameter_counts(nnx.state(model))["parameters"]
    return f"{folder}: {type(model).__name__}, {count:,} parameters"


def _inspect(arguments: argparse.Namespace) -> None:
    from geode_jax.weights.convert import inspect_folder

    table, problems = inspect_folder(arguments.folder)
    print("\n".join([table, *problems]))
    if problems:
        raise UserError(f"{arguments.folder}: {len(problems)} problems, listed above")


def _plan(arguments: argparse.Namespace) -> None:
    from geode_jax.plan.command import plan, table
    from geode_jax.runs.config_file import read_settings

    facts = plan(
        read_settings(arguments.config, arguments.set, arguments.batch),
        arguments.topology,
        arguments.mesh,
        search=arguments.search_batch,
        decode=not arguments.train_only,
        log=lambda line: print(line, file=sys.stderr, flush=True),
    )
    print(json.dumps(facts) if arguments.json else table(facts))


def _mesh(text: str) -> tuple[int, ...]:
    sizes = tuple(int(size) for size in text.split(","))
    if len(sizes) != 3:
        raise argparse.ArgumentTypeError(f"{text}: not the sizes of data, fsdp, model")
    return sizes


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


def _seed(text: str) -> int:
    value = int(text)
    if not 0 <= value < 1 << 32:
        raise argparse.ArgumentTypeError(f"{value} is not from 0 to 2^32 - 1")
    return value


def _above_zero(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no number above 0")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 1")
    return value


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, as all errors are."""

    def error(self, message: str) -> NoReturn:
        print(f"error: {one_line(message)}; see {self.prog} --help", file=sys.stderr)
        sys.exit(2)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="geode-jax", description="Make data, ask a trained run, score it, convert weights."
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    def command(name, run, text, commands=commands):
        added = commands.add_parser(name, help=text, description=text)
        added.set_defaults(run=run)
        return added.add_argument

    add = command("validate", _validate, "check an export and print a summary")
    add("folder", metavar="DIR", type=Path)
    add("--skip", action="store_true", help="list bad scenes instead of stopping at the first")

    add = command("rooms", _rooms, "make an export of synthetic rooms")
    add("--scenes", type=_positive, default=8000, metavar="N", help="train and val; default 8000")
    add("--seed", type=_seed, default=0)
    add("--out", type=Path, required=True, metavar="DIR")
    add(
        "--images",
        type=_positive,
        nargs="?",
        const=448,
        default=0,
        metavar="SIDE",
        help="pictures too, so many pixels a side; default 448 (2.4 MB, half a second a scene)",
    )
    add("--workers", type=_positive, metavar="W", help="processes; default all cores")

    add = command("rgbd", _rgbd, "make an export of a folder with color/ depth/ pose/ intrinsic/")
    add("--source", type=Path, required=True, metavar="DIR")
    add("--out", type=Path, required=True, metavar="DIR")
    add("--views", type=_positive, default=4, help="of a scene; default 4")
    add("--grid", type=_positive, nargs=2, default=(8, 8), metavar=("GH", "GW"), help="patches")
    add("--questions", type=_positive, default=24, help="at most, of a scene; default 24")
    add("--max-frames", type=_positive, default=300, help="thin out to this many; default 300")
    add(
        "--intrinsic",
        type=float,
        nargs=4,
        metavar=("FX", "FY", "CX", "CY"),
        help="of the depth camera in pixels, where the folder has none",
    )
    add("--depth-scale", type=float, default=1000.0, help="depth units in a metre; default 1000")
    add("--seed", type=_seed, default=0)

    add = command("prepare", _prepare, "make an export of a data set on disk")
    add("--source", required=True, metavar="NAME", help="such as scannet, scanqa, vsi590k")
    add("--root", type=Path, required=True, metavar="DIR", help="where the data set is")
    add("--out", type=Path, required=True, metavar="DIR")
    add("--scenes", type=Path, metavar="DIR", help="export whose scenes the questions are about")
    add("--part", action="append", metavar="PART", help="of the data set; may be repeated")
    add("--exclude-scenes", type=Path, metavar="FILE", help="list: never to be trained on")
    add("--allow-missing", action="store_true", help="count entries of the list that are not here")
    add("--views", type=_positive, default=8, help="of a scene; default 8")
    add("--grid", type=_positive, nargs=2, default=(8, 8), metavar=("GH", "GW"), help="patches")
    add("--seed", type=_seed, default=0)

    add = command("internvit", _internvit, "add the frames' InternViT tokens to an export")
    add("--weights", type=Path, required=True, metavar="DIR", help="a GEODE run, or pretrained")
    add("--export", type=Path, required=True, metavar="DIR", help="with images")
    add("--out", type=Path, required=True, metavar="DIR")

    add = command("scenes", _scenes, "list the scenes that a run can be asked about")
    add("--workdir", type=Path, required=True, metavar="RUN")
    add("--split", choices=exports.SPLITS)

    add = command("ask", _ask, "ask a trained run about a scene")
    add("--workdir", type=Path, required=True, metavar="RUN")
    add("--scene", required=True, metavar="ID", help="see: geode-jax scenes --workdir RUN")
    add("--question", help="without it: the scene's own questions, answered")
    add("--options", nargs="+", metavar="OPTION", help="of a multiple choice: A. chair ...")
    add("--diagnostic", action="store_true", help="also decode the student's K thinking tokens")
    add("--rationale", action="store_true", help="GEODE: what the rationale tokens alone say")
    add("--json", action="store_true", help="an object a line, named as in predictions.jsonl")
    add("--temperature", type=_above_zero, metavar="T", help="draw the words; default: likeliest")
    add("--top-k", type=_positive, metavar="K", help="draw from the K likeliest words")
    add("--top-p", type=_share, metavar="P", help="draw from the likeliest that have P together")
    add("--seed", type=_seed, help="of what is drawn; default 0")
    add("--int8", action="store_true", help="the decoder's matrices at a byte a number")

    add = command("evaluate", _evaluate, "score a run or a file of predictions on a benchmark")
    add("benchmark", choices=("vsi", "text"), help="vsi: VSI-Bench; text: ScanQA, SQA3D")
    source = commands.choices["evaluate"].add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--predictions", type=Path, metavar="FILE", help="JSON lines: id, prediction"
    )
    source.add_argument("--workdir", type=Path, metavar="RUN", help="predict with a trained run")
    add("--export", type=Path, metavar="DIR", help="its test split is asked; default the run's own")
    add("--spatio", type=int, choices=(4, 8, 16), help="see so many of the run's rationale tokens")
    add("--dataset", type=Path, metavar="FILE", help="its rows or questions; else in these")
    add("--debiased-ids", type=Path, metavar="FILE", help="list: score these questions only")
    text = "count entries of the list that are no id"
    add("--allow-missing", action="store_const", const=True, help=text)
    add("--blind", type=Path, metavar="FILE", help="predictions without frames, shown beside")
    add(
        "--out",
        type=Path,
        metavar="FILE",
        help="result; default RUN/vsi.json, or PREDICTIONS with .vsi.json or .text.json",
    )
    add("--revision", metavar="TEXT", help="of the dataset, for the result file")
    add("--frames", type=_positive, metavar="N", help="of a video, for the result file")
    add("--decoding", metavar="TEXT", help="such as greedy, for the result file")

    text = "convert pretrained weights of Hugging Face"
    convert = commands.add_parser("convert", help=text, description=text)
    directions = convert.add_subparsers(metavar="DIRECTION", required=True)
    add = command("import", _import, "make a checkpoint of a Hugging Face folder", directions)
    add("--source", type=Path, required=True, metavar="DIR", help="with config.json, safetensors")
    add("--out", type=Path, required=True, metavar="DIR")

    text = "make a Hugging Face folder of a run or a checkpoint"
    add = command("export", _export, text, directions)
    source = directions.choices["export"].add_mutually_exclusive_group(required=True)
    source.add_argument("--workdir", type=Path, metavar="RUN", help="a trained run")
    source.add_argument(
        "--source", type=Path, metavar="DIR", help="imported, or Hugging Face's own"
    )
    add("--out", type=Path, required=True, metavar="DIR")
    add("--part", choices=("decoder",), help="of a GEODE run: its Qwen2 alone")
    add("--model-type", metavar="TYPE", help="another layout, as internvl for an internvl_chat")

    add = command("inspect", _inspect, "list what a Hugging Face folder holds", directions)
    add("folder", metavar="DIR", type=Path)

    add = command("plan", _plan, "what a training run needs on hardware that is not there")
    add("--config", required=True, metavar="FILE[:ARG]", help="as of python -m geode_jax.main")
    add("--topology", required=True, metavar="CHIP:SHAPE", help="v5e:4x4, v5p:4x4x4, h100:2x8, ...")
    add("--mesh", type=_mesh, metavar="D,F,M", help="data, fsdp, model; default the config's")
    add("--batch", type=_positive, metavar="N", help="scenes; default the config's")
    add("--search-batch", action="store_true", help="plan with the largest batch that fits")
    add("--train-only", action="store_true", help="leave out the answering")
    text = "a field of the config, as train.steps=500; repeats"
    add("--set", action="append", default=[], metavar="FIELD=VALUE", help=text)
    add("--json", action="store_true", help="one JSON object")
    return parser


if __name__ == "__main__":
    main()
