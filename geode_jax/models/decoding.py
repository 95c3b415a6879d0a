"""A decoder prepared for decoding, which reads every matrix once per token.

Decoding one token at a time is bound by reading the weights. So each block has its own arrays (a
slice of stacked arrays would be copied for every token) in the dtype of the activations (training
keeps float32), and matrices with the same input are fused. On a mesh, matrices are gathered over
`fsdp` once instead of for every token: each device holds the whole decoder, except for what the
mesh axis `model` divides.

With `int8`, the blocks' matrices take one byte a number and a scale for each column, as in the
vector-wise quantisation of LLM.int8() [2208.07339, Sec. 2.1]. Only weights are rounded, by qwix.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float

from geode_jax.errors import UserError
from geode_jax.models.decoder import Decoder, FeedForward, KeyValues, SelfAttention
from geode_jax.models.layers import Projection
from geode_jax.shapes import Array
from geode_jax.sharding import constrain


class Matrix(nnx.Module):
    """Projections of the same input, fused into one matrix [inputs, outputs]."""

    def __init__(self, *projections: Projection, int8: bool):
        inputs = projections[0].contracted
        self.rows = math.prod(projections[0].kernel.shape[:inputs])
        self.contracted = inputs
        flat = [p.kernel[...].reshape(self.rows, -1) for p in projections]
        self.ends = [sum(x.shape[1] for x in flat[: i + 1]) for i in range(len(flat) - 1)]
        kernel = jnp.concatenate(flat, axis=1)
        kernel, scale = _rounded(kernel) if int8 else (kernel, None)
        self.kernel = nnx.Param(kernel)
        self.scale = None if scale is None else nnx.Param(scale)
        biases = [p.bias[...].reshape(-1) for p in projections if p.bias is not None]
        self.bias = nnx.Param(jnp.concatenate(biases)) if biases else None

    def __call__(self, x: Float[Array, "..."]) -> list[Float[jax.Array, "..."]]:
        """Returns the result [..., outputs] of each projection."""
        x = x.reshape(*x.shape[: x.ndim - self.contracted], self.rows)
        y = x @ self.kernel[...].astype(x.dtype)
        if self.scale is not None:
            y = (y * self.scale[...]).astype(x.dtype)
        if self.bias is not None:
            y = y + self.bias[...].astype(x.dtype)
        return jnp.split(y, self.ends, axis=-1)


def _rounded(kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the kernel as int8, and each column's scale."""
    try:
        import qwix
    except ImportError as error:
        raise UserError("int8 needs qwix: pip install -e '.[int8]' in the checkout") from error
    rounded = qwix.quantize(jnp.asarray(kernel, jnp.float32), jnp.int8, channelwise_axes=[1])
    return rounded.qvalue, rounded.scale[0]


class FusedAttention(SelfAttention):
    """Self-attention with query, key and value as one matrix."""

    def __init__(self, own: SelfAttention, *, int8: bool):
        self.shapes = [p.kernel.shape[1:] for p in (own.q, own.k, own.v)]
        self.qkv = Matrix(own.q, own.k, own.v, int8=int8)
        self.back = Matrix(own.out, int8=int8)

    def project(self, x_BLD: Float[Array, "B L D"]) -> list[Float[jax.Array, "B L _ E"]]:
        parts = self.qkv(x_BLD)
        return [
            p.reshape(*p.shape[:-1], *shape) for p, shape in zip(parts, self.shapes, strict=True)
        ]

    def out(self, x_BLHE: Float[Array, "B L H E"]) -> Float[jax.Array, "B L D"]:
        return self.back(x_BLHE)[0]


class FusedFeedForward(FeedForward):
    """Feed-forward layer with gate and up as one matrix."""

    def __init__(self, own: FeedForward, *, int8: bool):
        self.ups = Matrix(*([own.up] if own.gate is None else [own.up, own.gate]), int8=int8)
        self.back = Matrix(own.down, int8=int8)

    def widen(self, x: Float[Array, "*axes D"]) -> list[Float[jax.Array, "*axes inner"]]:
        return self.ups(x)

    def down(self, x: Float[Array, "*axes inner"]) -> Float[jax.Array, "*axes D"]:
        return self.back(x)[0]


def for_decoding(decoder: Decoder, *, int8: bool = False) -> Decoder:
    """Returns the decoder prepared for decoding; a prepared decoder is returned as it is.

    If heads are sharded (mesh axis `model`), matrices are not fused: the shards of a fused matrix
    would lie on other devices than those of its parts.

    Args:
        decoder: the decoder in the form of training.
        int8: see the module's docstring.

    Raises:
        ValueError: `int8` with sharded heads.
        UserError: `int8` without qwix.
    """
    if isinstance(decoder.stages[0].blocks, nnx.List):
        return decoder
    mesh = jax.sharding.get_abstract_mesh()
    spread = not mesh.empty and mesh.shape["model"] > 1
    if spread and int8:
        raise ValueError("decoding: int8 matrices are not spread over the mesh axis model")
    graph, state = nnx.split(decoder)
    ready = nnx.merge(graph, _gathered(state, decoder.config.dtype))
    for stage in ready.stages:
        blocks = [jax.tree.map(lambda x, i=i: x[i], stage.blocks) for i in range(stage.length)]
        for block in blocks if not spread else []:
            block.attention = FusedAttention(block.attention, int8=int8)
            block.mlp = FusedFeedForward(block.mlp, int8=int8)
        stage.blocks = nnx.List(blocks)
    return ready


def with_decoding(model: nnx.Module, *, int8: bool = False) -> nnx.Module:
    """Replaces each decoder in a model by `for_decoding` of it, in place; returns the model."""
    for _, module in list(nnx.iter_modules(model)):
        for name, part in list(vars(module).items()):
            if isinstance(part, Decoder):
                setattr(module, name, for_decoding(part, int8=int8))
    return model


def _gathered(state: nnx.State, dtype: str) -> nnx.State:
    """Returns matrices gathered over fsdp in the activations' dtype; norms and biases unchanged."""

    def gathered(path, variable):
        names = variable.get_metadata().get("out_sharding")
        if path[-1] not in ("kernel", "embedding"):
            return variable
        x = variable[...].astype(dtype)
        return variable.replace(constrain(x, *(None if n == "embed" else n for n in names)))

    flat = nnx.to_flat_state(state)
    return nnx.from_flat_state([(path, gathered(path, v)) for path, v in flat])


def by_layer(cache: list) -> list[list[KeyValues]]:
    """Returns, per stage, the keys and values [B, M, G, E] of each block, if they are stacked."""
    return [
        stage if isinstance(stage, list) else [KeyValues(*kv) for kv in zip(*stage, strict=True)]
        for stage in cache
    ]
