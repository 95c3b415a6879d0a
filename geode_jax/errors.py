"""The one exception whose message is meant for the user, and how entry points report it."""

import contextlib
import os
import sys
from collections.abc import Iterator

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""


class UserError(Exception):
    """Bad input, said in one line: what, where, which rule."""


@contextlib.contextmanager
def reported() -> Iterator[None]:
    """Ends the process with one line on stderr instead of a traceback, where that says enough.

    What the user can mend is `error: ...` and exit status 2: UserError, ExportError, and what the
    operating system refuses (a missing file, a full disk). Ctrl-C exits with 130. A reader that
    goes away (`| head`) ends the output without a word.
    """
    from geode_jax.data.exports import ExportError

    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes stdout once more when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (UserError, ExportError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
