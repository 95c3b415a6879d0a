"""The shipped configurations, and how a configuration is found by name or by path.

They are the folder `configs` of a checkout and `geode_jax/configs` of an installed package. Both
are importable as `geode_jax.configs`: in a checkout, `geode_jax/configs` is a link. Nothing slow is
imported here, since the help texts of `geode-jax` list the names.
"""

import os
import sys
from pathlib import Path

from geode_jax.errors import UserError
from geode_jax.exports import files

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
    if not name or not os.path.lexists(path):
        names = ", ".join(config_names())
        raise UserError(f"--config: {name}: no such file, and not one of {names}")
    if not path.is_file():
        raise UserError(f"--config: {name}: not a regular file")
    folder = path.resolve().parent
    if folder != SHIPPED.resolve() and str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    return text
