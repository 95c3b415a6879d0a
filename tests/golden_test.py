"""The first losses of both systems are those of `golden/losses.json` (make test-slow).

They are those of before the files were rearranged by layers. For a change that is meant to change
the numbers, take new ones from `python -m tests.golden_run FOLDER`, without XLA_FLAGS.
"""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.golden_run import STEPS
from tests.helpers.own_process import output_of

GOLDEN = Path(__file__).with_name("golden") / "losses.json"


@pytest.mark.slow
def test_the_first_losses_are_what_they_were(tmp_path):
    """Bitwise where jax and the CPU's instructions are those of the file; elsewhere nearly."""
    golden = json.loads(GOLDEN.read_text())
    # Without the compiler flags of `conftest`, which change how sums are rounded.
    plain = {"XLA_FLAGS": "", "JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}
    printed = output_of("tests.golden_run", str(tmp_path), **plain)
    found = json.loads(printed.splitlines()[-1])
    assert found["losses"].keys() == golden["losses"].keys()
    same_machine = found["made_with"] == golden["made_with"]
    for run, expected in golden["losses"].items():
        assert len(expected) == STEPS
        if same_machine:
            assert found["losses"][run] == expected, run
            continue
        own, theirs = (
            [float.fromhex(x) for x in losses] for losses in (found["losses"][run], expected)
        )
        np.testing.assert_allclose(own, theirs, rtol=1e-5, err_msg=run)
