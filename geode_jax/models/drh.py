"""The Direct Regression Head (GEODE Sec. 2.2, eq. 5) reads a value from a control token's state.

`data.control` has the control tokens and the base units of the codes.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Float, Float32

from geode_jax.models.layers import LayerNorm, Mlp
from geode_jax.models.task_heads import BOX_CODE
from geode_jax.shapes import Array
from geode_jax.targets import LOG_VALUES


def encode_values(
    values: Float[Array, "*axes"], base_unit: Float[Array, "*axes"]
) -> Float[jax.Array, "*axes"]:
    """Returns the codes that are regressed: logarithms of the values in their base unit.

    Benchmarks score lengths, areas and counts by their relative error (VSI-Bench's mean relative
    accuracy), which a difference of logarithms measures.

    Args:
        values: positive, with logarithms in the base unit within `LOG_VALUES`.
        base_unit: factor from the question's unit to the base unit.
    """
    return jnp.log(values * base_unit)


def decode_values(
    codes: Float[ArrayLike, "*axes"], base_unit: Float[Array, "*axes"]
) -> Float[jax.Array, "*axes"]:
    """Inverts `encode_values`; codes are clipped to `LOG_VALUES`."""
    return jnp.exp(jnp.clip(codes, *LOG_VALUES)) / base_unit


class Drh(nnx.Module):
    """Two small MLPs on the hidden state at a control token (GEODE eq. 5)."""

    def __init__(self, width: int, hidden: int, *, rngs: nnx.Rngs):
        self.norm = LayerNorm(width)
        self.scalar = Mlp(width, hidden, 1, rngs=rngs)
        self.box = Mlp(width, hidden, BOX_CODE, rngs=rngs)

    def values(self, hidden_D: Float[Array, "*axes D"]) -> Float32[jax.Array, "*axes"]:
        """Returns codes of states at `<REG>`; see `encode_values`."""
        return self.scalar(self.norm(hidden_D)).astype(jnp.float32)[..., 0]

    def boxes(self, hidden_D: Float[Array, "*axes D"]) -> Float32[jax.Array, "*axes 8"]:
        """Returns box codes of states at `<3DBBOX>`; see `geometry.boxes`."""
        return self.box(self.norm(hidden_D)).astype(jnp.float32)
