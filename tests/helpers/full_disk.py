"""A limit on the size of files, which acts on a writer like a full disk."""

import contextlib
import resource
import signal


@contextlib.contextmanager
def full_disk(limit: int):
    """Makes writes past `limit` bytes of a file raise OSError within the block."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
