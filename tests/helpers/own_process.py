"""Runs scripts in a separate process: with many devices, or a compiler for absent chips."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


def output_of(module: str, *arguments: str, devices: int = 1, **environment: str) -> str:
    """Returns what `python -m module` prints; the test fails if the module does.

    Args:
        module: module to run in the repository's folder.
        *arguments: arguments of the module.
        devices: number of CPU devices. Each has its own threads, so that it can wait for others.
        **environment: environment variables besides those of this process.
    """
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    own = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    if devices > 1:
        own["PJRT_NPROC"] = str(4 * devices)
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        env=os.environ | own | environment,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    if "libtpu multi-process lockfile" in done.stderr:
        pytest.skip("another process is using libtpu, which serves one at a time")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout
