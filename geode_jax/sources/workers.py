"""Worker processes that leave Ctrl-C to the process that started them."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from multiprocessing import resource_tracker


@contextlib.contextmanager
def shielded_from_ctrl_c() -> Iterator[None]:
    """Context in which processes are started that never receive SIGINT.

    A terminal sends SIGINT to all processes of a command, but only the main one should answer, not
    each with a traceback. Children inherit this thread's signal mask, which blocks it. A SIGINT
    that arrives meanwhile is raised at the end, so that no child is left half started.
    """
    resource_tracker.ensure_running()  # starting it later would unblock SIGINT
    handler, received = signal.getsignal(signal.SIGINT), []
    # Another thread may receive the signal; Python then runs the handler in the main thread.
    deferred = threading.current_thread() is threading.main_thread() and callable(handler)
    if deferred:
        signal.signal(signal.SIGINT, lambda *_: received.append(True))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if deferred:
            signal.signal(signal.SIGINT, handler)
        if received:
            signal.raise_signal(signal.SIGINT)
