"""Files of configurations and the flags that override their fields; errors are one line.

`geode-jax train CONFIG --config.train.steps=500`, `python -m geode_jax.main --config=CONFIG` and
`geode-jax plan --config CONFIG --set train.steps=500` read them in the same way. CONFIG is
`NAME[:ARGUMENTS]` of a shipped configuration or `PATH[:ARGUMENTS]`.

The shipped configurations are the folder `configs` of a checkout and `geode_jax/configs` of an
installed package. Both are importable as `geode_jax.configs`: in a checkout, `geode_jax/configs` is
a link.
"""

import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags

from geode_jax.errors import UserError
from geode_jax.exports import files
from geode_jax.runs.config import make_settings
from geode_jax.runs.settings import Settings

SHIPPED = Path(__file__).resolve().parents[1] / "configs"
"""Folder of the configurations that come with the package."""


def config_names() -> list[str]:
    """Returns the names of the shipped configurations, without the files that they share."""
    found = sorted(SHIPPED.glob("*.py"))
    return [path.stem for path in found if "\ndef get_config(" in files.read_text(path)]


def find_config(text: str) -> str:
    """Returns `PATH[:ARGUMENTS]` of a configuration, and makes its own modules importable.

    Args:
        text: `NAME[:ARGUMENTS]` of a shipped configuration, such as `hidden_cot:thinking=0`, or
            `PATH[:ARGUMENTS]`. The folder of a file that is not shipped becomes the first entry of
            `sys.path`, as for a script, so that the file can import modules beside it.

    Raises:
        UserError: it is neither a name nor a regular file.
    """
    name, colon, arguments = text.partition(":")
    if name in config_names():
        return f"{SHIPPED / name}.py{colon}{arguments}"
    path = Path(name)
    if not os.path.lexists(path):
        names = ", ".join(config_names())
        raise UserError(f"--config: {name}: no such file, and not one of {names}")
    if not path.is_file():
        raise UserError(f"--config: {name}: not a regular file")
    folder = path.resolve().parent
    if folder != SHIPPED.resolve() and str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    return text


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
    sys.modules.pop("config_config", None)  # ml_collections loads the next file into the same one,
    try:
        with warnings.catch_warnings():  # by a function that Python is about to drop
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
            raise _innermost(error) from error
        first = str(error).strip().splitlines()[0]
        last = _last_line(error)
        raise UserError(first if first == last else f"{first} {last}") from error
    except AttributeError as error:
        cause: object = error
        while isinstance(cause, Exception) and cause.args and isinstance(cause.args[0], Exception):
            cause = cause.args[0]  # ml_collections wraps a KeyError that knows similar names
        reason = cause.args[0] if isinstance(cause, Exception) and cause.args else cause
        raise UserError(f"config: no such field: {reason}") from error
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a configuration is a program, and may raise or end at will
        if isinstance(error, SystemExit) and _HELP.intersection(argv):
            raise
        raise UserError(f"config: {type(error).__name__}: {error}") from error


_HELP = {"-?", "--help", "--helpshort", "--helpfull", "--helpxml"}
"""Flags of absl at which parsing prints a help text and ends the process."""


def _innermost(error: BaseException) -> UserError:
    """Returns the error that a configuration raised; ml_collections and absl wrap its text."""
    while error.__context__ is not None:
        error = error.__context__
    if isinstance(error, UserError):
        return error
    return UserError(f"config: {type(error).__name__}: {_last_line(error)}")


def _last_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[-1].strip()
