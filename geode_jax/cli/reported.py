"""How a command ends on an error: one line on stderr and an exit status."""

import contextlib
import os
import sys
from collections.abc import Iterator

from geode_jax.errors import line_and_status


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
