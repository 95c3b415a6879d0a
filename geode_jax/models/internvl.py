"""InternVL: InternViT, its projector, and a decoder that reads vision tokens among its own."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from geode_jax.models.decoder import Decoder, DecoderConfig
from geode_jax.models.vit import InternViT, Projector, VitConfig
from geode_jax.shapes import Array

INTERNVL_TOKENS = (
    *("<img>", "</img>", "<IMG_CONTEXT>"),
    *("<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>"),
)
"""What InternVL2.5's tokenizers add to Qwen2.5's, ids 151,665 on."""

IMAGE_ID = 151_667
"""`<IMG_CONTEXT>` of InternVL2.5's tokenizers over Qwen2.5."""


@dataclasses.dataclass(frozen=True)
class InternVLConfig:
    """Sizes of the parts, and the token id in whose place a vision token is read."""

    vision: VitConfig
    decoder: DecoderConfig
    image_id: int = IMAGE_ID


class InternVL(nnx.Module):
    """See the module's docstring."""

    def __init__(self, config: InternVLConfig, *, rngs: nnx.Rngs):
        c = self.config = config
        self.vision = InternViT(c.vision, rngs=rngs)
        self.projector = Projector(c.vision.width, c.decoder.width, rngs=rngs)
        self.decoder = Decoder(c.decoder, rngs=rngs)

    def look(self, pixels_Bhw3: Array) -> jax.Array:
        """Vision tokens [B, P / 4, D] of B pictures, see `InternViT`."""
        return self.projector(self.vision(pixels_Bhw3))

    def __call__(self, tokens_BL: Array, pixels_Bhw3: Array) -> jax.Array:
        """Ids [B, L] and the pictures they mention, in order, to logits [B, L, X]."""
        tokens_BL = jnp.asarray(tokens_BL)
        x_BLD = self.decoder.embed(tokens_BL)
        seen = self.look(pixels_Bhw3).reshape(-1, x_BLD.shape[-1]).astype(x_BLD.dtype)
        here = tokens_BL == self.config.image_id
        # The n-th image token of the batch, row by row, stands for the n-th vision token.
        n = jnp.cumsum(here).reshape(here.shape) - 1
        x_BLD = jnp.where(here[..., None], seen[n], x_BLD)
        hidden, _ = self.decoder.run_prefix(x_BLD, None, None)
        return self.decoder.logits(hidden)
