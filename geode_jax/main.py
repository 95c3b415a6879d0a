"""Train a system: python -m geode_jax.main --config=configs/hidden_cot.py [--workdir=DIR]."""

import itertools
import os
from pathlib import Path

# Quiet by default; the run prints its own progress.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from absl import app, flags, logging
from ml_collections import config_flags

from geode_jax.errors import UserError, refuse_undecodable, reported

_CONFIG = config_flags.DEFINE_config_file("config", None, "FILE[:ARGUMENTS], see configs/.")
_WORKDIR = flags.DEFINE_string("workdir", "", "Run folder; default runs/<system>[-arguments].")
_ADDRESS = flags.DEFINE_string("coordinator_address", None, "HOST:PORT of process 0.")
_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes make the run.")
_PROCESS = flags.DEFINE_integer(
    "process_id", None, "Number of this one; clusters tell by themselves."
)
_PROFILE = flags.DEFINE_bool("profile", False, "Trace a few steps into WORKDIR/profile.")
_GPU_KERNELS = flags.DEFINE_bool(
    "gpu_kernels", False, "Use this package's attention and scan kernels on Hopper GPUs."
)
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
    from geode_jax.ops.gpu import use_kernels
    from geode_jax.runtime import distributed
    from geode_jax.train import train_and_evaluate

    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}; options start with --")
    logging.set_verbosity(logging.WARNING)
    distributed.initialize(_ADDRESS.value, _PROCESSES.value, _PROCESS.value)
    with distributed.ends_together(), use_kernels(_GPU_KERNELS.value):
        train_and_evaluate(_CONFIG.value, _workdir(), profile=_PROFILE.value)


def run() -> None:
    """Entry point; what the user can mend is one line, never a traceback."""
    with reported():
        app.run(main, flags_parser=_parse)


def _parse(argv: list[str]) -> list[str]:
    """absl's parsing; whatever goes wrong with a flag or in the configuration is one line."""
    refuse_undecodable(argv)
    try:
        _check_file(argv)
        rest = flags.FLAGS(argv)
        # A file that is not there is an error only where the configuration is looked at.
        _ = _CONFIG.value.system
        return rest
    except UserError as error:
        raise _of_config(error) from error
    except OSError as error:
        raise UserError(f"config: {_last_line(error)}") from error
    except flags.Error as error:
        if "Error whilst parsing config file" in str(error):
            raise _of_config(error) from error
        first = str(error).strip().splitlines()[0]
        last = _last_line(error)
        raise UserError(first if first == last else f"{first} {last}") from error
    except AttributeError as error:
        while error.args and isinstance(error.args[0], Exception):
            error = error.args[0]  # ml_collections wraps a KeyError that knows similar names
        reason = error.args[0] if error.args else error
        raise UserError(f"config: no such field: {reason}") from error
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a configuration is a program, and may raise or end at will
        raise UserError(f"config: {type(error).__name__}: {error}") from error


def _check_file(argv: list[str]) -> None:
    """Raises a UserError where the configuration is no file: a pipe waits, a device never ends."""
    for argument, after in itertools.pairwise([*argv, ""]):
        name, equals, value = argument.partition("=")
        if name.lstrip("-") == "config" and name.startswith("-"):
            path = (value if equals else after).partition(":")[0]
            if os.path.exists(path) and not os.path.isfile(path):
                raise UserError(f"--config: {path}: not a regular file")


def _of_config(error: BaseException) -> UserError:
    """What a configuration raised: ml_collections and absl wrap it in a text with a traceback."""
    while error.__context__ is not None:
        error = error.__context__
    if isinstance(error, UserError):
        return error
    return UserError(f"config: {type(error).__name__}: {_last_line(error)}")


def _last_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[-1].strip()


if __name__ == "__main__":
    run()
