"""The Direct Regression Head (GEODE Sec. 2.2, eq. 5): the state at a control token is a value.

The tokens, and the base units that codes are in, are those of `data.control`.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from geode_jax.models.layers import LayerNorm, Mlp
from geode_jax.models.task_heads import BOX_CODE
from geode_jax.shapes import Array
from geode_jax.targets import LOG_VALUES


def encode_values(values: Array, base_unit: Array) -> jax.Array:
    """Values in their question's unit -> what is regressed, the log in the base unit.

    Values are those that `control.number_of` admits: positive, and within `LOG_VALUES`.
    Lengths, areas and counts are judged by their relative error (VSI-Bench's mean relative
    accuracy), which a difference of logarithms is.
    """
    return jnp.log(values * base_unit)


def decode_values(codes: Array, base_unit: Array) -> jax.Array:
    """The inverse of `encode_values`; within `LOG_VALUES`, whatever the code."""
    return jnp.exp(jnp.clip(codes, *LOG_VALUES)) / base_unit


class Drh(nnx.Module):
    """Two small MLPs on the hidden state at a control token (eq. 5)."""

    def __init__(self, width: int, hidden: int, *, rngs: nnx.Rngs):
        self.norm = LayerNorm(width)
        self.scalar = Mlp(width, hidden, 1, rngs=rngs)
        self.box = Mlp(width, hidden, BOX_CODE, rngs=rngs)

    def values(self, hidden_D: Array) -> jax.Array:
        """States at `<REG>` [..., D] -> codes [...], see `encode_values`."""
        return self.scalar(self.norm(hidden_D)).astype(jnp.float32)[..., 0]

    def boxes(self, hidden_D: Array) -> jax.Array:
        """States at `<3DBBOX>` [..., D] -> box codes [..., 8] (`geometry.boxes.encode_boxes`)."""
        return self.box(self.norm(hidden_D)).astype(jnp.float32)
