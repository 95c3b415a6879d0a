"""GEODE (Fig. 2): InternVL with a rationale module before it and regression heads behind it.

    frames --frozen InternViT--> features --projector--> visual tokens
                                 features, points, cameras --DRM--> E_spatio   (Sec. 2.1)
    [E_spatio][visual tokens] --decoder--> keys and values of the prefix, once for a scene
    [question][bos][answer] --decoder (sees the prefix)--> text; at <REG>, <3DBBOX> --DRH--> (eq. 5)

The stage determines which parts form the prefix: only E_spatio in stage 1 (eq. 4), only the visual
tokens without a rationale module (Table 4), nothing in the blind baseline.
"""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, Float32, Int32, Num

from geode_jax import ranges
from geode_jax.errors import UserError
from geode_jax.models.decoder import KeyValues
from geode_jax.models.drh import Drh
from geode_jax.models.drm import Drm, DrmConfig, spread
from geode_jax.models.internvl import InternVL, InternVLConfig
from geode_jax.models.layers import Projection
from geode_jax.models.layout import LayoutEncoder
from geode_jax.models.packed import read_packed
from geode_jax.models.task_heads import SpatialHead
from geode_jax.models.vit import InternViT
from geode_jax.shapes import Array, Batch

Part = Literal["layout", "spatio", "visual"]
"""The parts of a prefix, in this order."""

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True)
class GeodeConfig:
    """Sizes of the parts.

    Attributes:
        vlm: vision encoder, projector and decoder.
        drm: the rationale module; None: Table 4's model without it.
        drh_width: inner width of the regression heads; 0: Table 4's model that writes numbers as
            text.
        patch_grid: (gh, gw) patches of the export's views; the encoder's grid may differ.
        categories, views: numbers of categories and views of the export, for the parts that replace
            pretraining on small machines: layout encoder, patch classifier, spatial head. With 0
            categories there are none.
    """

    vlm: InternVLConfig
    drm: DrmConfig | None
    drh_width: int
    patch_grid: tuple[int, int]
    categories: int = 0
    views: int = 0

    def __post_init__(self):
        ranges.check(self, {"drh_width categories views": ranges.whole(0)})
        if len(self.patch_grid) != 2 or min(self.patch_grid) < 1:
            raise UserError(f"GeodeConfig: patch_grid: {self.patch_grid} is not (gh, gw)")


class Prefix(NamedTuple):
    """The prefix of a scene, which all its questions see.

    Attributes:
        keys: keys and values of the columns.
        length_S: number of valid columns, which come first.
        spatio_SRD: E_spatio, if it is part of the prefix.
    """

    keys: list[KeyValues]
    length_S: Array
    spatio_SRD: Array | None = None


def nearest_patches(grid: int, patch_grid: tuple[int, int]) -> Int32[np.ndarray, " {grid**2}"]:
    """Returns the export's patch at the centre of each of the grid * grid tokens of a frame."""
    row, column = ((np.arange(grid) + 0.5) * size // grid for size in patch_grid)
    return (row[:, None] * patch_grid[1] + column).astype(np.int32).reshape(-1)


def encode_frames(
    encoder: InternViT, image_Bhw3: Num[Array, "B h w 3"]
) -> Float[jax.Array, "B _ C"]:
    """Returns hidden states [B, 1 + P, C] of frames (0 to 255), the class token first.

    Frames are resized to the encoder's square without keeping their aspect ratio, as InternVL does
    for a single tile.
    """
    pixels = jnp.asarray(image_Bhw3).astype(jnp.float32) / 255
    square = (len(pixels), encoder.config.image_size, encoder.config.image_size, 3)
    if pixels.shape != square:
        pixels = jax.image.resize(pixels, square, "cubic").clip(0, 1)
    return encoder((pixels - np.array(IMAGENET_MEAN)) / np.array(IMAGENET_STD))


class Geode(nnx.Module):
    """The GEODE model; see the file's docstring."""

    def __init__(self, config: GeodeConfig, *, rngs: nnx.Rngs):
        c = self.config = config
        self.vlm = InternVL(c.vlm, rngs=rngs)
        self.drm = None if c.drm is None else Drm(c.drm, rngs=rngs)
        width, seen = c.vlm.decoder.width, c.vlm.vision.width
        self.drh = Drh(width, c.drh_width, rngs=rngs) if c.drh_width else None
        small = c.categories > 0
        self.layout = LayoutEncoder(c.categories, c.views, width, rngs=rngs) if small else None
        self.spatial_head = SpatialHead(width, rngs=rngs) if small else None
        self.patch_classifier = (
            Projection((seen,), (c.categories + 1,), ("embed", None), bias=True, rngs=rngs)
            if small
            else None
        )

    def features(self, batch: Batch) -> Float[jax.Array, "S V _ C"]:
        """Returns the encoder's hidden states [S, V, 1 + P, C], stored in the batch or computed."""
        if not batch.image_SVhw3.size:
            return jnp.asarray(batch.vision_SVPC).astype(self.config.vlm.vision.dtype)
        S, V, *frame = batch.image_SVhw3.shape
        with jax.named_scope("vision"):
            hidden = encode_frames(self.vlm.vision, batch.image_SVhw3.reshape(S * V, *frame))
        return hidden.reshape(S, V, *hidden.shape[1:])

    def patch_logits(self, batch: Batch) -> Float32[jax.Array, "S V P {self.config.categories+1}"]:
        """Returns category logits of the patches; the last class is "none"."""
        assert self.patch_classifier is not None, "the model has no patch classifier"
        return self.patch_classifier(self.features(batch)[:, :, 1:]).astype(jnp.float32)

    def rationale(
        self, batch: Batch, features_SVLC: Float[Array, "S V L C"]
    ) -> Float[jax.Array, "S R D"]:
        """Returns E_spatio.

        A module that is conditioned on the question reads the scene's first question, so each scene
        must have one question only.

        Args:
            batch: the scenes.
            features_SVLC: result of `features`; L = 1 + P.
        """
        drm, config = self.drm, self.config.drm
        assert drm is not None and config is not None, "the model has no rationale module"
        view_mask_SV, point_mask_SJ = batch.view_mask_SV, batch.point_mask_SJ
        here = nearest_patches(self.config.vlm.vision.grid, self.config.patch_grid)
        place, known = batch.points_SVP3[:, :, here], jnp.asarray(batch.points_mask_SVP)[:, :, here]
        if config.frames:
            view_mask_SV = spread(view_mask_SV, config.frames)
            frame = jnp.asarray(batch.point_frame_SJ)
            of_these = jnp.take_along_axis(view_mask_SV, jnp.maximum(frame, 0), axis=1)
            point_mask_SJ = jnp.asarray(point_mask_SJ) & of_these & (frame >= 0)
            known &= view_mask_SV[..., None]
        question, mask = None, None
        if config.condition_on_question:
            ids_SL, length_S1 = (
                jnp.asarray(x)[:, 0]
                for x in (batch.question_SQL, batch.question_length_SQ[..., None])
            )
            question = self.vlm.decoder.embed(ids_SL)
            mask = jnp.arange(ids_SL.shape[1]) >= ids_SL.shape[1] - length_S1  # left-padded
        with jax.named_scope("drm"):
            return drm(
                features_SVLC[:, :, 1:],
                batch.view_mask_SV,
                place,
                known,
                batch.point_SJC,
                batch.coord_SJ3,
                point_mask_SJ,
                batch.extrinsic_SV34,
                view_mask_SV,
                question,
                mask,
            )

    def prefix(self, batch: Batch, parts: tuple[Part, ...], slots: int | None = None) -> Prefix:
        """Runs the parts of the prefix, in the order of `Part`, through the decoder.

        Args:
            batch: the scenes.
            parts: parts of the prefix.
            slots: number of rationale tokens to use (Table 3); None: all.
        """
        S, V = batch.view_mask_SV.shape
        columns, spatio = [], None
        # Every stage freezes the encoder.
        features = (
            jax.lax.stop_gradient(self.features(batch)) if {"spatio", "visual"} & {*parts} else None
        )
        if "layout" in parts:
            assert self.layout is not None, "the model has no layout encoder"
            columns.append(self.layout(batch))
        if "spatio" in parts:
            assert features is not None
            spatio = self.rationale(batch, features)[:, :slots]
            columns.append(spatio)
        length_S = jnp.full(S, sum(x.shape[1] for x in columns), jnp.int32)
        if "visual" in parts:
            assert features is not None
            seen = self.vlm.projector(features.reshape(S * V, *features.shape[2:]))
            columns.append(seen.reshape(S, -1, seen.shape[-1]))
            # Padding views come last.
            views_S = jnp.sum(batch.view_mask_SV, axis=1, dtype=jnp.int32)
            length_S += views_S * seen.shape[1]
        decoder = self.vlm.decoder
        if not columns:
            return Prefix(decoder.no_prefix(S), length_S)
        dtype = decoder.config.dtype
        x = jnp.concatenate([part.astype(dtype) for part in columns], axis=1)
        # A scene without views has an empty prefix.
        length_S = jnp.where(jnp.any(batch.view_mask_SV, axis=1), length_S, 0)
        return Prefix(decoder.run_prefix(x, None, None)[1], length_S, spatio)

    def read(self, batch: Batch, prefix: Prefix) -> Float[jax.Array, "S _ D"]:
        """Returns states [S, W * T, D] of the packed questions and answers; see `read_packed`."""
        sees = jnp.broadcast_to(prefix.length_S[:, None, None], batch.packed_SWT.shape)
        return read_packed(self.vlm.decoder, batch, prefix.keys, prefix.length_S, sees)
