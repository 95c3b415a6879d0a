"""Counts parameters by the parts of the papers."""

from collections.abc import Iterable

import numpy as np
from flax import nnx
from tabulate import tabulate

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
    """Returns the part of the model to which the parameter at a path belongs."""
    path = set(path)
    for part, names in _PARTS:
        if path & set(names):
            return part
    if {"decoder", "norm"} <= path:
        return "trunk"
    return "projector" if "vlm" in path else "vision projector and V"


def count_by_part(state: nnx.State) -> dict[str, int]:
    """Returns the number of parameters of each part, also of abstract states."""
    counts: dict[str, int] = {}
    for path, variable in nnx.to_flat_state(state):
        part = part_of(path)
        counts[part] = counts.get(part, 0) + int(np.prod(variable.shape))
    return counts


def parameter_table(params: nnx.State, frozen: nnx.State) -> str:
    """Returns a table of the parameters by part, trainable and frozen, as text."""
    learn, still = count_by_part(params), count_by_part(frozen)
    names = [name for name, _ in _PARTS] + ["projector", "vision projector and V"]
    rows = [(n, learn.get(n, 0), still.get(n, 0)) for n in names if n in learn or n in still]
    rows.append(("total", sum(learn.values()), sum(still.values())))
    headers = ("parameters", "trainable", "frozen")
    return tabulate(rows, headers, tablefmt="plain", intfmt=",")
