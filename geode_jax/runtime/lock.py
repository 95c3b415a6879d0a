"""One writer at a time: the lock of a run's folder, of an export being made, of a cache.

POSIX record locks (`fcntl.lockf`): the system releases them when their process ends, however it
ends, and NFS carries them from host to host, which `flock` is not on every system. They belong to
a process: they go with the first closing of the file in it, so that a lock is opened once.
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
"""So long may a holder take to write who it is, over the name of the one before."""

_held: set[str] = set()


@contextlib.contextmanager
def locked(file: Path, what: str, *, wait: bool = False, must: bool = False) -> Iterator[None]:
    """Holds a lock within the block.

    On a file system without locks a line on stderr says so, and the block runs without one.

    Args:
        file: of the lock; made where it is missing, and left behind.
        what: is locked, for messages.
        wait: for whoever holds it, with a line on stderr; else it is an error.
        must: whether a file that cannot be written is an error; else it is as without locks.

    Raises:
        UserError: another process holds it; the message says which. Or see `must`.
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
        _say_without(what, error)
        yield
        return
    _held.add(name)
    try:
        _take(descriptor, what, wait)
        if not os.path.lexists(file):  # removed below, between our opening and our taking it
            raise UserError(f"{what}: another process was at work on it; start again")
        yield
    except BaseException:
        if made:  # and nothing came into the folder
            with contextlib.suppress(OSError):
                if os.listdir(file.parent) == [file.name]:
                    file.unlink()
                    file.parent.rmdir()
        raise
    finally:
        _held.discard(name)
        os.close(descriptor)


def beside(folder: Path) -> Path:
    """The lock of a folder that must be empty at first, as an export: it lies beside it."""
    folder = Path(os.path.realpath(folder))
    return folder.with_name(f".{folder.name}{LOCK}")


def _take(descriptor: int, what: str, wait: bool) -> None:
    told = False
    while True:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError as error:
            if error.errno not in _BUSY:
                _say_without(what, error)
                return
        time.sleep(_NAME_SECONDS)
        holder = one_line(os.pread(descriptor, 200, 0).decode(errors="replace"))
        holder = holder or "another process"
        if not wait:
            raise UserError(f"{what}: {holder} is at work on it")
        if not told:
            print(f"{what}: waiting for {holder}", file=sys.stderr, flush=True)
            told = True
        time.sleep(_POLL_SECONDS)
    now = datetime.datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    with contextlib.suppress(OSError):  # a full disk: the lock holds without its name
        os.ftruncate(descriptor, 0)
        own = f"process {os.getpid()} on {socket.gethostname()}, since {now}\n"
        os.pwrite(descriptor, own.encode(), 0)
        os.fsync(descriptor)


def _say_without(what: str, error: OSError) -> None:
    reason = error.strerror or one_line(str(error))
    print(f"{what}: goes without a lock: {reason}", file=sys.stderr, flush=True)
