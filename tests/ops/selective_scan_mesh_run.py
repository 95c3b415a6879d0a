"""The selective scan by kernels on eight devices; prints the differences from one, JSON.

XLA_FLAGS=--xla_force_host_platform_device_count=8 PJRT_NPROC=16 \
    python -m tests.ops.selective_scan_mesh_run
"""

import json

import jax
import numpy as np
from jax.sharding import NamedSharding

from geode_jax import sharding
from geode_jax.ops import selective_scan_tpu
from geode_jax.ops.selective_scan import selective_scan
from tests.ops.attention_mesh_run import COLLECTIVES

B, L, E, U = 8, 20, 256, 3


def measure(mesh) -> dict:
    """Differences of outputs and gradients, and the collectives of the compiled program."""
    random = np.random.default_rng(0)

    def normal(*shape):
        return random.standard_normal(shape).astype(np.float32)

    u, delta = normal(B, L, E), random.uniform(0.01, 1, (B, L, E)).astype(np.float32)
    A, b, c, D = -np.abs(normal(E, U)), normal(B, L, U), normal(B, L, U), normal(E)
    first, state = random.random((B, L)) < 0.1, normal(B, U, E)
    slopes = normal(B, L, E), normal(B, U, E)

    def both(implementation, *args):
        *inputs, first, slopes = args

        def f(u, delta, A, b, c, D, state):
            return selective_scan(
                *(u, delta, A, b, c, D),
                first_BL=first,
                state_BUI=state,
                implementation=implementation,
            )

        out, vjp = jax.vjp(f, *inputs)
        return out, vjp(slopes)

    both = jax.jit(both, static_argnums=0)
    args = (u, delta, A, b, c, D, state, first, slopes)
    expected = both("chunked", *args)
    rows = ("batch", "length", "inner")
    names = (
        *(rows, rows, ("inner", None), (*rows[:2], None), (*rows[:2], None), ("inner",)),
        *(("batch", None, "inner"), rows[:2], (rows, ("batch", None, "inner"))),
    )
    with jax.set_mesh(mesh):

        def put(x, of):
            return jax.device_put(x, NamedSharding(mesh, sharding.spec(of, x.shape, mesh.shape)))

        placed = [put(x, of) for x, of in zip(args[:-1], names, strict=False)]
        placed.append(tuple(map(put, slopes, names[-1])))
        compiled = both.lower("tpu", *placed).compile()
        got = compiled(*placed)
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)
    return {
        "difference": max(
            float(np.abs(np.asarray(a) - b).max() / np.abs(b).max()) for a, b in pairs
        ),
        "spread": len({s.device for s in got[0][0].addressable_shards if s.replica_id == 0}),
        "collectives": sorted(set(COLLECTIVES.findall(compiled.as_text()))),
    }


def main() -> None:
    """Rows and channels divided, and each alone."""
    selective_scan_tpu.POSITIONS = 8
    shapes = ((2, 2, 2), (1, 4, 2), (1, 1, 8), (1, 8, 1))
    print(json.dumps({"x".join(map(str, s)): measure(sharding.make_mesh(s)) for s in shapes}))


if __name__ == "__main__":
    main()
