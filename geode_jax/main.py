"""Train a system: python -m geode_jax.main --config=configs/hidden_cot.py [--workdir=DIR]."""

import os
import sys
from pathlib import Path

# Quiet by default; the run prints its own progress.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from absl import app, flags, logging
from ml_collections import config_flags

from geode_jax.errors import UserError

_CONFIG = config_flags.DEFINE_config_file("config", None, "FILE[:ARGUMENTS], see configs/.")
_WORKDIR = flags.DEFINE_string("workdir", "", "Run folder; default runs/<system>[-arguments].")
flags.mark_flag_as_required("config")


def _workdir() -> Path:
    if _WORKDIR.value:
        return Path(_WORKDIR.value)
    argument = config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")[2]
    name = _CONFIG.value.system
    safe = "".join(c if c.isalnum() or c in "=-." else "-" for c in argument)
    return Path("runs") / (f"{name}-{safe}" if safe else name)


def main(argv: list[str]) -> None:
    """Train, evaluate, write the report; the same command again resumes."""
    from geode_jax.data.exports import ExportError
    from geode_jax.train import train_and_evaluate

    logging.set_verbosity(logging.WARNING)
    try:
        if len(argv) > 1:
            raise UserError(f"unexpected argument {argv[1]!r}; options start with --")
        train_and_evaluate(_CONFIG.value, _workdir())
    except (UserError, ExportError) as error:
        sys.exit(f"error: {error}")


def run() -> None:
    """Entry point; a bad flag or configuration is one line, never a traceback."""
    try:
        app.run(main, flags_parser=_parse)
    except (UserError, flags.Error) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _parse(argv):
    return flags.FLAGS(argv)


if __name__ == "__main__":
    run()
