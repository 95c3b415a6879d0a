"""Checks calls of the package's functions against their annotations while tests run."""

from typing import Any

from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook

PACKAGES = [f"geode_jax.{room}" for room in ("geometry", "models", "objectives", "ops")]

# As for type checkers, an int is a float.
_checked = beartype(conf=BeartypeConf(is_pep484_tower=True))


def checked(function):
    """Returns the function with its arguments and its result checked against its annotations.

    Constructors are left alone: a configuration refuses wrong values itself (`ranges.check`), and
    JAX builds its dataclasses with placeholders for arrays. Functions without annotations, such as
    the bodies of loops, are left alone because the check would cost a millisecond to build.
    """
    bare = all(annotation is Any for annotation in function.__annotations__.values())
    return function if bare or function.__name__ == "__init__" else _checked(function)


def install() -> None:
    """Makes every later import of `PACKAGES` check shapes, dtypes and types by `checked`."""
    install_import_hook(PACKAGES, f"{__name__}.{checked.__name__}")
