"""Scripts in a process of their own: many devices, or a compiler for chips that are not there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


def output_of(module: str, *arguments: str, devices: int = 1, **environment: str) -> str:
    """What `python -m module` prints; the test fails where it does.

    Args:
        module: run in the repository's folder.
        *arguments: its own.
        devices: of the CPU. Each gets threads of its own, in which it may wait for the others.
        **environment: variables besides those of this process.
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
