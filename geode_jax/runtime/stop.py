"""SIGTERM and Ctrl-C: a run saves what it has, prints a line, and ends within seconds.

Python runs signal handlers in the main thread, between two of its own instructions, so never while
XLA compiles there. A thread is notified of a signal at once. It ends the process if the main thread
does not get to it in time and nothing would be lost.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator

import jax

from geode_jax.runtime.distributed import Vote

GRACE_SECONDS = 5
"""Time for the main thread to end the process by itself, where nothing would be lost."""

TOGETHER_SECONDS = 60
"""The same for one of several processes, which must first agree with the others on the end."""

AGAIN_SECONDS = 1
"""A second Ctrl-C later than this after the first ends the process without saving."""

_NAMES: dict[int, str] = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}


class Stopped(SystemExit):
    """A signal ends the process, with the exit status that shells have for it."""

    def __init__(self, signum: int, done: str):
        """Args:
        signum: number of the signal.
        done: what was saved, for the user.
        """
        self.status = 128 + signum
        super().__init__(self.status)
        self.line = f"stopped by {_NAMES[signum]} {done}; the same command resumes"


class Stop:
    """Listens for SIGTERM and Ctrl-C; a context manager of the main thread.

    A signal raises `Stopped` in the main thread, except within `deferred`, whose code checks
    `signum` itself. In one of several processes the signal is only recorded (see `Ballot`): the
    others would wait for that process at the next barrier.

    Attributes:
        signum: number of the signal that arrived; 0: none yet.
        unsaved: whether steps would be lost if the process ended now.
    """

    def __init__(self):
        self.signum = 0
        self.unsaved = False
        self._deferred = 0
        self._since = 0.0
        self._left = threading.Event()

    def __enter__(self):
        self._read, self._write = os.pipe()
        for end in (self._read, self._write):
            os.set_blocking(end, end == self._read)
        self._before = {number: signal.signal(number, self._hear) for number in _NAMES}
        self._unraisable, sys.unraisablehook = sys.unraisablehook, self._report
        self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._watcher = threading.Thread(target=self._watch, daemon=True, name="signals")
        self._watcher.start()
        return self

    def __exit__(self, *_):
        self._left.set()
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        sys.unraisablehook = self._unraisable
        os.close(self._write)
        self._watcher.join()
        os.close(self._read)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Within the block, a signal is only recorded in `signum`."""
        self._deferred += 1
        try:
            yield
        finally:
            self._deferred -= 1

    def _hear(self, signum: int, _) -> None:
        self.signum = self.signum or signum
        if not self._deferred and jax.process_count() == 1:
            raise Stopped(signum, "before its end, nothing is lost")

    def _report(self, unraisable: "sys.UnraisableHookArgs") -> None:
        """Reports an exception that Python drops, except `Stopped`.

        Python drops what a handler raises while a finalizer or a callback of the garbage collector
        runs (JAX has one). The thread then ends the process.
        """
        if not isinstance(unraisable.exc_value, Stopped):
            self._unraisable(unraisable)

    def _watch(self) -> None:
        """Reads the numbers of signals as they arrive; runs in its own thread."""
        while number := os.read(self._read, 1):
            if number[0] not in _NAMES:
                continue
            first = not self._since
            if first:
                self._since = time.monotonic()
                threading.Thread(target=self._end, args=(number[0],), daemon=True).start()
            elif number[0] == signal.SIGINT and time.monotonic() - self._since > AGAIN_SECONDS:
                self._leave(number[0], "twice, nothing more is saved")

    def _end(self, signum: int) -> None:
        """Ends the process if the main thread does not, as soon as nothing would be lost."""
        grace = TOGETHER_SECONDS if jax.distributed.is_initialized() else GRACE_SECONDS
        while not self._left.wait(grace):
            if not self.unsaved:
                self._leave(signum, "before its end, nothing is lost")

    def _leave(self, signum: int, done: str) -> None:
        stopped = Stopped(signum, done)
        for child in multiprocessing.active_children():
            child.kill()
        print(stopped.line, flush=True)
        sys.stderr.flush()
        os._exit(stopped.status)


class Ballot:
    """Decides together with all processes of a run whether to stop."""

    def __init__(self, stop: Stop, mesh: jax.sharding.Mesh):
        self._stop = stop
        self._vote = Vote(mesh, 1) if jax.process_count() > 1 else None

    def check(self) -> None:
        """Stops if a signal arrived; all processes call it at the same points of the program.

        Raises:
            Stopped: a signal arrived at any of the processes.
        """
        signum = self._stop.signum
        if self._vote is not None:
            signum = self._vote.cast(bool(signum))[0] and (signum or signal.SIGTERM)
        if signum:
            raise Stopped(signum, "before its end, nothing is lost")
