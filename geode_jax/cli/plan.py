"""`geode-jax plan`: what a training run needs on hardware that is not there."""

import argparse
import json
import sys

from geode_jax.cli.options import Commands, add_command, add_gpu_kernels, positive


def add_commands(commands: Commands) -> None:
    """Adds the command of this file."""
    parser = add_command(
        commands,
        "plan",
        _plan,
        "Compute what a training run needs on hardware that is not there.\n\n"
        "The programs are compiled for the named chips and not run: memory, FLOPs, communication,\n"
        "and the least time of a step. docs/SCALING.md explains the numbers.",
        "geode-jax plan --config hidden_cot:full --topology v5p:4x4x4 --batch 256\n"
        "geode-jax plan --config geode_joint:full --topology h100:2x8 --mesh 2,8,1 --json",
    )
    add = parser.add_argument
    add("--config", required=True, metavar="CONFIG[:ARGUMENTS]", help="as of geode-jax train")
    add("--topology", required=True, metavar="CHIP:SHAPE", help="v5e:4x4, v5p:4x4x4, h100:2x8, ...")
    add("--mesh", type=_mesh, metavar="D,F,M", help="data, fsdp, model; default: configured")
    add("--batch", type=positive, metavar="N", help="scenes of a batch; default: configured")
    add("--search-batch", action="store_true", help="plan with the largest batch that fits")
    add("--train-only", action="store_true", help="leave out the answering")
    add(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="change a field of the configuration; may be repeated",
    )
    add_gpu_kernels(parser)
    add("--json", action="store_true", help="print one JSON object")


def _plan(arguments: argparse.Namespace) -> None:
    from geode_jax.ops.gpu import use_kernels
    from geode_jax.plan.command import plan, table
    from geode_jax.runs.config_file import read_settings

    with use_kernels(arguments.gpu_kernels):
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
    """Parses the sizes of the mesh axes data, fsdp and model."""
    sizes = tuple(int(size) for size in text.split(","))
    if len(sizes) != 3:
        raise argparse.ArgumentTypeError(f"{text}: not the sizes of data, fsdp, model")
    return sizes
