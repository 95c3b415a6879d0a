"""Train a system: python -m geode_jax.main --config=configs/hidden_cot.py [--workdir=DIR]."""

import os
from pathlib import Path

# Quiet by default; the run prints its own progress.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from absl import app, flags, logging
from ml_collections import config_flags

from geode_jax.errors import UserError, refuse_undecodable, reported
from geode_jax.runs.config_file import parse_flags

_CONFIG = config_flags.DEFINE_config_file("config", None, "FILE[:ARGUMENTS], see configs/.")
_WORKDIR = flags.DEFINE_string("workdir", "", "Run folder; default runs/<system>[-arguments].")
_ADDRESS = flags.DEFINE_string("coordinator_address", None, "HOST:PORT of process 0.")
_PROCESSES = flags.DEFINE_integer("num_processes", None, "Number of processes of the run.")
_PROCESS = flags.DEFINE_integer(
    "process_id", None, "Number of this process; clusters set all three by themselves."
)
_PROFILE = flags.DEFINE_bool("profile", False, "Trace a few steps into WORKDIR/profile.")
flags.mark_flag_as_required("config")


def _workdir() -> Path:
    if _WORKDIR.value:
        return Path(_WORKDIR.value)
    argument = config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")[2]
    name = _CONFIG.value.system
    safe = "".join(c if c.isalnum() or c in "=-." else "-" for c in argument)
    return Path("runs") / (f"{name}-{safe}" if safe else name)


def main(argv: list[str]) -> None:
    """Trains, evaluates, writes the report; the same command again resumes."""
    from geode_jax.runtime import distributed
    from geode_jax.train import train_and_evaluate

    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}; options start with --")
    logging.set_verbosity(logging.WARNING)
    distributed.initialize(_ADDRESS.value, _PROCESSES.value, _PROCESS.value)
    with distributed.ends_together():
        train_and_evaluate(_CONFIG.value, _workdir(), profile=_PROFILE.value)


def run() -> None:
    """Entry point; an error that the user can mend is one line, never a traceback."""
    with reported():
        app.run(main, flags_parser=_parse)


def _parse(argv: list[str]) -> list[str]:
    """Parses the flags; an error in a flag or in the configuration is one line."""
    refuse_undecodable(argv)
    return parse_flags(argv, flags.FLAGS)


if __name__ == "__main__":
    run()
