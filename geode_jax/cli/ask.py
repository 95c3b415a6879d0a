"""`geode-jax ask`: a trained run answers questions about a scene."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from geode_jax.cli.options import (
    Commands,
    above_zero,
    add_command,
    add_gpu_kernels,
    positive,
    seed,
    share,
)
from geode_jax.errors import UserError

if TYPE_CHECKING:
    from geode_jax.models.generate import Sampling
    from geode_jax.results.predict import Answer, Predictor


def add_commands(commands: Commands) -> None:
    """Adds the command of this file."""
    parser = add_command(
        commands,
        "ask",
        _ask,
        "Ask a trained run about a scene of the export that it was trained on.\n\n"
        "Without --question, the scene's own questions are answered beside the true answers.",
        "geode-jax ask --workdir runs/hidden_cot --scene room_s0_000000\n"
        "geode-jax ask --workdir runs/hidden_cot --scene room_s0_000000 \\\n"
        '    --question "Which is larger, the sofa or the cabinet?"',
    )
    add = parser.add_argument
    add("--workdir", type=Path, required=True, metavar="RUN", help="a run's folder")
    add("--scene", required=True, metavar="ID", help="listed by: geode-jax scenes --workdir RUN")
    add("--question", metavar="TEXT", help="default: the scene's own questions")
    add("--options", nargs="+", metavar="OPTION", help="of a multiple choice: 'A. chair' ...")
    add("--diagnostic", action="store_true", help="decode the student's K thinking tokens, too")
    add("--rationale", action="store_true", help="GEODE: answer with its rationale")
    add("--json", action="store_true", help="print one JSON object a line, as predictions.jsonl")
    add("--temperature", type=above_zero, metavar="T", help="sample; default: the likeliest token")
    add("--top-k", type=positive, metavar="K", help="sample from the K likeliest tokens")
    add("--top-p", type=share, metavar="P", help="sample from the likeliest tokens of mass P")
    add("--seed", type=seed, metavar="S", help="seed of the sampling; default 0")
    add("--int8", action="store_true", help="round the decoder's matrices to one byte a number")
    add_gpu_kernels(parser)


def _ask(arguments: argparse.Namespace) -> None:
    from geode_jax.ops.gpu import use_kernels
    from geode_jax.results.predict import Predictor
    from geode_jax.runs.config import load_settings
    from geode_jax.runs.summary import SUMMARY
    from geode_jax.training.checkpoint import find_model

    if arguments.question is None and arguments.options:
        raise UserError("--options: needs a --question")
    if arguments.diagnostic and arguments.json:
        raise UserError("--diagnostic: --json prints the thinking tokens already")
    system = load_settings(arguments.workdir).system
    if arguments.diagnostic and not system.has_thinking_tokens:
        raise UserError(f"--diagnostic: a {system.name} run has no thinking tokens")
    sampling = _sampling(arguments)
    predictor = Predictor(arguments.workdir, rationale=arguments.rationale, int8=arguments.int8)
    if not (arguments.workdir / SUMMARY).exists():
        step = find_model(arguments.workdir).name
        print(f"note: the run has not ended; this is its model of step {step}", file=sys.stderr)
    with use_kernels(arguments.gpu_kernels):
        if arguments.question is None:
            _ask_own(predictor, arguments, sampling)
        else:
            _ask_one(predictor, arguments, sampling)


def _ask_one(
    predictor: "Predictor", arguments: argparse.Namespace, sampling: "Sampling | None"
) -> None:
    """Prints the model's answer to the question of the command line."""
    text = " ".join([arguments.question, *(arguments.options or ())])
    unknown = predictor.unknown_words(text)
    answer = predictor.answer(arguments.scene, arguments.question, arguments.options, sampling)
    if unknown:
        words = ", ".join(unknown)
        print(f"warning: words that the model has never read: {words}", file=sys.stderr)
    if arguments.json:
        print(_json(arguments.scene, arguments.question, answer))
    elif arguments.diagnostic:
        print(f"answer:   {answer.shown}\nthinking: {_joined(answer.thinking_tokens)}")
    else:
        print(answer.shown)


def _sampling(arguments: argparse.Namespace) -> "Sampling | None":
    """Returns how tokens are sampled; None for greedy decoding."""
    import jax

    from geode_jax.models.generate import Sampling
    from geode_jax.runtime.devices import find_devices

    options = {name: getattr(arguments, name) for name in ("temperature", "top_k", "top_p")}
    given = {name: value for name, value in options.items() if value is not None}
    if not given:
        if arguments.seed is not None:
            raise UserError("--seed: greedy answers need none; goes with --temperature, --top-k")
        return None
    find_devices()
    return Sampling(jax.random.key(arguments.seed or 0), **given)


def _ask_own(
    predictor: "Predictor", arguments: argparse.Namespace, sampling: "Sampling | None"
) -> None:
    """Prints the export's own questions about a scene, the model's and the true answers."""
    scene_id = arguments.scene
    records = predictor.questions(scene_id)
    if not records:
        raise UserError(f"scene {scene_id}: has no question of its own; give a --question")
    for number, record in enumerate(records):
        answer = predictor.answer(scene_id, record["question"], record.get("options"), sampling)
        if arguments.json:
            print(_json(scene_id, record["question"], answer))
            continue
        # The thinking tokens stand before the question, so all questions of a scene share them.
        if arguments.diagnostic and number == 0:
            print(f"thinking: {_joined(answer.thinking_tokens)}")
        print(f"{record['kind']}: {_one_line(record['question'], *record.get('options', ()))}")
        true = _one_line(record.get(predictor.truth_field, "-"))
        print(f"    model: {_one_line(answer.shown)}    true: {true}")


def _json(scene_id: str, question: str, answer: "Answer") -> str:
    return json.dumps({"scene_id": scene_id, "question": question, **answer.facts()})


def _one_line(*texts: str) -> str:
    return " ".join(" ".join(texts).split())


def _joined(thinking_tokens: tuple[str, ...] | None) -> str:
    """Returns decoded tokens with separators; a token may be several words or a line break."""
    if not thinking_tokens:
        return "none (K = 0)"
    return " | ".join(token.strip(" ").replace("\n", "\\n") or "␣" for token in thinking_tokens)
