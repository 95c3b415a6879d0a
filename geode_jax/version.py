"""The version of this package and the commit that it was made from.

`setup.py` runs this file by its path, so it imports nothing but the standard library.
"""

import contextlib
import functools
import subprocess
from pathlib import Path

STAMP = "COMMIT"
"""File beside this one that names the commit; `setup.py` writes it into a wheel or an archive."""


@functools.cache
def commit() -> str:
    """Returns the commit of this package, "unknown" where nothing records it.

    A wheel has a stamp. In a checkout git is asked; "-dirty" follows the commit of a checkout with
    changed files.
    """
    here = Path(__file__).resolve()
    with contextlib.suppress(OSError), open(here.with_name(STAMP), encoding="utf-8") as file:
        return file.read().strip()
    root = here.parents[1]
    if not (root / ".git").exists():  # git would look for a checkout above, which is another one
        return "unknown"
    describe = ("describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *describe], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip() or "unknown"


def software() -> str:
    """Returns name, version and commit of this package, for result files and `--version`."""
    from geode_jax import __version__

    return f"geode_jax {__version__} (commit {commit()})"
