"""A limit on the size of files, which does to a writer what a full disk does."""

import contextlib
import resource
import signal


@contextlib.contextmanager
def full_disk(limit: int):
    """Within the block, a write past `limit` bytes of a file is an OSError."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
