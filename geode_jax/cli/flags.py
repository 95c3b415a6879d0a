"""The flags of training, and the one path from a command line to a run.

absl and ml_collections read the flags: the fields of a configuration are flags of their own, whose
types are those of its values.
"""

import os
import sys
from pathlib import Path

# Quiet by default; the run prints its own progress.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from absl import app, flags, logging
from ml_collections import config_flags

from geode_jax.cli.options import GPU_KERNELS_HELP
from geode_jax.cli.reported import open_standard_streams, reported
from geode_jax.errors import UserError, refuse_undecodable
from geode_jax.runs.config_file import parse_flags
from geode_jax.runs.shipped import find_config

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "NAME[:ARGUMENTS] of a shipped configuration, or PATH[:ARGUMENTS]."
)
"""The flag whose value is the configuration, with all changes of its fields."""
_WORKDIR = flags.DEFINE_string("workdir", "", "Run folder; default runs/<system>[-arguments].")
_ADDRESS = flags.DEFINE_string("coordinator_address", None, "HOST:PORT of process 0.")
_PROCESSES = flags.DEFINE_integer("num_processes", None, "Number of processes of the run.")
_PROCESS = flags.DEFINE_integer(
    "process_id", None, "Number of this process; clusters set it by themselves."
)
_GPU_KERNELS = flags.DEFINE_bool("gpu_kernels", False, GPU_KERNELS_HELP)
_PROFILE = flags.DEFINE_bool("profile", False, "Trace a few steps into WORKDIR/profile.")


def run(argv: list[str]) -> None:
    """Trains, evaluates and writes the report; the same command again resumes.

    An error that the user can correct is one line on stderr and exit status 2.

    Args:
        argv: the program's name and its flags.
    """
    open_standard_streams()
    with reported():
        app.run(_train, argv=argv, flags_parser=read_flags)


def _train(argv: list[str]) -> None:
    from geode_jax.ops.gpu import use_kernels
    from geode_jax.runtime import distributed
    from geode_jax.train import train_and_evaluate

    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}; options start with --")
    logging.set_verbosity(logging.WARNING)
    distributed.initialize(_ADDRESS.value, _PROCESSES.value, _PROCESS.value)
    with distributed.ends_together(), use_kernels(_GPU_KERNELS.value):
        train_and_evaluate(CONFIG.value, run_folder(), profile=_PROFILE.value)
        print(f"next: geode-jax scenes --workdir {run_folder()} lists what the run can be asked")


def run_folder() -> Path:
    """Returns the run's folder: --workdir, or one named by system and arguments."""
    if _WORKDIR.value:
        return Path(_WORKDIR.value)
    arguments = config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")[2]
    name = CONFIG.value.system
    safe = "".join(c if c.isalnum() or c in "=-." else "-" for c in arguments)
    return Path("runs") / (f"{name}-{safe}" if safe else name)


def read_flags(argv: list[str]) -> list[str]:
    """Parses a command line and returns its positional arguments.

    Raises:
        UserError: a flag or the configuration is wrong; one line, where absl and ml_collections
            print a usage text or a traceback.
    """
    refuse_undecodable(argv)
    sys.argv = _with_config_path(argv)  # ml_collections looks there for --config.FIELD=VALUE
    return parse_flags(sys.argv, flags.FLAGS)


def _with_config_path(argv: list[str]) -> list[str]:
    """Returns the command line with the path of the configuration in place of its name."""
    found = list(argv)
    for i, argument in enumerate(argv):
        flag, equals, value = argument.partition("=")
        if flag in ("--config", "-config"):
            if equals:
                found[i] = f"{flag}={find_config(value)}"
            elif i + 1 < len(argv):
                found[i + 1] = find_config(argv[i + 1])
    return found
