"""The user's cache folder, and a home for processes whose user has none.

Containers run as users that the system does not know, without HOME. Asking for a home is an error
there, and many libraries ask for one while they are imported.
"""

import os
from pathlib import Path

NO_HOME = "/nonexistent"
"""Home of users that have none, as in the accounts of the system itself."""


def user_cache(name: str) -> Path | None:
    """Returns a folder of this package in the user's cache, made if it is missing.

    The cache is XDG_CACHE_HOME or, on Linux, `.cache` of the home.

    Args:
        name: of the folder.

    Returns:
        None if there is no home, or nothing can be written there.
    """
    import platformdirs  # as every library, after `name_a_home`

    folder = platformdirs.user_cache_path("geode_jax") / name
    if not folder.is_absolute():  # without a home, `~` is left as it is
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return folder if os.access(folder, os.W_OK | os.X_OK) else None


def name_a_home() -> None:
    """Sets HOME, if there is none, to a folder that does not exist, so that nothing is kept there.

    Without HOME nltk cannot be imported, and other libraries make a folder named `~` in the current
    one.
    """
    if os.path.expanduser("~") == "~":
        os.environ["HOME"] = NO_HOME
