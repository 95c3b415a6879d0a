"""The user's cache folder, and what a process does that has no home at all.

Containers run as users that the system does not know, without HOME: a home that is asked for is an
error there, and many libraries ask for one while they are imported.
"""

import os
from pathlib import Path

NO_HOME = "/nonexistent"
"""The home of users that have none, as the system's own accounts have it."""


def user_cache(name: str) -> Path | None:
    """A folder of ours in the user's cache, made where it is missing.

    It is below XDG_CACHE_HOME, or `.cache` of the home.

    Args:
        name: of the folder.

    Returns:
        None where there is no home, or nothing can be written there.
    """
    given = os.environ.get("XDG_CACHE_HOME", "")
    root = Path(given) if os.path.isabs(given) else Path(os.path.expanduser("~")) / ".cache"
    folder = root / "geode_jax" / name
    if not folder.is_absolute():  # there is no home: `~` stays as it is
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return folder if os.access(folder, os.W_OK | os.X_OK) else None


def name_a_home() -> None:
    """Sets HOME where there is none, to a folder that cannot be: then nothing is kept there.

    Otherwise nltk does not import, and others make a folder named `~` where they stand.
    """
    if os.path.expanduser("~") == "~":
        os.environ["HOME"] = NO_HOME
