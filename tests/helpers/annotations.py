"""Checks the arrays of calls of the package's functions against their annotations in all tests."""

import inspect
from typing import Any, get_args

from beartype import beartype
from jaxtyping import AbstractArray, install_import_hook

PACKAGES = [f"geode_jax.{room}" for room in ("geometry", "models", "objectives", "ops")]


def checked(function):
    """Returns the function with shapes and dtypes of its arrays checked against its annotations.

    Other annotations are the static type checker's: tests may pass doubles of other classes.
    Constructors are left alone, since JAX builds dataclasses with placeholders for arrays.
    """
    arrays = {
        name: annotation
        for name, annotation in function.__annotations__.items()
        if has_array(annotation)
    }
    if not arrays or function.__name__ == "__init__":
        return function
    function.__annotations__ = arrays
    return beartype(function)


def has_array(annotation: Any) -> bool:
    """Returns whether an annotation contains an array with a shape."""
    own = inspect.isclass(annotation) and issubclass(annotation, AbstractArray)
    return own or any(map(has_array, get_args(annotation)))


def install() -> None:
    """Makes every later import of `PACKAGES` check its functions by `checked`."""
    install_import_hook(PACKAGES, f"{__name__}.{checked.__name__}")
