"""InternViT, InternVL's vision encoder, with its pixel shuffle and projector.

InternViT-300M-448px-V2.5: 24 pre-norm blocks with LayerNorm, qkv bias, LayerScale and exact GELU
over 32 x 32 patches and one class token; no norm at the end, no norm on queries and keys
(OpenGVLab/InternVL, `modeling_intern_vit.py`; the class defaults there are the 6B model's).
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float

from geode_jax import ranges
from geode_jax.models.layers import LayerNorm, Mlp, Projection, param, stack
from geode_jax.ops.attention import Intervals, attention
from geode_jax.shapes import Array
from geode_jax.sharding import constrain

LAYER_SCALE = 0.1
"""Initial value of a LayerScale."""


@dataclasses.dataclass(frozen=True)
class VitConfig:
    """Sizes of a vision encoder.

    Attributes:
        image_size: height and width of an image in pixels.
        patch_size: height and width of a patch; divides `image_size`.
        width: D.
        layers: number of blocks.
        heads: H; divides `width`.
        mlp_width: inner width of the feed-forward layers.
        qkv_bias: bias on query, key and value.
        norm_eps: epsilon of the norms.
        dtype: dtype of the activations.
    """

    image_size: int
    patch_size: int
    width: int
    layers: int
    heads: int
    mlp_width: int
    qkv_bias: bool = True
    norm_eps: float = 1e-6
    dtype: str = "float32"

    def __post_init__(self):
        sizes = "image_size patch_size width layers heads mlp_width"
        ranges.check(
            self,
            {
                sizes: ranges.whole(1),
                "norm_eps": ranges.real(0, above=True),
                "dtype": ranges.DTYPES,
            },
        )
        ranges.check_divides(self, "patch_size", of="image_size")
        ranges.check_divides(self, "heads", of="width")

    @property
    def grid(self) -> int:
        """Patches along a side."""
        return self.image_size // self.patch_size


class VitAttention(nnx.Module):
    """Self-attention without a mask."""

    def __init__(self, config: VitConfig, *, rngs: nnx.Rngs):
        c = config
        heads = (c.heads, c.width // c.heads)
        self.qkv = Projection(
            (c.width,),
            (3, *heads),
            ("embed", None, "heads", "head_dim"),
            bias=c.qkv_bias,
            rngs=rngs,
        )
        self.out = Projection(
            heads, (c.width,), ("heads", "head_dim", "embed"), bias=True, rngs=rngs
        )

    def __call__(self, x_BLD: Float[Array, "B L D"]) -> Float[jax.Array, "B L D"]:
        q, k, v = jnp.moveaxis(self.qkv(x_BLD), 2, 0)
        zero = jnp.zeros((x_BLD.shape[0], 1), jnp.int32)
        return self.out(attention(q, k, v, Intervals(zero, zero, zero + x_BLD.shape[1])))


class VitBlock(nnx.Module):
    """x += scale * attention(norm(x)); x += scale * mlp(norm(x)), with a scale for each channel."""

    def __init__(self, config: VitConfig, *, rngs: nnx.Rngs):
        c = config
        self.attention_norm = LayerNorm(c.width, eps=c.norm_eps)
        self.attention = VitAttention(c, rngs=rngs)
        self.attention_scale = param(jnp.full((c.width,), LAYER_SCALE, jnp.float32), None)
        self.mlp_norm = LayerNorm(c.width, eps=c.norm_eps)
        self.mlp = Mlp(c.width, c.mlp_width, c.width, rngs=rngs)
        self.mlp_scale = param(jnp.full((c.width,), LAYER_SCALE, jnp.float32), None)

    def __call__(self, x: Float[Array, "B L D"]) -> Float[jax.Array, "B L D"]:
        with jax.named_scope("self_attention"):
            scale = self.attention_scale[...].astype(x.dtype)
            x = x + scale * self.attention(self.attention_norm(x))
        with jax.named_scope("feed_forward"):
            return x + self.mlp_scale[...].astype(x.dtype) * self.mlp(self.mlp_norm(x))


class InternViT(nnx.Module):
    """Patch embedding, class token, positions, blocks."""

    def __init__(self, config: VitConfig, *, rngs: nnx.Rngs):
        c = self.config = config
        p = c.patch_size
        self.patches = Projection(
            (p, p, 3), (c.width,), (None, None, None, "embed"), bias=True, rngs=rngs
        )
        self.class_token = param(0.02 * jax.random.normal(rngs.params(), (c.width,)), "embed")
        self.positions = param(
            0.02 * jax.random.normal(rngs.params(), (1 + c.grid**2, c.width)), None, "embed"
        )
        self.blocks = stack(lambda r: VitBlock(c, rngs=r), c.layers, rngs)

    def __call__(
        self, pixels_Bhw3: Float[Array, "B h w 3"]
    ) -> Float[jax.Array, "B {1+self.config.grid**2} D"]:
        """Returns hidden states [B, 1 + P, D] of images: class token, then patches row-major.

        Args:
            pixels_Bhw3: RGB in 0..1, minus ImageNet's mean, divided by its standard deviation.
        """
        c, B = self.config, len(pixels_Bhw3)
        p, g = c.patch_size, c.grid
        x = jnp.asarray(pixels_Bhw3, c.dtype).reshape(B, g, p, g, p, 3)
        x = self.patches(x.transpose(0, 1, 3, 2, 4, 5)).reshape(B, g * g, c.width)
        first = jnp.broadcast_to(self.class_token[...].astype(x.dtype), (B, 1, c.width))
        x = jnp.concatenate([first, x], axis=1) + self.positions[...].astype(x.dtype)

        def body(x, block):
            return constrain(block(x), "batch", "length", "width"), None

        # Without this constraint the compiler shards the channels of the frames as those of the
        # parameters, and every product needs a sum over all devices.
        return jax.lax.scan(body, constrain(x, "batch", "length", "width"), self.blocks)[0]


def pixel_shuffle(x_BghD: Float[jax.Array, "B g h D"]) -> Float[jax.Array, "B g//2 h//2 4*D"]:
    """Returns [B, g/2, h/2, 4D] of [B, g, h, D]: four neighbours, row-major, become one token.

    This is version 2 of InternVL's pixel shuffle; version 1 gives a transposed grid.
    """
    B, g, h, D = x_BghD.shape
    x = jnp.asarray(x_BghD).reshape(B, g // 2, 2, h // 2, 2, D).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(B, g // 2, h // 2, 4 * D)


class Projector(nnx.Module):
    """InternVL's `mlp1`, from shuffled patches to the decoder's width."""

    def __init__(self, vision_width: int, width: int, *, rngs: nnx.Rngs):
        self.norm = LayerNorm(4 * vision_width)
        self.mlp = Mlp(4 * vision_width, width, width, rngs=rngs)

    def __call__(self, hidden_BLD: Float[jax.Array, "B L D"]) -> Float[jax.Array, "B (L-1)//4 _"]:
        """Returns vision tokens [B, P / 4, width] of hidden states [B, 1 + P, D] of `InternViT`."""
        B, L, D = hidden_BLD.shape
        side = round((L - 1) ** 0.5)
        x = pixel_shuffle(hidden_BLD[:, 1:].reshape(B, side, side, D))
        return self.mlp(self.norm(x.reshape(B, -1, 4 * D)))
