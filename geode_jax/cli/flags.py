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

from geode_jax.cli.config_files import config_names, find_config
from geode_jax.cli.reported import reported
from geode_jax.errors import UserError, refuse_undecodable

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "NAME[:ARGUMENTS] of a shipped configuration, or PATH[:ARGUMENTS]."
)
_WORKDIR = flags.DEFINE_string("workdir", "", "Run folder; default runs/<system>[-arguments].")
_ADDRESS = flags.DEFINE_string("coordinator_address", None, "HOST:PORT of process 0.")
_PROCESSES = flags.DEFINE_integer("num_processes", None, "Number of processes of the run.")
_PROCESS = flags.DEFINE_integer(
    "process_id", None, "Number of this process; clusters set it by themselves."
)
_PROFILE = flags.DEFINE_bool("profile", False, "Trace a few steps into WORKDIR/profile.")


def run(argv: list[str]) -> None:
    """Trains, evaluates and writes the report; the same command again resumes.

    An error that the user can correct is one line on stderr and exit status 2.

    Args:
        argv: the program's name and its flags.
    """
    with reported():
        app.run(_train, argv=argv, flags_parser=read_flags)


def _train(argv: list[str]) -> None:
    from geode_jax.runtime import distributed
    from geode_jax.train import train_and_evaluate

    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}; options start with --")
    logging.set_verbosity(logging.WARNING)
    distributed.initialize(_ADDRESS.value, _PROCESSES.value, _PROCESS.value)
    with distributed.ends_together():
        train_and_evaluate(_CONFIG.value, _workdir(), profile=_PROFILE.value)


def _workdir() -> Path:
    if _WORKDIR.value:
        return Path(_WORKDIR.value)
    arguments = config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")[2]
    name = _CONFIG.value.system
    safe = "".join(c if c.isalnum() or c in "=-." else "-" for c in arguments)
    return Path("runs") / (f"{name}-{safe}" if safe else name)


def read_flags(argv: list[str]) -> list[str]:
    """Parses a command line and returns its positional arguments.

    Raises:
        UserError: a flag or the configuration is wrong; one line, where absl and ml_collections
            print a usage text or a traceback.
    """
    refuse_undecodable(argv)
    try:
        sys.argv = _with_config_path(argv)  # ml_collections looks there for --config.FIELD=VALUE
        rest = flags.FLAGS(sys.argv)
        if _CONFIG.value is None:
            names = ", ".join(config_names())
            raise UserError(f"--config: missing; name a file, or one of {names}")
        # ml_collections reports a missing file only where the configuration is used.
        _ = _CONFIG.value.system
        return rest
    except UserError as error:
        raise _innermost(error) from error
    except OSError as error:
        raise UserError(f"config: {_last_line(error)}") from error
    except flags.Error as error:
        if "Error whilst parsing config file" in str(error):
            raise _innermost(error) from error
        first = str(error).strip().splitlines()[0]
        last = _last_line(error)
        raise UserError(first if first == last else f"{first} {last}") from error
    except AttributeError as error:
        while error.args and isinstance(error.args[0], Exception):
            error = error.args[0]  # ml_collections wraps a KeyError that names similar fields
        reason = error.args[0] if error.args else error
        raise UserError(f"config: no such field: {reason}") from error
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a configuration is a program, and may raise anything
        raise UserError(f"config: {type(error).__name__}: {error}") from error


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


def _innermost(error: BaseException) -> UserError:
    """Returns the error that a configuration raised; ml_collections and absl wrap its text."""
    while error.__context__ is not None:
        error = error.__context__
    if isinstance(error, UserError):
        return error
    return UserError(f"config: {type(error).__name__}: {_last_line(error)}")


def _last_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[-1].strip()
