"""`geode-jax train`: the same as `python -m geode_jax.main --config=CONFIG`."""

import argparse

from geode_jax.cli.options import GPU_KERNELS_HELP, Commands, add_command
from geode_jax.runs.shipped import config_names


def add_commands(commands: Commands) -> None:
    """Adds the command of this file."""
    parser = add_command(
        commands,
        "train",
        _train,
        "Train a system, score it on held-out scenes and write a report.\n\n"
        "The same command again resumes the run where it stopped. A configuration of your own\n"
        "is a Python file that may import modules beside it. The shipped configurations are\n"
        f"{', '.join(config_names())}.",
        "geode-jax train hidden_cot --workdir runs/x\n"
        "geode-jax train hidden_cot:thinking=0,drop=depth --config.train.steps=500\n"
        "geode-jax train ./my_config.py:full",
    )
    add = parser.add_argument
    add(
        "config",
        metavar="CONFIG[:ARGUMENTS]",
        help="name of a shipped configuration, or path of a file",
    )
    add("--workdir", metavar="DIR", help="the run's folder; default: runs/SYSTEM, then -ARGUMENTS")
    add("--profile", action="store_true", help="trace a few steps into WORKDIR/profile")
    add("--gpu_kernels", action="store_true", help=GPU_KERNELS_HELP)
    add("--coordinator_address", metavar="HOST:PORT", help="address of process 0")
    add("--num_processes", metavar="N", help="number of processes of the run")
    add("--process_id", metavar="I", help="number of this process")
    # Parsed by ml_collections and not here; named for --help.
    parser.add_argument_group("fields of the configuration").add_argument(
        "--config.FIELD",
        dest="_",
        metavar="VALUE",
        help="change a field, such as --config.train.steps=500; may be repeated",
    )


def _train(arguments: argparse.Namespace) -> None:
    from geode_jax.cli.flags import run

    flags = [f"--config={arguments.config}", *arguments.overrides]
    for name in ("workdir", "coordinator_address", "num_processes", "process_id"):
        value = getattr(arguments, name)
        if value is not None:
            flags.append(f"--{name}={value}")
    flags += [f"--{name}" for name in ("profile", "gpu_kernels") if getattr(arguments, name)]
    run(["geode-jax train", *flags])
