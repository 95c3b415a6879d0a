"""Measures the cost of a model (Table IV): parameters, bytes, time per sample, peak memory."""

import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np


def parameter_counts(parameters: Any) -> dict[str, int]:
    """Returns `parameters` (their number) and `bytes` of a pytree of arrays or of shapes."""
    leaves = jax.tree.leaves(parameters)
    sizes = [int(np.prod(leaf.shape)) for leaf in leaves]
    widths = [np.dtype(leaf.dtype).itemsize for leaf in leaves]
    return {
        "parameters": sum(sizes),
        "bytes": sum(size * width for size, width in zip(sizes, widths, strict=True)),
    }


def measure_speed(
    run: Callable[[], Any], samples: int, *, repeats: int = 3, warm_up: int = 1
) -> dict[str, float]:
    """Times a call after warm-up, until its result is there.

    Args:
        run: answers `samples` questions.
        samples: number of questions of a call, > 0.
        repeats: number of timed calls, of which the median is taken.
        warm_up: number of calls before these, which compile.

    Returns:
        `ms_per_sample` and `samples_per_second` (the paper's "inference time" and "FPS").
    """
    for _ in range(warm_up):
        jax.block_until_ready(run())
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - start)
    per_sample = float(np.median(seconds)) / samples
    return {"ms_per_sample": 1e3 * per_sample, "samples_per_second": 1.0 / per_sample}


def peak_memory() -> dict[str, int]:
    """Returns the peak memory of this process so far, in bytes.

    `peak_memory_bytes` is the resident set on the host. `peak_device_memory_bytes` is the largest
    of the local devices, if they keep statistics (the CPU backend does not).
    """
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Kilobytes on Linux, bytes on macOS.
    peak = {"peak_memory_bytes": resident if sys.platform == "darwin" else resident * 1024}
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    device_peaks = [entry["peak_bytes_in_use"] for entry in stats if "peak_bytes_in_use" in entry]
    if device_peaks:
        peak["peak_device_memory_bytes"] = max(device_peaks)
    return peak
