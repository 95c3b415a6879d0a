"""Worker processes that leave Ctrl-C to the process that started them."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from multiprocessing import resource_tracker


@contextlib.contextmanager
def deaf_to_ctrl_c() -> Iterator[None]:
    """Processes started meanwhile never hear of Ctrl-C.

    A terminal sends it to all processes of a command. One of them shall answer, not each with a
    traceback. What does this is a signal mask of this thread: children inherit it. This process
    hears of it at the end, so that no child is left half started.
    """
    resource_tracker.ensure_running()  # its start would let SIGINT through again
    handler, heard = signal.getsignal(signal.SIGINT), []
    # Another thread may get the signal, and Python then runs the handler in the main one.
    waits = threading.current_thread() is threading.main_thread() and callable(handler)
    if waits:
        signal.signal(signal.SIGINT, lambda *_: heard.append(True))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if waits:
            signal.signal(signal.SIGINT, handler)
        if heard:
            signal.raise_signal(signal.SIGINT)
