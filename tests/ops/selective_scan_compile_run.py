"""The selective scan, and GEODE's stage 1 with it, compiled for TPUs that are not there; JSON.

JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 python -m tests.ops.selective_scan_compile_run
"""

import json

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding

from configs import geode_drm
from geode_jax import sharding
from geode_jax.ops.selective_scan import selective_scan
from geode_jax.plan.compiled import KERNEL, make_run
from geode_jax.runs.config import make_settings
from tests.ops.attention_compile_run import COLLECTIVE, MESHES


def look(compiled) -> dict:
    """What a test asks of a compiled program."""
    text = compiled.as_text()
    return {
        "kernels": sorted(set(KERNEL.findall(text))),
        "collectives": sorted(set(COLLECTIVE.findall(text))),
    }


def call(mesh, positions: int, channels: int, states: int) -> dict:
    """Forward and backward of one call, u in bfloat16."""

    def put(names, shape, dtype=jnp.float32):
        of = NamedSharding(mesh, sharding.spec(names, shape, mesh.shape))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=of)

    def both(u, delta, A, B, C, D, dy):
        out, vjp = jax.vjp(lambda *args: selective_scan(*args)[0], u, delta, A, B, C, D)
        return out, vjp(dy)

    rows = ("batch", "length", "inner")
    u = put(rows, (8, positions, channels), jnp.bfloat16)
    scalars = put((*rows[:2], None), (8, positions, states))
    args = (
        u,
        put(rows, u.shape),
        put(("inner", None), (channels, states)),
        scalars,
        scalars,
        put(("inner",), (channels,)),
        u,
    )
    with jax.set_mesh(mesh):
        return look(jax.jit(both).lower(*args).compile())


def main() -> None:
    """The rationale module's shape, and a smaller one whose channels fill no register."""
    found = {}
    for name, shape in MESHES.items():
        devices = topologies.get_topology_desc(name, platform="tpu").devices
        mesh = sharding.make_mesh(shape, list(devices))
        found[f"{name} full"] = call(mesh, 2048, 3072, 16)
        found[f"{name} odd"] = call(mesh, 77, 200, 4)
        if "step" not in found:
            run = make_run(make_settings(geode_drm.get_config()), devices, shape, 8)
            found["step"] = {"kernels": run.train_step().kernels}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
