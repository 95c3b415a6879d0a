"""The systems a configuration can name: what its fields must be, and the objective they make."""

import math

import ml_collections

from geode_jax.data.control import BOX, REG
from geode_jax.data.pipeline import Pipeline
from geode_jax.data.scene_arrays import SceneShapes
from geode_jax.data.tokens import Tokenizer
from geode_jax.errors import UserError
from geode_jax.exports import Export
from geode_jax.models.decoder import DecoderConfig
from geode_jax.models.drm import DrmConfig
from geode_jax.models.geode import GeodeConfig
from geode_jax.models.internvl import InternVLConfig
from geode_jax.models.student import StudentConfig
from geode_jax.models.task_heads import HeadsConfig
from geode_jax.models.vit import VitConfig
from geode_jax.objectives.base import Objective
from geode_jax.objectives.geode import GeodeStage, GeodeStageConfig
from geode_jax.objectives.hidden_cot import HiddenCoT, HiddenCoTConfig

GEODE_STAGES = {f"geode_{stage}": stage for stage in ("pretrain", "align", "drm", "joint")}
SYSTEMS = ("hidden_cot", *GEODE_STAGES)


TEXT = (lambda value, _: isinstance(value, str), "text")


def answer_field(config: ml_collections.ConfigDict) -> str:
    """What of a question's record is learned: stages before the last learn rationales."""
    if GEODE_STAGES.get(config.system, "joint") != "joint":
        return "rationale"
    return {"truth": "answer", "teacher": "teacher_answer"}[config.eval.reference]


def controls(config: ml_collections.ConfigDict, tokenizer: Tokenizer) -> tuple[int, int] | None:
    """Ids of the control tokens, where numbers are regressed and not written as text."""
    regresses = config.system == "geode_joint" and config.model.drh_width > 0
    return (tokenizer.id_of(REG), tokenizer.id_of(BOX)) if regresses else None


def make_objective(
    config: ml_collections.ConfigDict, export: Export, tokenizer: Tokenizer, pipeline: Pipeline
) -> Objective:
    """The model's and the objective's dataclasses, sizes filled in from the data."""
    make = _hidden_cot if config.system == "hidden_cot" else _geode_stage
    return make(config, export, tokenizer, pipeline)


def _hidden_cot(config, export: Export, tokenizer: Tokenizer, pipeline: Pipeline) -> HiddenCoT:
    model, shapes = config.model, pipeline.shapes
    decoder = DecoderConfig(
        vocab_size=tokenizer.vocab_size,
        width=model.width,
        layers=model.layers,
        heads=model.heads,
        kv_heads=model.heads,
        head_width=model.width // model.heads,
        mlp_width=model.mlp_width,
        cross_layers=tuple(model.cross_layers),
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
        category_ids=tuple(tuple(tokenizer.encode(" " + noun)) for noun in nouns),
    )
    loss = config.loss
    return HiddenCoT(
        HiddenCoTConfig(
            student=student,
            terms=tuple(loss.terms),
            weights=loss.weights,
            temperature=loss.temperature,
            literal_cross_view=loss.literal_cross_view,
            vision=loss.vision,
            log_variance_bounds=tuple(loss.log_variance_bounds),
        )
    )


def _picture_side(vision: ml_collections.ConfigDict, shapes: SceneShapes, stage: str) -> int:
    """The side in pixels of the square that the vision encoder sees."""
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


def longest_row(objective: Objective, pipeline: Pipeline) -> int:
    """Most positions that a row of a run has: prefix, question, answer."""
    text = pipeline.config.question_length + pipeline.config.answer_length
    return objective.prefix_length(pipeline.shapes.views) + text


def _geode_stage(config, export: Export, tokenizer: Tokenizer, pipeline: Pipeline) -> GeodeStage:
    model, shapes, loss = config.model, pipeline.shapes, config.loss
    side = _picture_side(model.vision, shapes, GEODE_STAGES[config.system])
    decoder = model.decoder.to_dict()
    width = decoder["width"] // decoder["heads"]
    rows = decoder.pop("vocab_size") or tokenizer.vocab_size
    vlm = InternVLConfig(
        vision=VitConfig(**model.vision.to_dict() | {"image_size": side}),
        decoder=DecoderConfig(vocab_size=rows, head_width=width, **decoder),
    )
    if model.drm.on and model.drm.frames and not shapes.point_frames:
        raise UserError(
            "config: model.drm.frames: the export has points without sonata/frame, the view of each"
        )
    drm = DrmConfig(
        visual_width=vlm.vision.width,
        point_width=shapes.point_width,
        llm_width=vlm.decoder.width,
        max_frames=shapes.views,
        **{key: value for key, value in model.drm.items() if key != "on"},
    )
    stand_ins = len(export.categories) if model.stand_ins else 0
    sizes = GeodeConfig(
        vlm=vlm,
        drm=drm if model.drm.on else None,
        drh_width=model.drh_width,
        patch_grid=shapes.grid,
        categories=stand_ins,
        views=shapes.views if stand_ins else 0,
    )
    return GeodeStage(
        GeodeStageConfig(
            sizes,
            stage=GEODE_STAGES[config.system],
            controls=controls(config, tokenizer),
            **loss.to_dict(),
        )
    )
