"""Runs as shapes: steps, parameters, bytes, and the errors of compilers."""

import jax
import pytest

from configs.geode_joint import get_config as geode
from configs.hidden_cot import get_config as student
from geode_jax.errors import UserError
from geode_jax.plan.compiled import make_run, missing_memory
from geode_jax.runs.config import make_settings


def test_a_run_knows_its_steps_parameters_and_what_no_batch_can_do_without():
    run = make_run(make_settings(student("full")), jax.devices()[:1], scenes=4)
    assert run.steps == 5 * 1600 // 4
    counts = run.parameters()
    assert counts["parameters"] == counts["trainable"] == 1_387_658_442
    # Parameters and two moments in float32; counters besides.
    assert run.state_bytes() == pytest.approx(12 * counts["parameters"], rel=1e-5)
    joint = make_run(make_settings(geode("full")), jax.devices()[:1])
    assert joint.parameters()["trainable"] < joint.parameters()["parameters"]


def test_a_mesh_that_does_not_multiply_is_refused():
    with pytest.raises(UserError, match=r"--mesh: .*does not multiply to the 1 devices"):
        make_run(make_settings(student("laptop")), jax.devices()[:1], (3, 5, 1))


def test_what_the_compiler_says_where_memory_is_short():
    said = "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space "
    said += "hbm. Used 20.50G of 15.75G hbm. Exceeded hbm capacity by 4.75G."
    assert missing_memory(said) == int(20.5 * 2**30)
    said = "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
    said += "temporaries (48.00G) exceeds available HBM (15.75G)."
    assert missing_memory(said) == 48 * 2**30
    assert missing_memory("RESOURCE_EXHAUSTED: no figures") == 0
    assert missing_memory("INVALID_ARGUMENT: 3 of 4") is None
