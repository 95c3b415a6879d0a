"""The documentation's example of reading a run's checkpoint elsewhere, run as it stands there."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

REPOSITORY = Path(__file__).resolve().parent.parent
PAGE = REPOSITORY / "docs" / "how-to" / "checkpoints.md"
REPORT = """
import json
leaves = {jax.tree_util.keystr(path): x for path, x in jax.tree.leaves_with_path(params)}
print(json.dumps({
    "devices": jax.device_count(),
    "spread": sum(not x.is_fully_replicated for x in leaves.values()),
    "sums": {name: float(abs(x).sum()) for name, x in leaves.items()},
    "modules": sorted(name for name in __import__("sys").modules if "." not in name),
}))
"""


def example() -> str:
    return re.search(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)[1]


@pytest.mark.slow  # needs a trained run
def test_a_checkpoint_is_read_on_four_devices_with_orbax_and_jax_alone(tiny_run):
    from geode_jax.runs.trained import open_trained

    code = example()
    assert code.count("runs/hidden_cot") == 1
    child = subprocess.run(
        [sys.executable, "-c", code.replace("runs/hidden_cot", str(tiny_run.workdir)) + REPORT],
        cwd="/",
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"},
        check=True,
        capture_output=True,
        text=True,
        timeout=300,
    )
    found = json.loads(child.stdout.splitlines()[-1])
    assert found["devices"] == 4 and found["spread"] > 20
    assert not {"geode_jax", "flax"} & {*found["modules"]}
    own = {
        "".join(f"['{part}']" for part in (*path, "value")): float(np.abs(variable[...]).sum())
        for path, variable in nnx.to_flat_state(open_trained(tiny_run.workdir).state.params)
    }
    assert found["sums"].keys() == own.keys()
    for name, total in own.items():
        np.testing.assert_allclose(found["sums"][name], total, rtol=1e-5)
