"""Worker processes that leave Ctrl-C to the process that started them."""

import contextlib
import signal
from collections.abc import Iterator
from multiprocessing import resource_tracker


@contextlib.contextmanager
def deaf_to_ctrl_c() -> Iterator[None]:
    """Processes started meanwhile never hear of Ctrl-C.

    A terminal sends it to all processes of a command. One of them shall answer, not each with a
    traceback. What does this is a signal mask of this thread: children inherit it.
    """
    resource_tracker.ensure_running()  # its start would let SIGINT through again
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
