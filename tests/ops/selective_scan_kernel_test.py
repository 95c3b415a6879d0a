"""The scan's kernels: channels in blocks, eight devices, and the TPU's compiler."""

import importlib.util
import json

import jax
import numpy as np
import pytest

from geode_jax.ops import selective_scan_tpu
from geode_jax.ops.selective_scan import selective_scan
from tests.helpers.own_process import output_of
from tests.ops.selective_scan_test import oracle

KERNELS = ["selective_scan_backward", "selective_scan_forward"]


def test_channels_in_two_blocks_of_registers_the_last_padded(monkeypatch):
    monkeypatch.setattr(selective_scan_tpu, "POSITIONS", 8)
    random = np.random.default_rng(0)
    B, L, E, U = 1, 11, 1100, 2

    def normal(*shape):
        return random.standard_normal(shape).astype(np.float32)

    delta, A = random.uniform(0.01, 1, (B, L, E)), -random.uniform(0.05, 2, (E, U))
    delta, A = delta.astype(np.float32), A.astype(np.float32)
    inputs = normal(B, L, E), delta, A, normal(B, L, U), normal(B, L, U), normal(E), normal(B, U, E)
    first = np.zeros((B, L), bool)
    first[0, 9] = True
    slopes = normal(B, L, E), normal(B, U, E)

    def scan(*inputs):
        *rest, state = inputs
        return selective_scan(*rest, first_BL=first, state_BUI=state, implementation="tpu")

    out, vjp = jax.jit(lambda *a: jax.vjp(scan, *a))(*inputs)
    want, gradients = oracle(inputs, first, *slopes)
    for a, b in zip((*out, *jax.jit(vjp)(slopes)), (*want, *gradients), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6 * (1 + np.abs(b).max()) * E**0.5)


def test_an_implementation_that_does_not_exist():
    x = np.zeros((1, 2, 2), np.float32)  # L = I = U
    with pytest.raises(ValueError, match="'cuda' is none of chunked, tpu, gpu"):
        selective_scan(x, x, x[0], x, x, x[0, 0], implementation="cuda")


@pytest.mark.slow
def test_rows_and_channels_on_eight_devices():
    found = json.loads(output_of("tests.ops.selective_scan_mesh_run", devices=8))
    assert len(found) == 4
    for name, of in found.items():
        assert of["difference"] < 1e-5 and of["spread"] == 8, name
        # Sums over the devices are the only word between them.
        assert of["collectives"] == ["all-reduce"], name


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_kernels_compile_for_tpus_alone_and_in_the_step_of_stage_1():
    found = json.loads(output_of("tests.ops.selective_scan_compile_run", TPU_SKIP_MDS_QUERY="1"))
    assert len(found) == 7
    for name, of in found.items():
        assert of["kernels"] == KERNELS, name
