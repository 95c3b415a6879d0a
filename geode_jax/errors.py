"""How entry points report the one exception whose message is meant for the user."""

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator

from geode_jax.exports.files import UserError, one_line

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""


def refuse_undecodable(arguments: Iterable[str]) -> None:
    """Refuses arguments of bytes that are not UTF-8, which could be neither printed nor stored.

    Raises:
        UserError: one is.
    """
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError:
            raise UserError(f"{argument}: not UTF-8; arguments must be") from None


@contextlib.contextmanager
def reported() -> Iterator[None]:
    """Ends the process with one line on stderr instead of a traceback, where that says enough.

    What the user can mend is `error: ...` and exit status 2: UserError, what the operating system
    refuses (a missing file, a full disk), and memory that does not suffice. Ctrl-C exits with 130.
    A reader that goes away (`| head`) ends the output without a word.
    """
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes stdout once more when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (Exception, KeyboardInterrupt) as error:
        said = said_of(error)
        if said is None:
            raise
        print(said[0], file=sys.stderr)
        sys.exit(said[1])


def said_of(error: BaseException) -> tuple[str, int] | None:
    """The line and the exit status of an error that needs no traceback; None of another."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", INTERRUPTED
    if isinstance(error, UserError | OSError):
        return f"error: {one_line(str(error))}", 2
    lacking = _lacking_memory(error)
    if lacking:
        what = one_line(str(error).strip().partition("\n")[0], 200).rstrip(".")
        return f"error: out of {lacking} memory{': ' * bool(what)}{what}; {_SMALLER}", 2
    return None


_SMALLER = (
    "training needs less with a smaller data.scenes_per_batch, more train.microbatches or a "
    "smaller model, other commands with fewer --workers or fewer or smaller scenes"
)


def _lacking_memory(error: BaseException) -> str:
    """Whose memory does not suffice, "host" or "device"; empty for another error."""
    if isinstance(error, MemoryError):
        return "host"
    jax = sys.modules.get("jax")
    if jax is None or not isinstance(error, jax.errors.JaxRuntimeError):
        return ""
    said = str(error)
    if "RESOURCE_EXHAUSTED" not in said and "out of memory" not in said.lower():
        return ""
    return "host" if jax.default_backend() == "cpu" else "device"
