"""InternVL: InternViT, a projector, and a decoder that reads vision tokens among text tokens."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float, Float32, Int

from geode_jax.models.decoder import Decoder, DecoderConfig
from geode_jax.models.vit import InternViT, Projector, VitConfig
from geode_jax.shapes import Array

INTERNVL_TOKENS = (
    *("<img>", "</img>", "<IMG_CONTEXT>"),
    *("<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>"),
)
"""The tokens that InternVL2.5 adds to Qwen2.5's tokenizer, from id 151,665 on."""

IMAGE_ID = 151_667
"""Id of `<IMG_CONTEXT>` in InternVL2.5 with Qwen2.5's tokenizer."""


@dataclasses.dataclass(frozen=True)
class InternVLConfig:
    """Sizes of the parts, and the token id that vision tokens replace."""

    vision: VitConfig
    decoder: DecoderConfig
    image_id: int = IMAGE_ID


class InternVL(nnx.Module):
    """InternVL; see the file's docstring."""

    def __init__(self, config: InternVLConfig, *, rngs: nnx.Rngs):
        c = self.config = config
        self.vision = InternViT(c.vision, rngs=rngs)
        self.projector = Projector(c.vision.width, c.decoder.width, rngs=rngs)
        self.decoder = Decoder(c.decoder, rngs=rngs)

    def vision_tokens(self, pixels_Bhw3: Float[Array, "B h w 3"]) -> Float[jax.Array, "B _ D"]:
        """Returns vision tokens [B, P / 4, D] of B images; see `InternViT`."""
        return self.projector(self.vision(pixels_Bhw3))

    def __call__(
        self, tokens_BL: Int[Array, "B L"], pixels_Bhw3: Float[Array, "_ h w 3"]
    ) -> Float32[jax.Array, "B L X"]:
        """Returns logits of ids that mention the images, in their order."""
        tokens_BL = jnp.asarray(tokens_BL)
        x_BLD = self.decoder.embed(tokens_BL)
        seen = self.vision_tokens(pixels_Bhw3).reshape(-1, x_BLD.shape[-1]).astype(x_BLD.dtype)
        here = tokens_BL == self.config.image_id
        # The n-th image token of the batch, row by row, is replaced by the n-th vision token.
        n = jnp.cumsum(here).reshape(here.shape) - 1
        x_BLD = jnp.where(here[..., None], seen[n], x_BLD)
        hidden, _ = self.decoder.run_prefix(x_BLD, None, None)
        return self.decoder.logits(hidden)
