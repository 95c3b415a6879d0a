"""Layers that all models share: annotated parameters, projections, norms, rotary positions."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float, Float32, Int

from geode_jax.shapes import Array

LAYER_NORM_EPS = 1e-5


def param(value: Float[jax.Array, "..."], *names: str | None, contracted: int = 0) -> nnx.Param:
    """Returns a parameter with a logical axis name (or None) for each axis; see `sharding.RULES`.

    Args:
        value: initial value.
        *names: of the axes.
        contracted: number of input axes of a matrix, which Muon reads; 0: not a matrix.
    """
    # Only names: `sharding.placed` adds the shardings when a model is built.
    return nnx.Param(value, out_sharding=names, contracted=contracted, eager_sharding=False)


class Projection(nnx.Module):
    """y[..., *outputs] = x[..., *inputs] @ kernel[*inputs, *outputs] (+ bias[*outputs]).

    All matrices of the models are of this class, with the input and output axes of their equations,
    for example inputs (D,) and outputs (H, E) for a query projection.

    Args:
        inputs: sizes of the contracted axes.
        outputs: sizes of the produced axes.
        names: logical axis names, inputs then outputs.
        bias: adds a bias over the outputs.
        scale: standard deviation of the kernel times sqrt(fan-in); 0 makes the layer start at zero.
    """

    def __init__(
        self,
        inputs: tuple[int, ...],
        outputs: tuple[int, ...],
        names: tuple[str | None, ...],
        *,
        bias: bool,
        scale: float = 1.0,
        rngs: nnx.Rngs,
    ):
        std = scale / math.sqrt(math.prod(inputs))
        value = std * jax.random.normal(rngs.params(), (*inputs, *outputs))
        self.contracted = len(inputs)
        self.kernel = param(value, *names, contracted=len(inputs))
        self.bias = param(jnp.zeros(outputs), *names[len(inputs) :]) if bias else None

    def __call__(self, x: Float[Array, "..."]) -> Float[jax.Array, "..."]:
        kernel = self.kernel[...].astype(x.dtype)
        inputs, outputs = kernel.shape[: self.contracted], kernel.shape[self.contracted :]
        rows = x.shape[: x.ndim - self.contracted]
        # Rows are flattened to one axis: XLA's CPU compiler would otherwise write x a second time,
        # transposed, for the kernel's gradient, which sums over rows.
        y = jnp.tensordot(x.reshape(-1, *inputs), kernel, axes=self.contracted)
        y = y.reshape(*rows, *outputs)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


def stack(make: Callable[[nnx.Rngs], nnx.Module], layers: int, rngs: nnx.Rngs) -> nnx.Module:
    """Returns equal layers as one module to scan over; parameters get a first axis, "layer"."""

    @nnx.vmap
    @nnx.transform_metadata(in_axes=0, out_axes=0, partition="layer")
    def make_all(rngs):
        return make(rngs)

    return make_all(rngs.split(layers))


class LayerNorm(nnx.Module):
    """Layer normalisation over the last axis, statistics in fp32."""

    def __init__(self, width: int, *, eps: float = LAYER_NORM_EPS):
        self.eps = eps
        self.scale = param(jnp.ones((width,)), None)
        self.bias = param(jnp.zeros((width,)), None)

    def __call__(self, x: Float[Array, "*axes D"]) -> Float[jax.Array, "*axes D"]:
        y = x.astype(jnp.float32)
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        return (y * self.scale[...] + self.bias[...]).astype(x.dtype)


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation over the last axis, statistics in fp32."""

    def __init__(self, width: int, *, eps: float):
        self.eps = eps
        self.scale = param(jnp.ones((width,)), None)

    def __call__(self, x: Float[Array, "*axes D"]) -> Float[jax.Array, "*axes D"]:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        return (y * self.scale[...]).astype(x.dtype)


class Mlp(nnx.Module):
    """Linear -> GELU -> linear (exact GELU, biases on)."""

    def __init__(self, width_in: int, hidden: int, width_out: int, *, rngs: nnx.Rngs):
        self.up = Projection((width_in,), (hidden,), ("embed", "mlp"), bias=True, rngs=rngs)
        self.down = Projection((hidden,), (width_out,), ("mlp", "embed"), bias=True, rngs=rngs)

    def __call__(self, x: Float[Array, "*axes C"]) -> Float[jax.Array, "*axes D"]:
        return self.down(jax.nn.gelu(self.up(x), approximate=False))


def rotary_angles(
    positions_BL: Int[Array, "B L"],
    head_width: int,
    theta: float,
    dynamic: tuple[int, float] | None = None,
) -> tuple[
    Float32[jax.Array, "B L 1 {head_width//2}"], Float32[jax.Array, "B L 1 {head_width//2}"]
]:
    """Returns cos and sin of rotary positions, float32 (bfloat16 rounds 257 to 256).

    Args:
        positions_BL: whole numbers from 0.
        head_width: E.
        theta: base of the frequencies.
        dynamic: (trained length, factor) of "dynamic NTK" scaling, as in transformers: the base
            grows with the longest row of the batch if that exceeds the trained length. As there,
            the keys in a cache keep the rotation of earlier calls.
    """
    base: float | jax.Array = theta
    if dynamic:
        trained, factor = dynamic
        longest = jnp.maximum(jnp.max(positions_BL) + 1, trained).astype(jnp.float32)
        base *= (factor * longest / trained - (factor - 1)) ** (head_width / (head_width - 2))
    frequency = base ** -(jnp.arange(0, head_width, 2, dtype=jnp.float32) / head_width)
    angle = positions_BL.astype(jnp.float32)[..., None, None] * frequency
    return jnp.cos(angle), jnp.sin(angle)


def rotate(
    x_BLHE: Float[Array, "B L H E"],
    angles: tuple[Float[jax.Array, "B L 1 E//2"], Float[jax.Array, "B L 1 E//2"]],
) -> Float[jax.Array, "B L H E"]:
    """Rotates queries or keys by `rotary_angles`; rotate-half convention, pairs (e, e + E/2)."""
    cos, sin = angles
    a, b = jnp.split(x_BLHE.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BLHE.dtype)
