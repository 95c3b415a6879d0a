"""The decoder: one pre-norm transformer, of which the student's trunk and Qwen2.5 are two configs.

Hidden-CoT Sec. III-C: 24 layers, width 2048, 16 heads, feed-forward 8192, from scratch, with
"cross-modal attention" to the vision features in chosen layers. Qwen2.5 needs only switches:
grouped-query attention, qkv bias, SwiGLU, RMSNorm, a tied head and the RoPE base.
"""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Bool, Float, Float32, Int, Shaped

from geode_jax import ranges
from geode_jax.errors import UserError
from geode_jax.models.layers import (
    LayerNorm,
    Projection,
    RMSNorm,
    param,
    rotary_angles,
    rotate,
    stack,
)
from geode_jax.ops.attention import Intervals, attention, causal
from geode_jax.ops.cross_entropy import token_loss
from geode_jax.shapes import Array
from geode_jax.sharding import constrain

REMAT = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
"""Rematerialization: what is kept of a layer for the backward pass."""


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes and switches of a decoder.

    Attributes:
        vocab_size: X.
        width: D.
        layers: number of self-attention blocks.
        heads: query heads H; `kv_heads` (G) divides it.
        head_width: E.
        mlp_width: inner width of the feed-forward layers.
        mlp: "gelu" (two matrices) or "swiglu" (three).
        norm: "layer" or "rms".
        qkv_bias: bias on query, key and value.
        linear_bias: bias on the attention output and the feed-forward matrices.
        tied_head: logits from the embedding matrix.
        rope_theta: base of the rotary frequencies.
        dynamic_rope: (trained length, factor) of "dynamic NTK" scaling, see `rotary_angles`; None:
            no scaling.
        norm_eps: epsilon of the norms.
        cross_layers: numbers of the blocks that follow a cross-attention to the vision features.
        remat: key of `REMAT`.
        dtype: dtype of the activations; parameters are float32, or as stored in a checkpoint.
    """

    vocab_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    mlp_width: int
    mlp: Literal["gelu", "swiglu"] = "gelu"
    norm: Literal["layer", "rms"] = "layer"
    qkv_bias: bool = True
    linear_bias: bool = True
    tied_head: bool = False
    rope_theta: float = 10_000.0
    dynamic_rope: tuple[int, float] | None = None
    norm_eps: float = 1e-5
    cross_layers: tuple[int, ...] = ()
    remat: str = "none"
    dtype: str = "float32"

    def __post_init__(self):
        ranges.check(
            self,
            {
                "width layers heads kv_heads head_width": ranges.whole(1),
                "vocab_size mlp_width": ranges.whole(0),  # 0: attention only, as in `drm`
                "mlp": ranges.one_of(("gelu", "swiglu")),
                "norm": ranges.one_of(("layer", "rms")),
                "rope_theta norm_eps": ranges.real(0, above=True),
                "remat": ranges.one_of(REMAT),
                "dtype": ranges.DTYPES,
            },
        )
        ranges.check_divides(self, "kv_heads", of="heads")
        if self.head_width % 2:
            rule = "odd, but rotary positions rotate pairs of channels"
            raise UserError(f"DecoderConfig: head_width: {self.head_width} is {rule}")
        if not all(0 <= layer < self.layers for layer in self.cross_layers):
            rule = f"layers below {self.layers}"
            raise UserError(f"DecoderConfig: cross_layers: {self.cross_layers} are not {rule}")

    def make_norm(self) -> nnx.Module:
        """Returns a norm over the width."""
        kind = {"layer": LayerNorm, "rms": RMSNorm}[self.norm]
        return kind(self.width, eps=self.norm_eps)


QWEN2P5_1P5B = DecoderConfig(
    vocab_size=151_936,
    width=1536,
    layers=28,
    heads=12,
    kv_heads=2,
    head_width=128,
    mlp_width=8960,
    mlp="swiglu",
    norm="rms",
    linear_bias=False,
    tied_head=True,
    rope_theta=1e6,
    norm_eps=1e-6,
    dtype="bfloat16",
)
"""Qwen2.5-1.5B, base and Instruct: 1,543,714,304 parameters."""


class KeyValues(NamedTuple):
    """Keys and values [layer, B, M, G, E] of the blocks of a stage, or [B, M, G, E] of a block."""

    k: Array
    v: Array


Cache = list[KeyValues] | list[list[KeyValues]]
"""Per stage, the keys and values of its blocks: stacked, or of a decoder that `decoding` has
prepared a list."""


class SelfAttention(nnx.Module):
    """Causal self-attention with rotary positions and grouped key heads."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        c = config
        q_names, kv_names = ("embed", "heads", "head_dim"), ("embed", "kv_heads", "head_dim")
        kv = (c.kv_heads, c.head_width)
        self.q = Projection(
            (c.width,), (c.heads, c.head_width), q_names, bias=c.qkv_bias, rngs=rngs
        )
        self.k = Projection((c.width,), kv, kv_names, bias=c.qkv_bias, rngs=rngs)
        self.v = Projection((c.width,), kv, kv_names, bias=c.qkv_bias, rngs=rngs)
        self.out = Projection(
            (c.heads, c.head_width),
            (c.width,),
            ("heads", "head_dim", "embed"),
            bias=c.linear_bias,
            scale=(2 * c.layers) ** -0.5,
            rngs=rngs,
        )

    def __call__(
        self,
        x_BLD: Float[Array, "B L D"],
        angles,
        intervals: Intervals,
        cache: KeyValues | None,
        offset: Int[Array, ""] | int,
    ) -> tuple[Float[jax.Array, "B L D"], KeyValues]:
        q, k, v = self.project(x_BLD)
        q, k = rotate(q, angles), rotate(k, angles)
        if cache is not None:
            k, v = _append(cache.k, k, offset), _append(cache.v, v, offset)
        return self.out(attention(q, k, v, intervals)), KeyValues(k, v)

    def project(self, x_BLD: Float[Array, "B L D"]) -> list[Float[jax.Array, "B L _ E"]]:
        """Returns queries [B, L, H, E], keys and values [B, L, G, E]."""
        return [self.q(x_BLD), self.k(x_BLD), self.v(x_BLD)]


def _append(cache: Array, new: Array, offset: Array | int) -> jax.Array:
    """Writes new keys or values behind the first `offset` columns; a full cache grows."""
    new = new.astype(cache.dtype)
    if isinstance(offset, int) and offset == cache.shape[1]:
        return jnp.concatenate([cache, new], axis=1)
    return jax.lax.dynamic_update_slice_in_dim(cache, new, offset, axis=1)


class FeedForward(nnx.Module):
    """GELU (two matrices) or SwiGLU (three)."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        c, names = config, ("embed", "mlp")
        up = {"bias": c.linear_bias, "rngs": rngs}
        self.up = Projection((c.width,), (c.mlp_width,), names, **up)
        self.gate = (
            Projection((c.width,), (c.mlp_width,), names, **up) if c.mlp == "swiglu" else None
        )
        self.down = Projection(
            (c.mlp_width,),
            (c.width,),
            ("mlp", "embed"),
            bias=c.linear_bias,
            scale=(2 * c.layers) ** -0.5,
            rngs=rngs,
        )

    def __call__(self, x: Float[Array, "*axes D"]) -> Float[jax.Array, "*axes D"]:
        up, *gate = self.widen(x)
        if not gate:
            return self.down(jax.nn.gelu(up, approximate=False))
        return self.down(jax.nn.silu(gate[0]) * up)

    def widen(self, x: Float[Array, "*axes D"]) -> list[Float[jax.Array, "*axes inner"]]:
        """Returns the products with the matrix `up` and, if there is one, with the gate."""
        return [self.up(x)] if self.gate is None else [self.up(x), self.gate(x)]


class Block(nnx.Module):
    """x += attention(norm(x)); x += feed_forward(norm(x))."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.attention_norm = config.make_norm()
        self.attention = SelfAttention(config, rngs=rngs)
        self.mlp_norm = config.make_norm()
        self.mlp = FeedForward(config, rngs=rngs)

    def __call__(
        self, x_BLD: Float[jax.Array, "B L D"], angles, intervals, cache, offset
    ) -> tuple[Float[jax.Array, "B L D"], KeyValues]:
        with jax.named_scope("self_attention"):
            out, kv = self.attention(self.attention_norm(x_BLD), angles, intervals, cache, offset)
            x_BLD = x_BLD + out
        with jax.named_scope("feed_forward"):
            return x_BLD + self.mlp(self.mlp_norm(x_BLD)), kv


CROSS_ATTENTION_SCALE = 2**0.5
"""Initial scale of a cross-attention's query and key kernels. At scale 1, a word gives a similar
feature too little attention beside hundreds of dissimilar ones to learn from it."""


class CrossAttention(nnx.Module):
    """Hidden-CoT's "cross-modal attention" (Sec. III-C): text attends to the vision features.

    The key kernel starts as a copy of the query kernel, so that a word initially attends to
    features similar to its embedding. With independent kernels this would have to be learned first.
    """

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        c, names = config, ("embed", "heads", "head_dim")
        heads = (c.heads, c.head_width)
        self.norm = c.make_norm()
        self.q = Projection(
            (c.width,), heads, names, bias=c.qkv_bias, scale=CROSS_ATTENTION_SCALE, rngs=rngs
        )
        self.k = Projection((c.width,), heads, names, bias=c.qkv_bias, rngs=rngs)
        self.v = Projection((c.width,), heads, names, bias=c.qkv_bias, rngs=rngs)
        self.out = Projection(
            heads, (c.width,), ("heads", "head_dim", "embed"), bias=c.linear_bias, rngs=rngs
        )
        self.k.kernel[...] = self.q.kernel[...]

    def keys(self, z_SMD: Float[Array, "S M D"]) -> KeyValues:
        """Returns keys and values [S, M, H, E] of the vision features, once per scene."""
        return KeyValues(self.k(z_SMD), self.v(z_SMD))

    def __call__(
        self, x_BLD: Float[jax.Array, "B L D"], seen: KeyValues, seen_length_S: Int[Array, " S"]
    ) -> Float[jax.Array, "B L D"]:
        """Adds the attention of each row to the first `seen_length_S` features of its scene.

        Rows are in scene order, so B is a multiple of S.
        """
        B, L, D = x_BLD.shape
        S = seen.k.shape[0]
        q = self.q(self.norm(x_BLD))
        q = q.reshape(S, (B // S) * L, *q.shape[2:])
        end = seen_length_S[:, None].astype(jnp.int32)
        zero = jnp.zeros_like(end)
        out = self.out(attention(q, *seen, Intervals(zero, zero, end)))
        return jnp.asarray(x_BLD) + out.reshape(B, L, D)


class Stage(nnx.Module):
    """An optional cross-attention, then equal blocks, stacked and scanned."""

    def __init__(self, config: DecoderConfig, blocks: int, cross: bool, *, rngs: nnx.Rngs):
        self.remat = config.remat
        self.cross = CrossAttention(config, rngs=rngs) if cross else None
        self.blocks = stack(lambda r: Block(config, rngs=r), blocks, rngs) if blocks else None
        self.length = blocks

    def __call__(self, x_BLD, angles, intervals, cache, offset, seen, seen_length_S):
        if self.cross is not None and seen is not None:
            with jax.named_scope("cross_attention"):
                x_BLD = self.cross(x_BLD, seen, seen_length_S)

        def body(x, layer):
            block, layer_cache = layer
            x, kv = block(x, angles, intervals, layer_cache, offset)
            return constrain(x, "batch", "length", "width"), kv

        if isinstance(self.blocks, nnx.List):  # of a decoder that `decoding` has prepared
            kvs = []
            for layer in zip(self.blocks, cache or [None] * self.length, strict=True):
                x_BLD, kv = body(x_BLD, layer)
                kvs.append(kv)
            return x_BLD, kvs
        if self.remat != "none":
            body = jax.checkpoint(body, policy=REMAT[self.remat])
        # Without remat all intermediate values are kept; a loop would copy them to stacked arrays.
        unroll = self.remat == "none"
        return jax.lax.scan(body, x_BLD, (self.blocks, cache), unroll=unroll)


class Decoder(nnx.Module):
    """Token embedding, stages of blocks, final norm, language-model head."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        c = self.config = config
        table = 0.02 * jax.random.normal(rngs.params(), (c.vocab_size, c.width))
        self.embedding = param(table, "vocab", "embed")
        bounds = sorted({0, *c.cross_layers, c.layers})
        self.stages = nnx.List(
            Stage(c, stop - first, first in c.cross_layers, rngs=rngs)
            for first, stop in itertools.pairwise(bounds)
        )
        self.norm = c.make_norm()
        self.head = (
            None
            if c.tied_head
            else Projection((c.width,), (c.vocab_size,), ("embed", "vocab"), bias=False, rngs=rngs)
        )

    def embed(self, ids: Int[Array, "*axes"]) -> Float[jax.Array, "*axes D"]:
        """Returns token embeddings of ids in the dtype of the activations."""
        return self.embedding[...].astype(self.config.dtype)[ids]

    def logits(self, x: Float[Array, "*axes D"]) -> Float32[jax.Array, "*axes X"]:
        """Returns vocabulary logits of normed hidden states."""
        if self.head is not None:
            out = self.head(x)
        else:
            out = jnp.einsum("...d,xd->...x", x, self.embedding[...].astype(x.dtype))
        between = (None,) * (out.ndim - 2)
        return constrain(out.astype(jnp.float32), "batch", *between, "vocab")

    def token_loss(
        self,
        loss: Callable[..., Array],
        hidden_SLD: Float[Array, "S L D"],
        ids_SLk: Int[Array, "S L k"],
        mask_SL: Bool[Array, "S L"],
        *targets_SL: Shaped[Array, "S L ..."],
        rest: int | None = None,
    ) -> Float32[jax.Array, ""]:
        """Returns the sum of a loss of the tokens' logits; see `ops.cross_entropy.token_loss`."""
        tied = self.head is None
        matrix = self.embedding[...] if self.head is None else self.head.kernel[...]
        return token_loss(
            loss, hidden_SLD, matrix, ids_SLk, mask_SL, *targets_SL, tied=tied, rest=rest
        )

    def cross_keys(self, z_SMD: Float[Array, "S M D"]) -> list[KeyValues | None]:
        """Returns every stage's keys and values of the vision features, once per scene."""
        return [None if s.cross is None else s.cross.keys(z_SMD) for s in self.stages]

    def run(
        self,
        x_BLD: Float[Array, "B L D"],
        positions_BL: Int[Array, "B L"],
        intervals: Intervals,
        *,
        cache: Cache | None = None,
        offset: Int[Array, ""] | int = 0,
        seen: list[KeyValues | None] | None = None,
        seen_length_S: Int[Array, " S"] | None = None,
    ) -> tuple[Float[jax.Array, "B L D"], list]:
        """Returns the normed hidden states of embeddings, and their keys and values.

        Args:
            x_BLD: embeddings.
            positions_BL: rotary positions.
            intervals: visible keys; with a cache, columns count from its start.
            cache: per stage, keys and values [layer, B, M, G, E]; for a decoder that `decoding` has
                prepared, a list of [B, M, G, E]. The rows' own keys are written at columns
                [offset, offset + L).
            offset: see `cache`.
            seen: result of `cross_keys` for S scenes; rows are in scene order.
            seen_length_S: valid vision tokens per scene; 0 = no vision.

        Returns:
            Hidden states, and per stage the keys and values, or the updated cache.
        """
        c = self.config
        angles = rotary_angles(positions_BL, c.head_width, c.rope_theta, c.dynamic_rope)
        x_BLD = constrain(x_BLD, "batch", "length", "width")
        out = []
        for i, stage in enumerate(self.stages):
            x_BLD, kv = stage(
                x_BLD,
                angles,
                intervals,
                None if cache is None else cache[i],
                offset,
                None if seen is None else seen[i],
                seen_length_S,
            )
            out.append(kv)
        return self.norm(x_BLD), out

    def no_prefix(self, scenes: int) -> list[KeyValues]:
        """Returns the keys and values of a prefix without columns, as `run_prefix` returns them."""
        c = self.config
        return [
            KeyValues(*jnp.zeros((2, s.length, scenes, 0, c.kv_heads, c.head_width), c.dtype))
            for s in self.stages
        ]

    def run_prefix(
        self,
        prefix_SLD: Float[jax.Array, "S L D"],
        seen: list[KeyValues | None] | None,
        seen_length_S: Int[Array, " S"] | None,
    ) -> tuple[Float[jax.Array, "S L D"], list]:
        """Runs the embeddings before a scene's text, with a causal mask and positions 0 to L - 1.

        Returns:
            Hidden states, and the keys and values that `fan_out` copies for the text.
        """
        S, L, _ = prefix_SLD.shape
        positions = jnp.broadcast_to(jnp.arange(L, dtype=jnp.int32), (S, L))
        return self.run(prefix_SLD, positions, causal(S, L), seen=seen, seen_length_S=seen_length_S)

    def __call__(self, tokens_BL: Int[Array, "B L"]) -> Float32[jax.Array, "B L X"]:
        """Returns logits of ids, as a plain causal language model."""
        B, L = tokens_BL.shape
        positions = jnp.broadcast_to(jnp.arange(L, dtype=jnp.int32), (B, L))
        x, _ = self.run(self.embed(tokens_BL), positions, causal(B, L))
        return self.logits(x)


def fan_out(cache: Cache, copies: int, columns: int = 0) -> list:
    """Returns the keys and values of S prefixes for `copies` rows each, with free columns behind.

    [..., S, M, G, E] becomes [..., S * copies, M + columns, G, E], so that all questions of a scene
    read its prefix, which is computed once.
    """

    def widen(x):
        *layer, S, M, G, E = x.shape
        x = jnp.broadcast_to(x[..., None, :, :, :], (*layer, S, copies, M, G, E))
        x = x.reshape(*layer, S * copies, M, G, E)
        return jnp.pad(x, [(0, 0)] * (len(layer) + 1) + [(0, columns), (0, 0), (0, 0)])

    return jax.tree.map(widen, cache)
