"""The kernels for TPUs pass the TPU's compiler, alone and in a training step, without a TPU."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent.parent
KERNELS = ["attention_backward_keys", "attention_backward_queries", "attention_forward"]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_kernels_compile_for_tpus():
    alone = {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.ops.attention_compile_run"],
        env=os.environ | alone,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    if "libtpu multi-process lockfile" in done.stderr:
        pytest.skip("another process is using libtpu, which serves one at a time")
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert len(found) == 10
    for name, of in found.items():
        assert of["kernels"] == KERNELS, name
    for name in ("v5e:2x4 student", "v6e:2x4 InternViT", "v5p:2x2x1 Qwen2.5"):
        assert found[name]["calls"] == 3 and found[name]["collectives"] == [], name
