"""Counting parameters, by the parts the paper names."""

from collections.abc import Iterable

import numpy as np
from flax import nnx

_PARTS = (
    ("rationale module", ("drm",)),
    ("regression head", ("drh",)),
    ("vision encoder", ("vision",)),
    ("stand-ins", ("layout", "patch_classifier")),
    ("cross-attention", ("cross",)),
    ("trunk", ("blocks",)),
    ("embeddings and LM head", ("embedding", "head")),
    ("thinking tokens", ("thinking",)),
    ("task heads", ("depth_head", "detection_head", "feature_head", "spatial_head",
                    "none_embedding", "patch_scale")),
    ("log-variances", ("log_variance",)),
)  # fmt: skip


def part_of(path: Iterable) -> str:
    """The part of its model that a parameter belongs to, from its path."""
    path = set(path)
    for part, names in _PARTS:
        if path & set(names):
            return part
    if {"decoder", "norm"} <= path:
        return "trunk"
    return "projector" if "vlm" in path else "vision projector and V"


def count_by_part(state: nnx.State) -> dict[str, int]:
    """Part -> parameters; works on abstract states (`jax.eval_shape`) too."""
    counts: dict[str, int] = {}
    for path, variable in nnx.to_flat_state(state):
        part = part_of(path)
        counts[part] = counts.get(part, 0) + int(np.prod(variable.shape))
    return counts


def parameter_table(params: nnx.State, frozen: nnx.State) -> str:
    """Parameters by part, trainable and frozen, as text."""
    learn, still = count_by_part(params), count_by_part(frozen)
    names = [name for name, _ in _PARTS] + ["projector", "vision projector and V"]
    rows = [(n, learn.get(n, 0), still.get(n, 0)) for n in names if n in learn or n in still]
    rows.append(("total", sum(learn.values()), sum(still.values())))
    lines = [f"{'parameters':<26}{'trainable':>15}{'frozen':>15}"]
    lines += [f"{name:<26}{a:>15,}{b:>15,}" for name, a, b in rows]
    return "\n".join(lines)
