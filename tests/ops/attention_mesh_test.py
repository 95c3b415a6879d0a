"""Attention by tiles on eight devices is attention on one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent.parent


@pytest.mark.slow
def test_rows_and_heads_on_eight_devices():
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, "-m", "tests.ops.attention_mesh_run"],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "XLA_FLAGS": flags},
        cwd=REPOSITORY,
        check=True,
        stdout=subprocess.PIPE,
    )
    found = json.loads(done.stdout)
    assert len(found) == 10
    for name, of in found.items():
        assert of["difference"] < 1e-5, name
        if name.startswith("2x2x2"):  # every device has its own part, and no word for the others
            assert of["spread"] == 8 and of["collectives"] == [], name
