"""The Hidden-CoT student as a system: its settings, their rules, and its objective."""

import dataclasses
from typing import Annotated, Literal

from geode_jax.data.scene_arrays import GEODE_VISION
from geode_jax.models.decoder import REMAT, DecoderConfig
from geode_jax.models.student import StudentConfig
from geode_jax.models.task_heads import HeadsConfig
from geode_jax.objectives.hidden_cot import HiddenCoT, HiddenCoTConfig
from geode_jax.objectives.losses import TERMS
from geode_jax.runs.settings import (
    MOST_SIZE,
    POSITIVE,
    Dtype,
    LossSettings,
    Nouns,
    Settings,
    Shaped,
    System,
    TokenizerRules,
    Vocabulary,
    at_least,
    at_most,
    one_of,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudentModelSettings:
    """Sizes of the student (Sec. III-C).

    Attributes:
        width: of the trunk.
        layers: self-attention blocks.
        heads: attention heads.
        mlp_width: inner width of a block's feed-forward part.
        projector_width: inner width of the projector of the vision tokens.
        cross_layers: blocks that are preceded by cross-attention to the vision tokens.
        thinking_tokens: K; 0: the student without Hidden CoT.
        vision_prefix: number of V tokens.
        question_sees_thinking: the question attends to the thinking tokens.
        heads_width: width of the task heads.
        depth_bins: bins of the depth head, where the export brings none.
        depth_cells: cells of predicted depth along a side of a patch.
        queries: queries of the detection head.
        detection_layers: its layers.
        remat: what the backward pass keeps of a block, a key of `models.decoder.REMAT`.
        dtype: of the activations.
    """

    width: int
    layers: int
    heads: int
    mlp_width: int
    projector_width: int
    cross_layers: tuple[int, ...]
    thinking_tokens: int
    vision_prefix: int
    question_sees_thinking: bool = False
    heads_width: int
    depth_bins: int
    depth_cells: int
    queries: int
    detection_layers: int
    remat: str
    dtype: Dtype


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudentLossSettings(LossSettings):
    """The losses of eq. 2, see `objectives.hidden_cot.HiddenCoTConfig`.

    Attributes:
        terms: the terms of eq. 2 that count.
        weights: "uncertainty" (eq. 2) or "static" (all 1).
        logits: the teacher's logits are learned, where the export has them.
        temperature: of the teacher's logits.
        eq_1: eq. 1 counts in the term `spatial`.
        cross_view_weight: lambda_cross of eq. 1.
        literal_cross_view: the sign of eq. 1 as printed.
        log_variance_bounds: least and greatest log-variance.
    """

    terms: tuple[str, ...]
    weights: Literal["uncertainty", "static"]
    logits: bool = False
    temperature: float
    eq_1: bool = True
    cross_view_weight: float = 0.1
    literal_cross_view: bool
    log_variance_bounds: Annotated[tuple[float, float], "two, the lower first"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudentSettings(Settings):
    """Settings of a student's run.

    Attributes:
        model, loss: see their classes.
    """

    model: StudentModelSettings
    loss: StudentLossSettings

    RULES = (
        *Settings.RULES,
        ("init_from", lambda v, _: not v, "empty, as the student learns from scratch"),
        ("model.thinking_tokens model.detection_layers", *at_least(0)),
        (
            "model.layers model.heads model.width model.mlp_width model.heads_width "
            "model.vision_prefix model.depth_cells model.queries",
            *at_least(1),
        ),
        ("model.depth_bins", *at_least(2)),
        (
            "model.thinking_tokens model.vision_prefix model.depth_bins model.depth_cells "
            "model.queries",
            *at_most(MOST_SIZE),
        ),
        ("loss.temperature", *POSITIVE),
        ("model.remat", *one_of(tuple(REMAT))),
        (
            "data.vision",
            lambda v, _: v not in GEODE_VISION,
            "what the student sees, vggt/tokens or teacher/features",
        ),
        ("loss.terms", lambda v, _: v and set(v) <= set(TERMS), f"some of {', '.join(TERMS)}"),
        ("loss.log_variance_bounds", lambda v, _: v[0] < v[1], "two, the lower first"),
        # Rotary positions turn pairs of a head's channels.
        ("model.width", lambda v, c: v % (2 * c.model.heads) == 0, "a multiple of 2 * model.heads"),
        (
            "model.cross_layers",
            lambda v, c: all(0 <= layer < c.model.layers for layer in v),
            "of layers below model.layers",
        ),
    )

    @property
    def dtype(self) -> Dtype:
        """The dtype of the decoder's activations."""
        return self.model.dtype

    @property
    def depth_ratio(self) -> int:
        """Cells of the target depth along a side of a patch."""
        return self.model.depth_cells

    @property
    def teacher_logits(self) -> bool:
        """True if the teacher's logits are read with its answers."""
        return self.loss.logits


def make_objective(
    settings: StudentSettings, export: Nouns, tokenizer: Vocabulary, pipeline: Shaped
) -> HiddenCoT:
    """Returns the student's objective, its sizes filled in from the data."""
    model, loss, shapes = settings.model, settings.loss, pipeline.shapes
    decoder = DecoderConfig(
        vocab_size=tokenizer.vocab_size,
        width=model.width,
        layers=model.layers,
        heads=model.heads,
        kv_heads=model.heads,
        head_width=model.width // model.heads,
        mlp_width=model.mlp_width,
        cross_layers=model.cross_layers,
        remat=model.remat,
        dtype=model.dtype,
    )
    heads = HeadsConfig(
        width=model.heads_width,
        depth_bins=shapes.depth_bins or model.depth_bins,
        depth_cells=model.depth_cells,
        queries=model.queries,
        detection_layers=model.detection_layers,
        categories=max(1, len(export.categories)),
        teacher_width=shapes.features,
    )
    nouns = export.categories or ["object"]
    student = StudentConfig(
        decoder=decoder,
        heads=heads,
        vision_width=shapes.token_width,
        camera_width=shapes.camera_width,
        patch_grid=shapes.grid,
        max_views=shapes.views,
        projector_width=model.projector_width,
        thinking_tokens=model.thinking_tokens,
        vision_prefix=model.vision_prefix,
        question_sees_thinking=model.question_sees_thinking,
        category_ids=tuple(tuple(tokenizer.encode(" " + noun)) for noun in nouns),
    )
    return HiddenCoT(
        HiddenCoTConfig(
            student=student,
            terms=loss.terms,
            weights=loss.weights,
            temperature=loss.temperature,
            eq_1=loss.eq_1,
            cross_view_weight=loss.cross_view_weight,
            literal_cross_view=loss.literal_cross_view,
            vision=loss.vision,
            log_variance_bounds=loss.log_variance_bounds,
        )
    )


HIDDEN_COT = System(
    name="hidden_cot",
    settings=StudentSettings,
    make_objective=make_objective,
    tokenizer=TokenizerRules(),
    has_thinking_tokens=True,
)
