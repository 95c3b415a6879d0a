"""Settings of the process that a run needs: memory, and the cache of compiled programs."""

import contextlib
import ctypes
import os

import jax

from geode_jax.runtime.user_cache import user_cache

_MMAP_MAX, _TRIM_THRESHOLD, _ARENA_MAX = -4, -1, -8  # of mallopt, malloc.h


def keep_freed_memory() -> None:
    """Makes glibc keep freed memory in the process.

    On CPUs, XLA allocates a program's buffers anew at every call. By default glibc returns large
    ones to the system each time, which then clears all pages of the next: a tenth of all CPU time.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(_ARENA_MAX, 1)  # the heaps of other arenas are too small for such buffers


def keep_compiled_programs() -> None:
    """Keeps compiled programs on disk, in JAX_COMPILATION_CACHE_DIR or else the user's cache."""
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR") or user_cache("xla")
    if folder is not None:
        jax.config.update("jax_compilation_cache_dir", str(folder))
