"""One writer at a time: the lock of a run's folder, of an export being made, of a cache.

The locks are POSIX record locks (`fcntl.lockf`). The system releases them when their process ends,
however it ends, and NFS carries them from host to host. The package `filelock` keeps neither
promise everywhere: it calls `flock`, which is local to a host on NFS mounted with `local_lock`
and on Lustre mounted with `localflock`, and where `flock` is missing it leaves a file that outlives
a killed process. A record lock belongs to a process and ends with the first closing of the file in
it, so a process opens a lock once.
"""

import contextlib
import datetime
import errno
import fcntl
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from geode_jax.errors import UserError
from geode_jax.exports.files import cannot_write, one_line

LOCK = ".lock"
"""Name of the lock in a folder that has one."""

_BUSY = (errno.EACCES, errno.EAGAIN)
_POLL_SECONDS = 0.5
_NAME_SECONDS = 0.2
"""Time for a new holder to write its name over that of the previous one."""

_held: set[str] = set()
"""Real paths of the locks that this process holds."""


@contextlib.contextmanager
def locked(file: Path, what: str, *, wait: bool = False, must: bool = False) -> Iterator[None]:
    """Holds a lock within the block.

    On a file system without locks, a line on stderr reports this and the block runs without one.

    Args:
        file: the lock's file; made if it is missing, and left behind.
        what: name of the locked thing, for messages.
        wait: wait for another holder, with a line on stderr; otherwise a holder is an error.
        must: a lock file that cannot be written is an error; otherwise the block runs unlocked.

    Raises:
        UserError: another process holds the lock; the message names it. Or see `must`.
    """
    name = os.path.realpath(file)
    if name in _held:
        raise UserError(f"{what}: this process is at work on it already")
    made = not file.parent.exists()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
    except OSError as error:
        if must:
            raise cannot_write(file, error) from None
        _report_unlocked(what, error)
        yield
        return
    _held.add(name)
    try:
        _take(descriptor, what, wait)
        if not os.path.lexists(file):  # its holder removed it, below, after it was opened here
            raise UserError(f"{what}: another process was at work on it; start again")
        yield
    except BaseException:
        if made:  # remove the folder, if nothing else is in it
            with contextlib.suppress(OSError):
                if os.listdir(file.parent) == [file.name]:
                    file.unlink()
                    file.parent.rmdir()
        raise
    finally:
        _held.discard(name)
        os.close(descriptor)


def beside(folder: Path) -> Path:
    """Returns the lock file that lies beside a folder which must be empty at first (an export)."""
    folder = Path(os.path.realpath(folder))
    return folder.with_name(f".{folder.name}{LOCK}")


def _take(descriptor: int, what: str, wait: bool) -> None:
    reported = False
    while True:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError as error:
            if error.errno not in _BUSY:
                _report_unlocked(what, error)
                return
        time.sleep(_NAME_SECONDS)
        holder = one_line(os.pread(descriptor, 200, 0).decode(errors="replace"))
        holder = holder or "another process"
        if not wait:
            raise UserError(f"{what}: {holder} is at work on it")
        if not reported:
            print(f"{what}: waiting for {holder}", file=sys.stderr, flush=True)
            reported = True
        time.sleep(_POLL_SECONDS)
    now = datetime.datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    with contextlib.suppress(OSError):  # a full disk: the lock holds without its name
        os.ftruncate(descriptor, 0)
        own = f"process {os.getpid()} on {socket.gethostname()}, since {now}\n"
        os.pwrite(descriptor, own.encode(), 0)
        os.fsync(descriptor)


def _report_unlocked(what: str, error: OSError) -> None:
    reason = error.strerror or one_line(str(error))
    print(f"{what}: goes without a lock: {reason}", file=sys.stderr, flush=True)
