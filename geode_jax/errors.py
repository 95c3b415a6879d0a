"""Errors whose message is meant for the user: the line that reports them and the exit status."""

import sys
from collections.abc import Iterable

from geode_jax.exports.files import UserError, one_line

__all__ = ["INTERRUPTED", "UserError", "line_and_status", "one_line", "refuse_undecodable"]

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells define it."""


def refuse_undecodable(arguments: Iterable[str]) -> None:
    """Refuses arguments that are not UTF-8: they could be neither printed nor stored.

    Raises:
        UserError: an argument is not UTF-8.
    """
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError:
            raise UserError(f"{argument}: not UTF-8; arguments must be") from None


def line_and_status(error: BaseException) -> tuple[str, int] | None:
    """Returns the line and the exit status that report an error; None if it needs a traceback."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", INTERRUPTED
    if isinstance(error, UserError | OSError):
        return f"error: {one_line(str(error))}", 2
    place = _exhausted_memory(error)
    if place:
        what = one_line(str(error).strip().partition("\n")[0], 200).rstrip(".")
        return f"error: out of {place} memory{': ' * bool(what)}{what}; {_USE_LESS_MEMORY}", 2
    return None


_USE_LESS_MEMORY = (
    "training needs less with a smaller data.scenes_per_batch, more train.microbatches or a "
    "smaller model, other commands with fewer --workers or fewer or smaller scenes"
)


def _exhausted_memory(error: BaseException) -> str:
    """Returns which memory an error reports as exhausted: "host", "device" or ""."""
    if isinstance(error, MemoryError):
        return "host"
    jax = sys.modules.get("jax")
    if jax is None or not isinstance(error, jax.errors.JaxRuntimeError):
        return ""
    message = str(error)
    if "RESOURCE_EXHAUSTED" not in message and "out of memory" not in message.lower():
        return ""
    return "host" if jax.default_backend() == "cpu" else "device"
