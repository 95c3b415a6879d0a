"""Attention by tiles on eight devices, in a process that has eight; prints the differences, JSON.

XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m tests.ops.attention_mesh_run
"""

import json
import re

import jax
import numpy as np
from jax.sharding import NamedSharding

from geode_jax import sharding
from geode_jax.ops.attention import Intervals, attention, causal

COLLECTIVES = re.compile(r" (all-\w+|reduce-scatter|collective-permute)(?:-start)?\(")


def measure(mesh, implementation: str, kv_heads: int) -> dict:
    """Differences from one device's dense result, and the collectives of the compiled program."""
    random = np.random.default_rng(0)
    q, g = (random.normal(size=(4, 40, 4, 16)).astype(np.float32) for _ in range(2))
    k, v = (random.normal(size=(4, 50, kv_heads, 16)).astype(np.float32) for _ in range(2))
    intervals = Intervals(*map(np.asarray, causal(4, 40, prefix_end=10, start=np.arange(4))))

    def both(implementation, q, k, v, intervals, g):
        def f(q, k, v):
            return attention(q, k, v, intervals, implementation=implementation)

        out, vjp = jax.vjp(f, q, k, v)
        return out, *vjp(g)

    both = jax.jit(both, static_argnums=0)
    expected = both("dense", q, k, v, intervals, g)
    with jax.set_mesh(mesh):

        def put(x, *names):
            spec = sharding.spec(names, x.shape, mesh.shape)
            return jax.device_put(x, NamedSharding(mesh, spec))

        args = (
            *(put(x, "batch", "length", "heads", "head_dim") for x in (q, k, v)),
            Intervals(*(put(x, "batch", "length") for x in intervals)),
            put(g, "batch", "length", "heads", "head_dim"),
        )
        compiled = both.lower(implementation, *args).compile()
        got = compiled(*args)
    pairs = zip(got, expected, strict=True)
    return {
        "difference": max(float(np.abs(np.asarray(a) - np.asarray(b)).max()) for a, b in pairs),
        "spread": len({s.device for s in got[0].addressable_shards if s.replica_id == 0}),
        "collectives": sorted(set(COLLECTIVES.findall(compiled.as_text()))),
    }


def main() -> None:
    """Rows and heads divided, more devices for heads than key heads or heads, too few rows."""
    found = {}
    for *shape, kv_heads in ((2, 2, 2, 2), (1, 2, 4, 2), (1, 2, 4, 1), (1, 1, 8, 4), (1, 8, 1, 2)):
        for implementation in ("chunked", "tpu"):
            name = f"{'x'.join(map(str, shape))}, {kv_heads} key heads, {implementation}"
            found[name] = measure(sharding.make_mesh(tuple(shape)), implementation, kv_heads)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
