"""What ends a process in one line: memory that does not suffice."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from geode_jax.cli.reported import reported
from geode_jax.errors import line_and_status


def numpy_asks_for_too_much():
    np.zeros(2**60, np.uint8)


def jax_asks_for_too_much():
    jnp.zeros(2**44, jnp.float32).block_until_ready()


@pytest.mark.parametrize("ask", [numpy_asks_for_too_much, jax_asks_for_too_much])
def test_memory_that_does_not_suffice_is_one_line(ask, capsys):
    with pytest.raises(SystemExit) as ended, reported():
        ask()
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: out of host memory: ") and "data.scenes_per_batch" in line
    assert len(line) < 600


def test_the_devices_memory_is_told_from_the_hosts(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    said = "RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nlong story\n" * 99
    line, status = line_and_status(jax.errors.JaxRuntimeError(said))
    assert status == 2 and "out of device memory: RESOURCE_EXHAUSTED: Out of memory all" in line
    assert "story" not in line and "train.microbatches" in line
    assert line_and_status(
        jax.errors.JaxRuntimeError("INTERNAL: CUDA_ERROR_OUT_OF_MEMORY: out of memory")
    )
    assert line_and_status(MemoryError())[0].startswith("error: out of host memory; ")


def test_another_error_keeps_its_traceback():
    for error in (jax.errors.JaxRuntimeError("INTERNAL: x"), RuntimeError("RESOURCE_EXHAUSTED")):
        assert line_and_status(error) is None
        with pytest.raises(type(error)), reported():
            raise error


def test_a_process_that_may_have_little_memory_ends_with_the_line():
    program = (
        "import jax, jax.numpy as jnp\nfrom geode_jax.cli.reported import reported\n"
        "with reported():\n    jnp.ones(2**20)\n    jnp.ones(2**31).block_until_ready()\n"
    )
    done = subprocess.run(
        ["bash", "-c", f'ulimit -v {8 * 2**20}; exec "$0" -c "$1"', sys.executable, program],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: out of host memory: RESOURCE_EXHAUSTED")
