"""GEODE's stages as systems: their settings, the rules of these, and their objectives."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from geode_jax.data.control import BOX, REG
from geode_jax.data.scene_arrays import GEODE_VISION, SceneShapes
from geode_jax.errors import UserError
from geode_jax.models.decoder import REMAT, DecoderConfig
from geode_jax.models.drm import DrmConfig
from geode_jax.models.geode import GeodeConfig
from geode_jax.models.internvl import INTERNVL_TOKENS, InternVLConfig
from geode_jax.models.vit import VitConfig
from geode_jax.objectives.geode import GeodeStage, GeodeStageConfig, Stage, learned_parts
from geode_jax.runs.settings import (
    Dtype,
    LossSettings,
    Nouns,
    Rule,
    Settings,
    Shaped,
    System,
    TokenizerRules,
    Vocabulary,
    at_least,
    one_of,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderSettings:
    """Sizes of GEODE's decoder (Qwen2.5), see `models.decoder.DecoderConfig`.

    Attributes:
        vocab_size: rows of the embedding; 0: as many as the tokenizer has tokens.
        width: of the residual stream.
        layers: self-attention blocks.
        heads: query heads.
        kv_heads: key and value heads.
        mlp_width: inner width of a block's feed-forward part.
        mlp: "gelu" or "swiglu".
        norm: "layer" or "rms".
        linear_bias: bias on the attention output and the feed-forward matrices.
        tied_head: logits from the embedding matrix.
        rope_theta: base of the rotary frequencies.
        norm_eps: epsilon of the norms.
        remat: what the backward pass keeps of a block, a key of `models.decoder.REMAT`.
        dtype: of the activations.
    """

    vocab_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    mlp_width: int
    mlp: Literal["gelu", "swiglu"]
    norm: Literal["layer", "rms"]
    linear_bias: bool
    tied_head: bool
    rope_theta: float
    norm_eps: float
    remat: str
    dtype: Dtype


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionSettings:
    """Sizes of GEODE's vision encoder (InternViT), see `models.vit.VitConfig`.

    Attributes:
        image_size: side in pixels to which pictures are squeezed; 0: as the export has them.
        patch_size: side of a patch in pixels.
        width: of the encoder.
        layers: blocks.
        heads: attention heads.
        mlp_width: inner width of a block's feed-forward part.
        dtype: of the activations.
    """

    image_size: int = 0
    patch_size: int
    width: int
    layers: int
    heads: int
    mlp_width: int
    dtype: Dtype


@dataclasses.dataclass(frozen=True, kw_only=True)
class DrmSettings:
    """The rationale module, see `models.drm.DrmConfig`.

    Attributes:
        on: False: the model has none (Table 4).
        width: of the module.
        heads: of its cross-attention.
        layers: Mamba blocks.
        slots: rationale tokens.
        bands: octaves of the Fourier code of a place.
        condition_on_question: the module reads the question, too.
        frames: views whose cameras and points it sees (Table 2); 0: all.
    """

    on: bool
    width: int
    heads: int
    layers: int
    slots: int
    bands: int
    condition_on_question: bool
    frames: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class GeodeModelSettings:
    """Sizes of GEODE's parts.

    Attributes:
        decoder, vision, drm: see their classes.
        drh_width: inner width of the regression head; 0: the model writes numbers as text
            (Table 4).
        stand_ins: the model has the layout encoder and the patch classifier of `models.layout`.
    """

    decoder: DecoderSettings
    vision: VisionSettings
    drm: DrmSettings
    drh_width: int
    stand_ins: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class GeodeLossSettings(LossSettings):
    """Weights of a stage's losses, see `objectives.geode.GeodeStageConfig`.

    Attributes:
        regression_weight: lambda of eq. 7, of values and boxes.
        regression: eq. 6 compares "codes" or the "raw" numbers.
        layout_weight: of the distance between E_spatio and the layout's columns.
        rationale_weight: of the distance between E_spatio and its rationales' embedding.
        patch_weight: of the patches' categories.
        spatial_weight: of what a question is about.
    """

    regression_weight: float
    regression: Literal["codes", "raw"] = "codes"
    layout_weight: float
    rationale_weight: float
    patch_weight: float
    spatial_weight: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class GeodeSettings(Settings):
    """Settings of a run of one of GEODE's stages.

    Attributes:
        model, loss: see their classes.
    """

    model: GeodeModelSettings
    loss: GeodeLossSettings

    RULES = (
        *Settings.RULES,
        (
            "model.drh_width loss.regression_weight loss.patch_weight loss.spatial_weight "
            "loss.layout_weight loss.rationale_weight model.drm.frames model.vision.image_size",
            *at_least(0),
        ),
        (
            "model.decoder.width model.decoder.layers model.decoder.heads model.decoder.kv_heads "
            "model.decoder.mlp_width model.vision.patch_size model.vision.width "
            "model.vision.layers model.vision.heads model.vision.mlp_width model.drm.width "
            "model.drm.heads model.drm.layers model.drm.slots model.drm.bands",
            *at_least(1),
        ),
        ("model.decoder.remat", *one_of(tuple(REMAT))),
        ("data.vision", *one_of(GEODE_VISION)),
        (
            "loss.layout_weight",
            lambda v, c: not v or c.model.stand_ins,
            "0 without model.stand_ins",
        ),
        (
            "data.questions_per_scene",
            lambda v, c: v == 1 or not c.model.drm.condition_on_question,
            "1, as a rationale module that is conditioned on the question needs",
        ),
        (
            "model.decoder.width",
            lambda v, c: v % (2 * c.model.decoder.heads) == 0,
            "a multiple of 2 * model.decoder.heads",
        ),
        (
            "model.decoder.kv_heads",
            lambda v, c: c.model.decoder.heads % v == 0,
            "a divisor of model.decoder.heads",
        ),
        (
            "model.vision.width",
            lambda v, c: v % c.model.vision.heads == 0,
            "a multiple of model.vision.heads",
        ),
        (
            "model.drm.width",
            lambda v, c: v % c.model.drm.heads == 0,
            "a multiple of model.drm.heads",
        ),
    )

    @property
    def dtype(self) -> Dtype:
        """The dtype of the decoder's activations."""
        return self.model.decoder.dtype


# --- Objectives -----------------------------------------------------------------------------------


def _make_objective(
    stage: Stage, settings: GeodeSettings, export: Nouns, tokenizer: Vocabulary, pipeline: Shaped
) -> GeodeStage:
    """Returns the objective of a stage, its sizes filled in from the data."""
    model, shapes = settings.model, pipeline.shapes
    side = _picture_side(model.vision, shapes, stage)
    decoder, vision = _fields(model.decoder), _fields(model.vision)
    vision["image_size"] = side
    rows = decoder.pop("vocab_size") or tokenizer.vocab_size
    width = model.decoder.width // model.decoder.heads
    vlm = InternVLConfig(
        vision=VitConfig(**vision),
        decoder=DecoderConfig(vocab_size=rows, head_width=width, **decoder),
    )
    if model.drm.on and model.drm.frames and not shapes.point_frames:
        raise UserError(
            "config: model.drm.frames: the export has points without sonata/frame, the view of each"
        )
    drm = _fields(model.drm)
    has_drm = drm.pop("on")
    drm_config = DrmConfig(
        visual_width=vlm.vision.width,
        point_width=shapes.point_width,
        llm_width=vlm.decoder.width,
        max_frames=shapes.views,
        **drm,
    )
    stand_ins = len(export.categories) if model.stand_ins else 0
    sizes = GeodeConfig(
        vlm=vlm,
        drm=drm_config if has_drm else None,
        drh_width=model.drh_width,
        patch_grid=shapes.grid,
        categories=stand_ins,
        views=shapes.views if stand_ins else 0,
    )
    controls = settings.controls(tokenizer)
    return GeodeStage(
        GeodeStageConfig(sizes, stage=stage, controls=controls, **_fields(settings.loss))
    )


def _fields(settings: object) -> dict[str, Any]:
    """Returns the fields of a section without nested sections."""
    return dict(vars(settings))


def _picture_side(vision: VisionSettings, shapes: SceneShapes, stage: Stage) -> int:
    """Returns the side in pixels of the square that the vision encoder sees."""
    patch, side = vision.patch_size, vision.image_size
    height, across = shapes.image
    if shapes.view_tokens:
        side = side or math.isqrt(shapes.view_tokens) * patch
        if ((side // patch) ** 2 + 1, vision.width) != (shapes.view_tokens, shapes.token_width):
            raise UserError(
                f"config: model.vision: width {vision.width}, {side} pixels and patches of {patch};"
                f" the export's internvit/tokens are {shapes.view_tokens} of width "
                f"{shapes.token_width} a view"
            )
    elif not side and height != across:
        raise UserError(
            f"config: model.vision.image_size: 0 takes the export's pictures as they are, and "
            f"{across} x {height} pixels are no square; name the side to which they are squeezed"
        )
    side = side or height
    if side % (2 * patch):
        raise UserError(
            f"config: model.vision.patch_size: {patch}: a picture of {side} x {side} pixels has "
            "no even number of such patches along a side"
        )
    if stage == "pretrain" and shapes.grid != (side // patch, side // patch):
        raise UserError(
            f"config: model.vision.patch_size: {side // patch} x {side // patch} patches, and the "
            f"export's categories are of {shapes.grid[0]} x {shapes.grid[1]}"
        )
    return side


def _check_last_start(settings: GeodeSettings, learned: frozenset[str]) -> None:
    """Refuses a start of the last stage, which freezes it, without a learned rationale module."""
    if settings.model.drm.on and settings.loss.vision and "drm" not in learned:
        raise UserError(
            f"config: init_from: the rationale module has not learned in {settings.init_from}; "
            "start from a geode_drm run, or with :drm=off"
        )


# --- Rationales -----------------------------------------------------------------------------------


def with_rationale_module(settings: Settings, option: str, workdir: Path) -> GeodeSettings:
    """Returns the settings of a run whose rationale module has learned.

    Args:
        settings: of the run.
        option: of the command line, that needs the module.
        workdir: of the run.

    Raises:
        UserError: the run has no such module.
    """
    if not isinstance(settings, GeodeSettings) or "drm" not in settings.system.learned:
        names = " or ".join(stage.name for stage in STAGES.values() if "drm" in stage.learned)
        raise UserError(f"{option}: needs a {names} run, not {settings.system.name}")
    if not settings.model.drm.on:
        raise UserError(f"{option}: the model of {workdir} has no rationale module (drm=off)")
    return settings


def as_stage_1(settings: Settings) -> Settings:
    """Returns the settings of a run as if its model were in stage 1, which writes rationales."""
    if settings.system.learns_rationales:
        return settings
    # Measured anew: rationales are longer than answers.
    data = dataclasses.replace(settings.data, answer_length=0)
    return dataclasses.replace(settings, system=STAGES["drm"], data=data)


# --- Systems --------------------------------------------------------------------------------------


def _stage_system(stage: Stage, *rules: Rule) -> System[GeodeSettings]:
    """Returns a stage as a system, with rules of its own."""
    last = stage == "joint"
    return System(
        name=f"geode_{stage}",
        settings=GeodeSettings,
        make_objective=functools.partial(_make_objective, stage),
        tokenizer=TokenizerRules(
            trained=(REG, BOX), given=(*INTERNVL_TOKENS, REG, BOX), reads_rationales=True
        ),
        rules=rules,
        learns_rationales=not last,
        learned=learned_parts(stage),
        check_start=_check_last_start if last else lambda *_: None,
        starts_fresh=stage == "pretrain",
        has_controls=lambda s: last and s.model.drh_width > 0,
        reads_true_boxes=stage == "pretrain",
    )


STAGES: Mapping[Stage, System[GeodeSettings]] = {
    "pretrain": _stage_system(
        "pretrain",
        (
            "data.vision",
            lambda v, _: v == "images",
            "what geode_pretrain learns from: the vision encoder learns there, from images",
        ),
    ),
    "align": _stage_system("align"),
    "drm": _stage_system("drm", ("model.drm.on", lambda v, _: v, "what geode_drm trains")),
    "joint": _stage_system("joint"),
}
"""The stages in their order."""
