"""Losses of logits on eight devices and on one; prints the differences, JSON.

XLA_FLAGS=--xla_force_host_platform_device_count=8 PJRT_NPROC=16 \
    python -m tests.ops.cross_entropy_mesh_run
"""

import json
import math
import re

import jax
import numpy as np
from jax.sharding import NamedSharding

from geode_jax import sharding
from geode_jax.ops import cross_entropy
from geode_jax.ops.cross_entropy import token_loss
from tests.ops.cross_entropy_test import weighted

S, T, D, K = 4, 40, 16, 3
COLLECTIVE = re.compile(r"= (.*?) (?:all-reduce|reduce-scatter|all-gather)\(")


def collectives(text: str) -> tuple[int, int]:
    """Most numbers that a collective gives, in the entry computation and in all others."""
    entry, others, inside = 0, 0, False
    for line in text.splitlines():
        if re.match(r"(ENTRY )?%?[\w.\-]+ .*\{$", line):
            inside = line.startswith("ENTRY")
        for shapes in COLLECTIVE.findall(line):
            sizes = [s.split(",") for s in re.findall(r"\[([\d,]*)\]", shapes)]
            most = max(math.prod(int(n) for n in size if n) for size in sizes)
            entry, others = (max(entry, most), others) if inside else (entry, max(others, most))
    return entry, others


def measure(mesh, entries: int, tied: bool) -> dict:
    """Differences, and the collectives of the compiled program."""
    random = np.random.default_rng(0)
    hidden = random.standard_normal((S, T, D)).astype(np.float32)
    matrix = random.standard_normal((entries, D) if tied else (D, entries)).astype(np.float32)
    ids = np.argsort(random.random((S, T, entries)), axis=-1)[..., :K].astype(np.int32)
    paid = random.random((S, T)) < 0.5
    shapes = (S, T, K), (S, T), (S, T)
    slopes = tuple(random.standard_normal(s).astype(np.float32) for s in shapes)

    @jax.jit
    def both(hidden, matrix, ids, paid, slopes):
        def f(hidden, matrix):
            return token_loss(weighted, hidden, matrix, ids, paid, *slopes, tied=tied, rest=1)

        return f(hidden, matrix), jax.value_and_grad(f, (0, 1))(hidden, matrix)

    expected = both(hidden, matrix, ids, paid, slopes)
    with jax.set_mesh(mesh):

        def put(x, *names):
            spec = sharding.spec(names, x.shape, mesh.shape)
            return jax.device_put(x, NamedSharding(mesh, spec))

        def rows(x):
            return put(x, "batch", *[None] * (x.ndim - 1))

        names = ("vocab", "embed") if tied else ("embed", "vocab")
        args = rows(hidden), put(matrix, *names), rows(ids), rows(paid), jax.tree.map(rows, slopes)
        compiled = both.lower(*args).compile()
        got = compiled(*args)
    entry, inside = collectives(compiled.as_text())
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)
    pairs = [(np.asarray(a), np.asarray(b)) for a, b in pairs]
    return {
        # The sum is of 80 tokens, and rounded like one.
        "difference": max(float(np.abs(a - b).max() / max(1, np.abs(b).max())) for a, b in pairs),
        "largest collective": entry,
        "largest in a loop": inside,
        "matrix": D * entries,
    }


def main() -> None:
    """Scenes and vocabulary divided; a vocabulary that is not; too few scenes."""
    cross_entropy.TILE_ROWS = 4
    found = {}
    for shape in ((2, 2, 2), (1, 4, 2), (4, 1, 2), (1, 1, 8), (1, 8, 1)):
        for entries in (48, 49):
            for tied in (False, True):
                name = f"{'x'.join(map(str, shape))}, {entries}{', tied' if tied else ''}"
                found[name] = measure(sharding.make_mesh(shape), entries, tied)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
