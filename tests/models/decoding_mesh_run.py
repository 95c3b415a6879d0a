"""The laptop student's answering on eight devices of fsdp: where its all-gathers stand, JSON.

XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m tests.models.decoding_mesh_run
"""

import json
import re

import jax
from flax import nnx

from configs import hidden_cot
from geode_jax.plan.compiled import make_run
from geode_jax.runs.config import make_settings
from geode_jax.sharding import replicated


def main() -> None:
    """Counts them in the entry computation and in all others, which are loops' and their like."""
    run = make_run(make_settings(hidden_cot.get_config("laptop")), jax.devices(), (1, 8, 1), 8)

    def answer(state, batch):
        model = nnx.merge(run.graph, state.params, state.frozen)
        encoded = run.objective.encode_scene(model, batch)
        return run.objective.answer(model, encoded, batch, run.data.eos_id)

    with jax.set_mesh(run.mesh):
        step = jax.jit(answer, out_shardings=replicated(run.mesh))
        text = step.lower(run.state, run.batch()).compile().as_text()
    found, inside = {"entry": 0, "others": 0}, "others"
    for line in text.splitlines():
        if re.match(r"(ENTRY )?%?[\w.\-]+ .*\{$", line):
            inside = "entry" if line.startswith("ENTRY") else "others"
        found[inside] += bool(re.search(r" all-gather(-start)?\(", line))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
