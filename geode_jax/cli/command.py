"""The command `geode-jax`; each group of commands has a file of its own beside this one."""

import argparse
import os
import sys

# Quiet by default; the commands print their own progress.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from geode_jax.cli import ask, data, evaluate, plan, stages, train, weights
from geode_jax.cli.options import Parser, examples
from geode_jax.cli.reported import open_standard_streams, reported
from geode_jax.errors import refuse_undecodable
from geode_jax.version import software

_EXAMPLES = """
geode-jax train hidden_cot --workdir runs/hidden_cot
geode-jax scenes --workdir runs/hidden_cot --split test
geode-jax ask --workdir runs/hidden_cot --scene room_s0_000000
geode-jax convert export --workdir runs/hidden_cot --out student
"""


def main(argv: list[str] | None = None) -> None:
    """Runs the command of `argv` (default: `sys.argv[1:]`); exits with 2 on an error."""
    argv = sys.argv[1:] if argv is None else argv
    open_standard_streams()
    with reported():
        refuse_undecodable(argv)
    parser = _parser()
    overrides = []
    if argv[:1] in (["train"], ["stages"]):  # argparse cannot know the configuration's fields
        overrides = [word for word in argv if word.startswith("--config.")]
    arguments = parser.parse_args([word for word in argv if word not in overrides])
    if arguments.version:
        with reported():
            print(software())
        return
    if arguments.command is None:
        parser.print_help(sys.stderr)
        sys.exit(2)
    arguments.overrides = overrides
    with reported():
        arguments.run(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="geode-jax",
        description="Train models that answer questions about 3D rooms, ask and score them, make\n"
        "their data and convert their weights.\n\n"
        "geode-jax COMMAND --help describes a command and shows examples.",
        epilog=examples(_EXAMPLES),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help="print version and commit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for group in (train, stages, data, ask, evaluate, weights, plan):
        group.add_commands(commands)
    return parser


if __name__ == "__main__":
    main()
