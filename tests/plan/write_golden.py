"""Writes the golden files of `hlo_test`: one small training step, as three compilers compile it.

    python -m tests.plan.write_golden v5e:2x2 h100:1x4 cpu

The compilers of absent chips are those of the extra `plan`. The figures in the test are of this
step's shapes; check them by hand if another version of a compiler changes a file.
"""

import os
import re
import sys
from pathlib import Path

GOLDEN = Path(__file__).parent / "golden"
LAYERS, ROWS, WIDTH, MLP_WIDTH = 3, 32, 128, 256
MESH = (1, 2, 2)  # data, fsdp, model


def compile_step(devices: list, options: dict[str, bool]) -> str:
    """Returns the HLO of a step of gradient descent on residual MLPs in a scan."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import PartitionSpec

    from geode_jax.sharding import make_mesh

    mesh = make_mesh(MESH, devices)

    def shape(*sizes: int, axes: tuple) -> jax.ShapeDtypeStruct:
        sharding = jax.sharding.NamedSharding(mesh, PartitionSpec(*axes))
        return jax.ShapeDtypeStruct(sizes, jnp.bfloat16, sharding=sharding)

    def layer(x, weights):
        up, down = weights
        return x + jnp.tanh(x @ up) @ down, None

    def loss(weights, x):
        return jnp.sum(jax.lax.scan(layer, x, weights)[0].astype(jnp.float32) ** 2)

    def step(weights, x):
        return jax.tree.map(jnp.subtract, weights, jax.grad(loss)(weights, x))

    weights = (
        shape(LAYERS, WIDTH, MLP_WIDTH, axes=(None, "fsdp", "model")),
        shape(LAYERS, MLP_WIDTH, WIDTH, axes=(None, "model", "fsdp")),
    )
    x = shape(ROWS, WIDTH, axes=("fsdp",))
    with jax.set_mesh(mesh):
        placed = jax.jit(step, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, weights))
        return placed.lower(weights, x).compile(compiler_options=options).as_text()


def main(topology: str) -> None:
    """Writes the file of one topology, without the tables of source lines."""
    name = topology.partition(":")[0]
    if name == "cpu":
        os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
        import jax

        devices, options = jax.devices("cpu"), {}
    else:
        from geode_jax.plan.compiled import GPU_OPTIONS
        from geode_jax.plan.topology import devices_of, parse_topology

        place = parse_topology(topology)
        devices, options = devices_of(place), GPU_OPTIONS if place.chip.platform == "cuda" else {}
    text = compile_step(devices, options)
    text = re.sub(r"^FileNames\n.*?(?=^[%E])", "", text, flags=re.DOTALL | re.MULTILINE)
    (GOLDEN / f"{name}.hlo").write_text(re.sub(r" stack_frame_id=\d+", "", text))


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        main(argument)
