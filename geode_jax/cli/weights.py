"""`geode-jax convert`: Hugging Face folders to checkpoints and back."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from geode_jax.cli.data import making
from geode_jax.cli.options import Commands, add_command
from geode_jax.errors import UserError

if TYPE_CHECKING:
    from flax import nnx


def add_commands(commands: Commands) -> None:
    """Adds the command of this file and its directions."""
    convert = add_command(
        commands,
        "convert",
        None,
        "Convert weights from and to Hugging Face folders.\n\n"
        "geode-jax convert DIRECTION --help describes a direction.",
        "geode-jax convert import --source Qwen2.5-1.5B --out weights/qwen",
    )
    directions = convert.add_subparsers(metavar="DIRECTION", required=True)
    parser = add_command(
        directions,
        "import",
        _import,
        "Make a checkpoint of a Hugging Face folder.",
        "geode-jax convert import --source Qwen2.5-1.5B --out weights/qwen",
    )
    parser.add_argument(
        "--source",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder with config.json and safetensors files",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="new folder")

    parser = add_command(
        directions,
        "export",
        _export,
        "Make a Hugging Face folder of a run or of a checkpoint.\n\n"
        "The folder of a run has a model card and the PyTorch code that loads it without JAX.",
        "geode-jax convert export --workdir runs/hidden_cot --out student\n"
        "geode-jax convert export --source weights/qwen --out Qwen2.5-1.5B",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--workdir", type=Path, metavar="RUN", help="a trained run")
    source.add_argument(
        "--source", type=Path, metavar="DIR", help="an imported or a Hugging Face folder"
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="new folder")
    add("--part", choices=("decoder",), help="of a GEODE run: its Qwen2 alone")
    add(
        "--model-type",
        metavar="TYPE",
        help="write another layout, such as internvl instead of internvl_chat",
    )

    parser = add_command(
        directions,
        "inspect",
        _inspect,
        "List the tensors of a Hugging Face folder and what does not fit.",
        "geode-jax convert inspect Qwen2.5-1.5B",
    )
    parser.add_argument("folder", metavar="DIR", type=Path, help="the folder")


def _import(arguments: argparse.Namespace) -> None:
    from geode_jax.weights.convert import import_folder

    with making(arguments.out):
        model = import_folder(arguments.source, arguments.out)
    print(_converted(arguments.out, model))


def _export(arguments: argparse.Namespace) -> None:
    from geode_jax.results.publish import export_run
    from geode_jax.weights.convert import export_folder

    by_run = arguments.workdir is not None
    if getattr(arguments, "model_type" if by_run else "part") is not None:
        other = "--model-type: does not go with --workdir"
        raise UserError(other if by_run else "--part: does not go with --source")
    with making(arguments.out):
        if by_run:
            model = export_run(arguments.workdir, arguments.out, arguments.part)
        else:
            model = export_folder(arguments.source, arguments.out, arguments.model_type)
    print(_converted(arguments.out, model))


def _converted(folder: Path, model: "nnx.Module") -> str:
    """Returns the line that ends a conversion."""
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
