"""Attention, and a training step with it, compiled for TPUs that are not there; prints JSON.

JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 python -m tests.ops.attention_compile_run
"""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding

from geode_jax import sharding
from geode_jax.objectives.hidden_cot import HiddenCoT, HiddenCoTConfig
from geode_jax.ops.attention import Intervals, attention
from geode_jax.training.optimizer import OptimizerConfig, make_optimizer
from geode_jax.training.step import blueprint, make_train_step
from tests.helpers.tiny_models import STUDENT, tiny_batch

MESHES = {"v5e:2x4": (2, 2, 2), "v6e:2x4": (1, 2, 4), "v5p:2x2x1": (1, 2, 2)}
KERNEL = re.compile(r"attention_(?:forward|backward_queries|backward_keys)")
COLLECTIVE = re.compile(r" (all-\w+|reduce-scatter|collective-permute)(?:-start)?\(")


def look(compiled) -> dict:
    """What a test asks of a compiled program."""
    text = compiled.as_text()
    return {
        "kernels": sorted(set(KERNEL.findall(text))),
        "calls": text.count('custom_call_target="tpu_custom_call"'),
        "collectives": sorted(set(COLLECTIVE.findall(text))),
    }


def call(mesh, heads: int, kv_heads: int, width: int, queries: int, keys: int) -> dict:
    """Forward and backward of one call in bfloat16."""

    def put(dtype, names, *shape):
        of = NamedSharding(mesh, sharding.spec(names, shape, mesh.shape))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=of)

    def both(q, k, v, intervals, g):
        out, vjp = jax.vjp(lambda q, k, v: attention(q, k, v, intervals), q, k, v)
        return out, vjp(g)

    names = ("batch", "length", "heads", "head_dim")
    q = put(jnp.bfloat16, names, 8, queries, heads, width)
    k = put(jnp.bfloat16, names, 8, keys, kv_heads, width)
    row = put(jnp.int32, names[:2], 8, queries)
    with jax.set_mesh(mesh):
        compiled = jax.jit(both).lower(q, k, k, Intervals(row, row, row), q).compile()
    return look(compiled)


def step(mesh) -> dict:
    """A student's training step whose text rows are 1,024 long."""
    decoder = dataclasses.replace(STUDENT.decoder, width=128, head_width=64, dtype="bfloat16")
    config = HiddenCoTConfig(dataclasses.replace(STUDENT, decoder=decoder))
    objective = HiddenCoT(config)

    def optimizer(params):
        return make_optimizer(OptimizerConfig("adamw", 1e-3, 0.01, warmup_steps=1, steps=4), params)

    graph, transform, like = blueprint(objective, optimizer, mesh)

    def shape(name, x):
        size = (*x.shape[:2], 1024) if name.startswith("packed_") else x.shape
        return jax.ShapeDtypeStruct(size, x.dtype, sharding=sharding.batch_sharding(mesh, 8))

    batch = tiny_batch(scenes=8)
    fields = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    batch = dataclasses.replace(batch, **{name: shape(name, x) for name, x in fields.items()})
    train_step = make_train_step(objective, graph, transform, like, 1)
    with jax.set_mesh(mesh):
        return look(train_step.lower(like, batch).compile())


def main() -> None:
    """Every shape on every kind, the step on the first."""
    found = {}
    for name, shape in MESHES.items():
        devices = topologies.get_topology_desc(name, platform="tpu").devices
        mesh = sharding.make_mesh(shape, list(devices))
        found[f"{name} student"] = call(mesh, 16, 16, 128, 1024, 3080)
        found[f"{name} Qwen2.5"] = call(mesh, 12, 2, 128, 2048, 4112)
        found[f"{name} InternViT"] = call(mesh, 16, 16, 64, 1025, 1025)
        if "step" not in found:
            found["step"] = step(mesh)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
