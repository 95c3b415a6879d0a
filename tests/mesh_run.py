"""What `mesh_test` starts with eight devices: a system trained and asked on several meshes.

    python -m tests.mesh_run student|pretrain|align|drm|joint EXPORT START OUT MESH...

Writes OUT/found.json, and OUT/MESH.hlo, the compiled step.
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from geode_jax.runs import build
from geode_jax.runs.config import make_settings
from geode_jax.sharding import make_mesh, rows_of_process, shard_batch
from geode_jax.training.step import make_train_step
from tests.helpers.runs import tiny_config, tiny_geode_config

STEPS, SCENES = 20, 8


def spread(x: jax.Array) -> list:
    """Its shape, and the mesh axes that each of its axes is spread on."""
    spec = [*x.sharding.spec, *(None,) * (x.ndim - len(x.sharding.spec))]
    return [
        list(x.shape),
        [[] if on is None else [on] if isinstance(on, str) else on for on in spec],
    ]


def measure(config, workdir: Path) -> dict:
    """Losses, answers and shardings of a run on the mesh that `runs.build` makes."""
    run = build.build(make_settings(config), workdir)
    state, mesh = run.state, run.mesh
    params = {".".join(map(str, path)): v for path, v in nnx.to_flat_state(state.params)}
    found = {
        "params": {name: spread(v.get_value()) for name, v in params.items()},
        "moments": [spread(x) for x in jax.tree.leaves(state.opt_state) if x.ndim > 1],
    }
    with jax.set_mesh(mesh):
        step, losses = None, []
        train_step = make_train_step(run.objective, run.graph, run.optimizer, state, 1)
        for _, batch in run.pipelines["train"].iterate(0, STEPS, rows_of_process(mesh, SCENES)):
            batch = shard_batch(batch, mesh, SCENES)
            step = step or train_step.lower(state, batch).compile()
            state, metrics = step(state, batch)
            losses.append(float(metrics["loss"]))
        heads = run.settings.system.has_thinking_tokens
        seen = run.evaluator.run(state, run.pipelines["test"], 2, heads=heads)
        found["val"] = run.evaluator.losses(state, run.pipelines["val"], 2)
    workdir.with_suffix(".hlo").write_text(step.as_text())
    return found | {
        "losses": losses,
        "depth": seen.depth.result(),
        "said": [p["prediction"] for p in seen.predictions],
        "values": [p.get("predicted_value") for p in seen.predictions],
    }


def main(system: str, export: str, start: str, out: str, *meshes: str) -> None:
    """See the module's docstring."""
    found = {}
    for name in meshes:
        shape = tuple(map(int, name.split("x")))
        build.make_mesh = lambda _, s=shape: make_mesh(s, jax.devices()[: int(np.prod(s))])
        if system == "student":
            config = tiny_config(Path(export), steps=STEPS)
        else:
            config = tiny_geode_config(system, Path(export), start)
        with config.unlocked():
            config.train.steps = STEPS
            config.data.scenes_per_batch = SCENES
            if system == "student":
                config.model.heads = 8
        found[name] = measure(config, Path(out) / name)
    (Path(out) / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
