"""How a command ends on an error: one line on stderr and an exit status."""

import contextlib
import os
import sys
from collections.abc import Iterator

from geode_jax.errors import line_and_status


def open_standard_streams() -> None:
    """Opens the null device in place of standard streams that the caller has closed (`2>&-`).

    Otherwise their descriptors would be those of the next files that are opened, and what a
    library prints to "stderr" would be written into a run's lock or metrics.
    """
    for descriptor, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(descriptor)
        except OSError:
            # The new descriptor has the lowest number that is free, which is this one.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(descriptor, mode, closefd=False))


@contextlib.contextmanager
def reported() -> Iterator[None]:
    """Ends the process with one line on stderr where a traceback would not help the user.

    Errors that the user can correct print `error: ...` and exit with 2: `UserError`, what the
    operating system refuses (a missing file, a full disk), and too little memory. Ctrl-C exits with
    130. If the reader of stdout closes it early (`| head`), the process exits with 1 and prints
    nothing.
    """
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes stdout once more when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (Exception, KeyboardInterrupt) as error:
        found = line_and_status(error)
        if found is None:
            raise
        print(found[0], file=sys.stderr)
        sys.exit(found[1])
