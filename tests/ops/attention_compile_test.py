"""The kernels for TPUs pass the TPU's compiler, alone and in a training step, without a TPU."""

import importlib.util
import json

import pytest

from tests.helpers.own_process import output_of

KERNELS = ["attention_backward_keys", "attention_backward_queries", "attention_forward"]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_kernels_compile_for_tpus():
    found = json.loads(output_of("tests.ops.attention_compile_run", TPU_SKIP_MDS_QUERY="1"))
    assert len(found) == 10
    for name, of in found.items():
        assert of["kernels"] == KERNELS, name
    for name in ("v5e:2x4 student", "v6e:2x4 InternViT", "v5p:2x2x1 Qwen2.5"):
        assert found[name]["calls"] == 3 and found[name]["collectives"] == [], name
