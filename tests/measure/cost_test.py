import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from geode_jax.measure import cost


def test_parameters_of_real_and_abstract_arrays():
    tree = {
        "kernel": jnp.zeros((3, 4), jnp.float32),
        "bias": jnp.zeros((4,), jnp.bfloat16),
        "scale": np.float32(1.0),
    }
    expected = {"parameters": 17, "bytes": 48 + 8 + 4}
    assert cost.parameter_counts(tree) == expected
    assert cost.parameter_counts(jax.eval_shape(lambda: tree)) == expected


def test_speed_is_per_sample_and_excludes_warm_up():
    calls = []

    def run():
        calls.append(None)
        time.sleep(0.2 if len(calls) == 1 else 0.02)
        return jnp.zeros(())

    found = cost.measure_speed(run, samples=10, repeats=3)
    assert len(calls) == 4
    assert 2.0 <= found["ms_per_sample"] < 15.0
    assert found["samples_per_second"] == pytest.approx(1e3 / found["ms_per_sample"])


def test_peak_memory_sees_an_allocation():
    before = cost.peak_memory()["peak_memory_bytes"]
    assert 20e6 < before < 1e12
    block = np.ones(before + 50_000_000, np.uint8)
    assert cost.peak_memory()["peak_memory_bytes"] > before + 40_000_000
    del block
