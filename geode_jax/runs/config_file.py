"""Files of configurations and the flags that override their fields; errors are one line.

`geode-jax train CONFIG --config.train.steps=500`, `python -m geode_jax.main --config=CONFIG` and
`geode-jax plan --config CONFIG --set train.steps=500` read them in the same way. CONFIG is
`NAME[:ARGUMENTS]` of a shipped configuration or `PATH[:ARGUMENTS]`.
"""

import itertools
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags

from geode_jax.errors import UserError
from geode_jax.runs.config import make_settings
from geode_jax.runs.settings import Settings
from geode_jax.runs.shipped import config_names, find_config


def read_settings(text: str, changes: Sequence[str] = (), scenes: int | None = None) -> Settings:
    """Returns the settings of a configuration.

    Args:
        text: `NAME[:ARGUMENTS]` or `PATH[:ARGUMENTS]`.
        changes: `FIELD=VALUE`, as `train.steps=500`.
        scenes: of a batch; None: the configuration's.

    Raises:
        UserError: there is no such file or field, a value is of another type or breaks its rule,
            or the configuration refuses its arguments.
    """
    for change in changes:
        if not change.partition("=")[0] or "=" not in change:
            raise UserError(f"--set: {change}: is not FIELD=VALUE")
    if scenes is not None:
        changes = [*changes, f"data.scenes_per_batch={scenes}"]
    argv = ["plan", f"--config={find_config(text)}", *(f"--config.{change}" for change in changes)]
    values = flags.FlagValues()
    config = config_flags.DEFINE_config_file("config", None, "", flag_values=values, sys_argv=argv)
    parse_flags(argv, values)
    return make_settings(config.value)


def parse_flags(argv: Sequence[str], values: flags.FlagValues) -> list[str]:
    """Parses a command line with a flag `config`; returns the arguments that are no flags.

    Args:
        argv: program and arguments.
        values: the flags, of which `config` is defined by `config_flags`.

    Raises:
        UserError: anything that is wrong with a flag or in the configuration.
    """
    # ml_collections gives every file the same module name, so an earlier file would show through,
    # and loads it by a function that a later Python drops.
    sys.modules.pop("config_config", None)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            rest = values(argv)
        if values["config"].value is None:
            raise UserError(
                f"--config: missing; name a file, or one of {', '.join(config_names())}"
            )
        # ml_collections reports a missing file only where the configuration is used.
        config: Any = values["config"].value
        if not (config.system and isinstance(config, ml_collections.ConfigDict)):
            raise UserError("config: get_config returns no configuration of a system")
        return rest
    except UserError as error:
        raise _innermost(error) from error
    except OSError as error:
        raise UserError(f"config: {_last_line(error)}") from error
    except flags.Error as error:
        if "Error whilst parsing config file" in str(error):
            raise _innermost(error, _place(error, argv)) from error
        first = str(error).strip().splitlines()[0]
        last = _last_line(error)
        raise UserError(first if first == last else f"{first} {last}") from error
    except AttributeError as error:
        cause: object = error
        while isinstance(cause, Exception) and cause.args and isinstance(cause.args[0], Exception):
            cause = cause.args[0]  # ml_collections wraps a KeyError that knows similar names
        reason = cause.args[0] if isinstance(cause, Exception) and cause.args else cause
        if str(reason) == "module 'config_config' has no attribute 'get_config'":
            raise UserError(f"config: {_path(argv).name}: has no function get_config") from error
        raise UserError(f"config: {_place(error, argv)}no such field: {reason}") from error
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a configuration is a program, and may raise or end at will
        if isinstance(error, SystemExit) and _HELP.intersection(argv):
            raise
        where = _place(error, argv)
        raise UserError(f"config: {where}{type(error).__name__}: {error}") from error


_HELP = {"-?", "--help", "--helpshort", "--helpfull", "--helpxml"}
"""Flags of absl at which parsing prints a help text and ends the process."""


def _innermost(error: BaseException, where: str = "") -> UserError:
    """Returns the error that a configuration raised; ml_collections and absl wrap its text.

    Args:
        error: as it was raised at last.
        where: of `_place`.
    """
    while error.__context__ is not None:
        error = error.__context__
    if isinstance(error, UserError):
        return error
    return UserError(f"config: {where}{type(error).__name__}: {_last_line(error)}")


def _place(error: BaseException, argv: Sequence[str]) -> str:
    """Returns "my_losses.py:12: ", the line of the configuration or of a file beside it.

    It is the innermost such line that led to the error, and "" where there is none: then a flag is
    wrong, not a line.
    """
    folder, found = _path(argv).parent.resolve(), ""
    at: BaseException | None = error
    while at is not None:
        for frame in traceback.extract_tb(at.__traceback__):
            if Path(frame.filename).resolve().parent == folder:
                found = f"{Path(frame.filename).name}:{frame.lineno}: "
        at = at.__context__
    return found


def _path(argv: Sequence[str]) -> Path:
    """Returns the file that a command line names as its configuration."""
    text = ""
    for argument, following in itertools.zip_longest(argv, argv[1:], fillvalue=""):
        flag, equals, value = argument.partition("=")
        if flag in ("--config", "-config"):
            text = value if equals else following
    return Path(text.partition(":")[0])


def _last_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[-1].strip()
