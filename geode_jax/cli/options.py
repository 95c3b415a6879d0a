"""Pieces that the parsers of all commands share."""

import argparse
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from geode_jax.errors import one_line

GPU_KERNELS_HELP = "use this package's attention and scan kernels on Hopper GPUs"
"""Help of the option that switches the kernels of `ops` on; `ops.gpu` says why they are off."""

Commands = Any
"""What `ArgumentParser.add_subparsers` returns; argparse keeps its class private."""


class Parser(argparse.ArgumentParser):
    """A parser that reports an error as one line and exits with 2; options are not abbreviated."""

    def __init__(self, **settings: Any):
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        print(f"error: {one_line(message)}; see {self.prog} --help", file=sys.stderr)
        sys.exit(2)


def add_command(
    commands: Commands,
    name: str,
    run: Callable[[argparse.Namespace], None] | None,
    description: str,
    example: str,
) -> argparse.ArgumentParser:
    """Adds a command and returns its parser.

    Args:
        commands: the table to which the command is added.
        name: of the command.
        run: called with the parsed arguments; None if its subcommands run.
        description: full sentences; the first stands in the list of commands.
        example: command lines, shown at the end of the command's help.
    """
    summary = description.partition("\n")[0].rstrip(".")
    parser = commands.add_parser(
        name,
        help=f"{summary[0].lower()}{summary[1:]}",
        description=description,
        epilog=examples(example),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if run is not None:
        parser.set_defaults(run=run)
    return parser


def examples(lines: str) -> str:
    """The end of a help text that shows command lines."""
    indented = "\n".join(f"  {line}" for line in lines.strip().splitlines())
    return f"examples:\n{indented}"


def add_gpu_kernels(parser: argparse.ArgumentParser) -> None:
    """Adds `--gpu-kernels`, the value of `ops.gpu.use_kernels` while the command runs."""
    parser.add_argument("--gpu-kernels", action="store_true", help=GPU_KERNELS_HELP)


def positive(text: str) -> int:
    """Parses an integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


def seed(text: str) -> int:
    """Parses a seed: an integer from 0 to 2^32 - 1."""
    value = int(text)
    if not 0 <= value < 1 << 32:
        raise argparse.ArgumentTypeError(f"{value} is not from 0 to 2^32 - 1")
    return value


def above_zero(text: str) -> float:
    """Parses a finite number above 0."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return value


def share(text: str) -> float:
    """Parses a number above 0 and at most 1."""
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 1")
    return value
