"""The Decoupled Rationale Module (GEODE Sec. 2.1) summarizes a room in R rationale tokens.

    frozen ViT tokens + Fourier code of the places they show --own projection--> F_2D [S, M, D]
    point features + Fourier code of their places, camera poses --own projections--> F_3D
    F_fused = F_2D + cross-attention(queries F_2D, keys and values F_3D)        Sec. 2.1.1
    [F_fused | (question)] --Mamba--> F_ST                                      Sec. 2.1.1
    R learned <Spatio> queries --attention to F_ST--> projection--> E_spatio    Sec. 2.1.2

The paper does not specify how R tokens are read from F_ST. Slots at the end of Mamba's row would
have to carry all content in its 16 states: on rooms they learned nothing in the steps in which
queries learned presence, place and size of every category.

The paper does not mention positions of 2D tokens either. Here each 2D token has a Fourier code of
the point that it shows, from VGGT's depth and camera. With appearance alone, the cross-attention
found no place in particular, unless a separate loss taught it which points are near.

M = V * P is the number of ViT tokens. Cameras and frames may be of different views (Table 2).
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Bool, Float, Float32

from geode_jax import ranges
from geode_jax.models.decoder import CrossAttention, DecoderConfig
from geode_jax.models.layers import LayerNorm, Mlp, Projection, RMSNorm, param
from geode_jax.models.mamba import MambaBlock, MambaConfig
from geode_jax.shapes import Array


@dataclasses.dataclass(frozen=True)
class DrmConfig:
    """Sizes of the module; the paper does not give them.

    Attributes:
        width: D of the module.
        heads: H of its cross-attentions.
        layers: number of Mamba blocks.
        slots: R.
        bands: octaves of the Fourier code of a place; the lowest has a period of 16 m.
        visual_width: C of the ViT tokens.
        point_width: C of the point features.
        llm_width: D of the decoder that reads the rationale tokens.
        max_frames: size of the frame embedding.
        condition_on_question: if True, the question's embeddings follow F_fused; the paper's module
            does not read the question.
        frames: number of views, evenly spaced, whose cameras and points are read (Table 2);
            0: all.
    """

    width: int
    heads: int
    layers: int
    slots: int
    bands: int
    visual_width: int
    point_width: int
    llm_width: int
    max_frames: int
    condition_on_question: bool = False
    frames: int = 0

    def __post_init__(self):
        sizes = "width heads slots bands visual_width llm_width max_frames"
        ranges.check(self, {sizes: ranges.whole(1), "point_width frames": ranges.whole(0)})
        ranges.check(self, {"layers": ranges.whole(1, ranges.MOST_BLOCKS)})
        ranges.check_divides(self, "heads", of="width")


def fourier_code(
    place_3: Float[Array, "*axes 3"], bands: int
) -> Float32[jax.Array, "*axes {3+6*bands}"]:
    """Returns codes of places, metres: place / 4, sines, cosines.

    Periods halve from 16 m on. Point features need this code, because Sonata's features are centred
    and hold no position.
    """
    place = jnp.asarray(place_3, jnp.float32)
    angle = place[..., None] * (2 * jnp.pi / 16 * 2.0 ** jnp.arange(bands))
    angle = angle.reshape(*place.shape[:-1], 3 * bands)
    return jnp.concatenate([place / 4, jnp.sin(angle), jnp.cos(angle)], axis=-1)


def camera_code(
    extrinsic_34: Float[Array, "*axes 3 4"], bands: int
) -> Float32[jax.Array, "*axes {12+6*bands}"]:
    """Returns codes of camera-from-world poses: axes, place."""
    pose = jnp.asarray(extrinsic_34, jnp.float32)
    rotation = pose[..., :3]
    # x_camera = R x + t is 0 at x = -R^T t.
    centre = -jnp.einsum("...ji,...j->...i", rotation, pose[..., 3])
    axes = rotation.reshape(*rotation.shape[:-2], 9)
    return jnp.concatenate([axes, fourier_code(centre, bands)], axis=-1)


def spread(mask_SV: Bool[Array, "S V"], most: int) -> Bool[jax.Array, "S V"]:
    """Returns a mask of at most `most` True entries of each row, evenly spaced, with the first."""
    order = jnp.cumsum(mask_SV, axis=1) - 1
    count = jnp.maximum(jnp.sum(mask_SV, axis=1, keepdims=True), 1)
    # Entry i of n is kept if it is the first of one of `most` equal shares.
    return jnp.asarray(mask_SV) & ((order * most) % count < most)


def sort_rows(
    x_SLD: Float[jax.Array, "S L D"], key_SL: Bool[Array, "S L"]
) -> Float[jax.Array, "S L D"]:
    """Sorts each row, entries with a False key first, stably."""
    order = jnp.argsort(key_SL, axis=1, stable=True)
    return jnp.take_along_axis(x_SLD, order[..., None], axis=1)


class Drm(nnx.Module):
    """The rationale module; see the file's docstring."""

    def __init__(self, config: DrmConfig, *, rngs: nnx.Rngs):
        c = self.config = config
        place = 3 + 6 * c.bands
        self.visual_norm = LayerNorm(c.visual_width)
        self.visual = Mlp(c.visual_width + place + 1, c.width, c.width, rngs=rngs)
        self.frame_embedding = param(
            0.02 * jax.random.normal(rngs.params(), (c.max_frames, c.width)), None, "embed"
        )
        self.point = Mlp(c.point_width + place, c.width, c.width, rngs=rngs)
        self.camera = Mlp(9 + place, c.width, c.width, rngs=rngs)
        self.context_norm = LayerNorm(c.width)
        attention = DecoderConfig(
            vocab_size=0,
            width=c.width,
            layers=1,
            heads=c.heads,
            kv_heads=c.heads,
            head_width=c.width // c.heads,
            mlp_width=0,
        )
        self.fuse = CrossAttention(attention, rngs=rngs)
        self.slots = param(jax.random.normal(rngs.params(), (c.slots, c.width)), None, "embed")
        if c.condition_on_question:
            self.question = Projection(
                (c.llm_width,), (c.width,), (None, "embed"), bias=True, rngs=rngs
            )
        mamba = MambaConfig(width=c.width, layers=c.layers)
        self.mamba = nnx.List(MambaBlock(mamba, rngs=rngs) for _ in range(c.layers))
        self.state_norm = RMSNorm(c.width, eps=1e-5)
        self.readout = CrossAttention(attention, rngs=rngs)
        self.mlp_norm = LayerNorm(c.width)
        self.mlp = Mlp(c.width, 2 * c.width, c.width, rngs=rngs)
        self.norm = LayerNorm(c.width)
        self.project = Projection((c.width,), (c.llm_width,), ("embed", None), bias=True, rngs=rngs)

    def __call__(
        self,
        visual_SVPC: Float[Array, "S V P C"],
        visual_mask_SV: Bool[Array, "S V"],
        place_SVP3: Float[Array, "S V P 3"],
        place_mask_SVP: Bool[Array, "S V P"],
        point_SJC: Float[Array, "S J {self.config.point_width}"],
        coord_SJ3: Float[Array, "S J 3"],
        point_mask_SJ: Bool[Array, "S J"],
        extrinsic_SV34: Float[Array, "S cameras 3 4"],
        camera_mask_SV: Bool[Array, "S cameras"],
        question_SLD: Float[Array, "S L {self.config.llm_width}"] | None = None,
        question_mask_SL: Bool[Array, "S L"] | None = None,
    ) -> Float[jax.Array, "S {self.config.slots} {self.config.llm_width}"]:
        """Returns E_spatio [S, R, llm_width].

        No slot reads another, so the first r slots equal those of a module with r slots: Table 3
        varies R at inference with one checkpoint.

        Args:
            visual_SVPC: P frozen ViT tokens of each frame.
            visual_mask_SV: False = padding frame.
            place_SVP3: the point that a token shows, metres.
            place_mask_SVP: False = unknown place.
            point_SJC: point features.
            coord_SJ3: their places in the same world, metres, z up, centred in x and y, floor at 0
                (`exports.frames`).
            point_mask_SJ: False = padding point.
            extrinsic_SV34: camera-from-world poses in the same world; their views may differ from
                the ViT's frames (Table 2).
            camera_mask_SV: False = padding camera.
            question_SLD: embeddings of the question, required with `condition_on_question`.
            question_mask_SL: False = padding token.
        """
        c = self.config
        S, _, P = visual_SVPC.shape[:3]
        flat = self._flat(visual_SVPC, place_SVP3, place_mask_SVP)
        fused = self._fused(
            flat, point_SJC, coord_SJ3, point_mask_SJ, extrinsic_SV34, camera_mask_SV
        )
        valid = jnp.repeat(jnp.asarray(visual_mask_SV), P, axis=1)
        if c.condition_on_question:
            assert question_SLD is not None and question_mask_SL is not None
            question = self.question(jnp.asarray(question_SLD, fused.dtype))
            fused = jnp.concatenate([fused, question], axis=1)
            valid = jnp.concatenate([valid, jnp.asarray(question_mask_SL)], axis=1)
        # Padding goes to the end of the row: Mamba reads from left to right.
        x = sort_rows(fused, ~valid)
        with jax.named_scope("mamba"):
            for block in self.mamba:
                x, _ = block(x)
        with jax.named_scope("readout"):
            states = self.readout.keys(self.state_norm(x))
            slots = jnp.broadcast_to(self.slots[...].astype(x.dtype), (S, c.slots, c.width))
            slots = self.readout(slots, states, jnp.sum(valid, axis=1, dtype=jnp.int32))
            slots = slots + self.mlp(self.mlp_norm(slots))
        return self.project(self.norm(slots))

    def _flat(self, visual_SVPC: Array, place_SVP3: Array, place_mask_SVP: Array) -> jax.Array:
        """Returns F_2D [S, M, D]."""
        S, V, P = visual_SVPC.shape[:3]
        known = jnp.asarray(place_mask_SVP)[..., None]
        place = jnp.where(known, fourier_code(place_SVP3, self.config.bands), 0.0)
        seen = self.visual_norm(visual_SVPC)
        parts = [seen, place.astype(seen.dtype), known.astype(seen.dtype)]
        flat = self.visual(jnp.concatenate(parts, axis=-1))
        flat = flat + self.frame_embedding[...][:V, None].astype(flat.dtype)
        return flat.reshape(S, V * P, -1)

    def _fused(self, flat_SMD, point_SJC, coord_SJ3, point_mask_SJ, extrinsic, camera_mask):
        """Returns F_fused [S, M, D] = F_2D + cross-attention to points and cameras (Sec. 2.1.1)."""
        bands = self.config.bands
        coord = fourier_code(coord_SJ3, bands)
        points = self.point(jnp.concatenate([point_SJC, coord], axis=-1))
        cameras = self.camera(camera_code(extrinsic, bands).astype(flat_SMD.dtype))
        valid = jnp.concatenate([jnp.asarray(camera_mask), jnp.asarray(point_mask_SJ)], axis=1)
        context = jnp.concatenate([cameras, points.astype(flat_SMD.dtype)], axis=1)
        with jax.named_scope("fuse"):
            seen = self.fuse.keys(self.context_norm(sort_rows(context, ~valid)))
            return self.fuse(flat_SMD, seen, jnp.sum(valid, axis=1, dtype=jnp.int32))
