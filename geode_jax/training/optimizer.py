"""Optimizers: the paper's AdamW (Sec. III-E), or Muon on the trunk's matrices and AdamW elsewhere.

Muon [Jordan 2024] orthogonalises the momentum of a matrix. Embeddings, heads, norms, biases, the
thinking tokens and the log-variances stay with Adam.
"""

import dataclasses
from collections.abc import Hashable
from typing import Literal

import jax
import optax
from flax import nnx

from geode_jax import ranges


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Attributes:
    name: "adamw" or "muon".
    learning_rate: peak rate of both Muon (RMS-matched to Adam) and Adam.
    weight_decay: decoupled, on matrices only.
    warmup_steps: length of the linear warm-up from 0.
    steps: length of the schedule, warm-up included.
    final_fraction: last rate / peak rate.
    clip_norm: largest global gradient norm.
    b1, b2: Adam's decay rates.
    """

    name: Literal["adamw", "muon"]
    learning_rate: float
    weight_decay: float
    warmup_steps: int
    steps: int
    final_fraction: float = 0.0
    clip_norm: float = 1.0
    b1: float = 0.9
    b2: float = 0.999

    def __post_init__(self):
        ranges.check(
            self,
            {
                "name": ranges.one_of(("adamw", "muon")),
                "learning_rate clip_norm": ranges.real(0, above=True),
                "weight_decay": ranges.real(0),
                "warmup_steps": ranges.whole(0),
                "steps": ranges.whole(1),
                "final_fraction": ranges.real(0, 1),
                "b1 b2": ranges.real(0, 1 - 1e-9),
            },
        )


MUON_RMS = 0.2
"""RMS of Muon's update, that of a usual Adam update [Liu et al. 2025]: one rate fits both."""


def learning_rate(config: OptimizerConfig) -> optax.Schedule:
    """Returns the schedule: linear warm-up, then cosine decay, counted in steps (Sec. III-E)."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.learning_rate,
        # A short trial run of a long config keeps the shape of its schedule.
        warmup_steps=min(config.warmup_steps, config.steps // 4),
        decay_steps=config.steps,
        end_value=config.learning_rate * config.final_fraction,
    )


_TRUNKS = {"stages", "blocks", "drm"}


def labels(params: nnx.State, name: str) -> list[str]:
    """Returns "muon", "decay" (AdamW) or "plain" (Adam without weight decay) for each leaf.

    Muon takes the matrices of the decoder's stages, of the vision encoder's blocks and of the
    rationale module; "decay" the other matrices; everything else (embeddings, norms, biases,
    thinking tokens, log-variances) is "plain".
    """
    out = []
    for path, variable in nnx.to_flat_state(params):
        matrix = bool(variable.get_metadata().get("contracted", 0))
        trunk = not _TRUNKS.isdisjoint(path)
        out.append(
            "muon" if matrix and trunk and name == "muon" else "decay" if matrix else "plain"
        )
    return out


def _matrix_axes(variable: nnx.Variable) -> optax.contrib.MuonDimensionNumbers:
    """Returns the input and output axes of a kernel [layer?, inputs..., outputs...]."""
    metadata = variable.get_metadata()
    first = 1 if metadata["out_sharding"][0] == "layer" else 0
    axes = tuple(range(first, variable.ndim))
    return optax.contrib.MuonDimensionNumbers(
        axes[: metadata["contracted"]], axes[metadata["contracted"] :]
    )


def make_optimizer(config: OptimizerConfig, params: nnx.State) -> optax.GradientTransformation:
    """Returns the optimizer of these parameters, which skips steps with a non-finite gradient.

    Its state counts the skipped steps: `notfinite_count` in a row, `total_notfinite` in all.
    """
    rate = learning_rate(config)
    b1, b2 = config.b1, config.b2
    transforms: dict[Hashable, optax.GradientTransformation] = {
        "decay": optax.adamw(rate, b1, b2, weight_decay=config.weight_decay),
        "plain": optax.adam(rate, b1, b2),
    }
    structure = jax.tree.structure(params)
    leaf_labels = labels(params, config.name)
    if "muon" in leaf_labels:
        # optax hands a stacked [layer, in, out] kernel to Adam unless it is given its matrix axes.
        variables = [variable for _, variable in nnx.to_flat_state(params)]
        axes = [
            _matrix_axes(v) if label == "muon" else optax.MaskedNode()
            for v, label in zip(variables, leaf_labels, strict=True)
        ]
        transforms["muon"] = optax.contrib.muon(
            rate,
            weight_decay=config.weight_decay,
            muon_weight_dimension_numbers=jax.tree.unflatten(structure, axes),
            consistent_rms=MUON_RMS,
        )
    inner = optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.partition(transforms, jax.tree.unflatten(structure, leaf_labels)),
    )
    return optax.apply_if_finite(inner, max_consecutive_errors=UNLIMITED_SKIPS)


UNLIMITED_SKIPS = 2**31 - 1
"""optax never applies a non-finite step; the training loop ends a run that skips too many."""
