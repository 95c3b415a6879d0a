"""The systems a configuration can name: what its fields must be, and the objective they make."""

import math
from collections.abc import Callable, Sequence

import ml_collections

from geode_jax.data.control import BOX, REG
from geode_jax.data.mixture import parse_mixture
from geode_jax.data.pipeline import Pipeline
from geode_jax.data.scene_arrays import GEODE_VISION, SceneShapes
from geode_jax.data.tokens import Tokenizer
from geode_jax.errors import UserError
from geode_jax.exports import Export
from geode_jax.losses import TERMS
from geode_jax.models.decoder import REMAT, DecoderConfig
from geode_jax.models.drm import DrmConfig
from geode_jax.models.geode import GeodeConfig
from geode_jax.models.internvl import InternVLConfig
from geode_jax.models.student import StudentConfig
from geode_jax.models.task_heads import HeadsConfig
from geode_jax.models.vit import VitConfig
from geode_jax.objectives.geode import GeodeStage, GeodeStageConfig
from geode_jax.objectives.hidden_cot import HiddenCoT, HiddenCoTConfig
from geode_jax.train_step import Objective

GEODE_STAGES = {f"geode_{stage}": stage for stage in ("pretrain", "align", "drm", "joint")}
SYSTEMS = ("hidden_cot", *GEODE_STAGES)

Rule = tuple[str, Callable, str]
"""Fields, what must hold of a field's value in a configuration, the same in words."""


def _at_least(least: float) -> tuple[Callable, str]:
    return lambda value, _: value >= least, f"at least {least}"


def _one_of(choices: Sequence[str]) -> tuple[Callable, str]:
    return lambda value, _: value in choices, f"one of {', '.join(choices)}"


_POSITIVE = (lambda value, _: 0 < value < float("inf"), "positive")

_TEXT = (lambda value, _: isinstance(value, str), "text")

_COMMON: tuple[Rule, ...] = (
    ("data.root data.export data.rgbd data.vision tokenizer", *_TEXT),
    (
        "seed data.rooms_images data.question_length data.answer_length optimizer.warmup_steps "
        "optimizer.weight_decay optimizer.final_fraction train.steps train.patience "
        "train.max_skipped train.checkpoint_minutes eval.examples",
        *_at_least(0),
    ),
    (
        "train.epochs train.microbatches train.eval_every train.checkpoint_every eval.val_scenes "
        "eval.test_scenes",
        *_at_least(1),
    ),
    ("data.rooms_scenes", *_at_least(4)),  # fewer have no val or no test split
    ("optimizer.learning_rate optimizer.clip_norm", *_POSITIVE),
    (
        "data.mixture",
        lambda v, _: parse_mixture(v) is not None,
        "weights",
    ),  # says itself what is bad
    ("data.fraction", lambda v, _: 0 < v <= 1, "in (0, 1]"),
    ("mesh", lambda v, _: len(v) == 3 and all(x >= -1 for x in v), "sizes of data, fsdp, model"),
    ("optimizer.name", *_one_of(("adamw", "muon"))),
    ("eval.reference", *_one_of(("truth", "teacher"))),
    (
        "train.microbatches",
        lambda v, c: c.data.scenes_per_batch % v == 0,
        "a divisor of data.scenes_per_batch",
    ),
)

_HIDDEN_COT: tuple[Rule, ...] = (
    ("model.thinking_tokens model.detection_layers", *_at_least(0)),
    (
        "model.layers model.heads model.width model.mlp_width model.heads_width "
        "model.vision_prefix model.depth_cells model.queries",
        *_at_least(1),
    ),
    ("model.depth_bins", *_at_least(2)),
    ("loss.temperature", *_POSITIVE),
    ("model.remat", *_one_of(tuple(REMAT))),
    ("model.dtype", *_one_of(("float32", "bfloat16", "float16"))),
    ("loss.weights", *_one_of(("uncertainty", "static"))),
    (
        "data.vision",
        lambda v, _: v not in GEODE_VISION,
        "what the student sees, vggt/tokens or teacher/features",
    ),
    ("loss.terms", lambda v, _: v and set(v) <= set(TERMS), f"some of {', '.join(TERMS)}"),
    ("loss.log_variance_bounds", lambda v, _: len(v) == 2 and v[0] < v[1], "two, the lower first"),
    # Rotary positions turn pairs of a head's channels.
    ("model.width", lambda v, c: v % (2 * c.model.heads) == 0, "a multiple of 2 * model.heads"),
    (
        "model.cross_layers",
        lambda v, c: all(0 <= layer < c.model.layers for layer in v),
        "of layers below model.layers",
    ),
)

_GEODE: tuple[Rule, ...] = (
    (
        "model.drh_width loss.regression_weight loss.patch_weight loss.spatial_weight "
        "loss.layout_weight loss.rationale_weight model.drm.frames model.vision.image_size",
        *_at_least(0),
    ),
    (
        "model.decoder.width model.decoder.layers model.decoder.heads model.decoder.kv_heads "
        "model.decoder.mlp_width model.vision.patch_size model.vision.width model.vision.layers "
        "model.vision.heads model.vision.mlp_width model.drm.width model.drm.heads "
        "model.drm.layers model.drm.slots model.drm.bands",
        *_at_least(1),
    ),
    ("model.decoder.remat", *_one_of(tuple(REMAT))),
    ("model.decoder.dtype model.vision.dtype", *_one_of(("float32", "bfloat16", "float16"))),
    ("data.vision", *_one_of(GEODE_VISION)),
    (
        "data.vision",
        lambda v, c: v == "images" or c.system != "geode_pretrain",
        "what geode_pretrain learns from: the vision encoder learns there, from images",
    ),
    (
        "init_from",
        lambda v, c: v or c.system == "geode_pretrain",
        "a run or folders of pretrained models, from which this stage starts",
    ),
    ("model.drm.on", lambda v, c: v or c.system != "geode_drm", "what geode_drm trains"),
    ("loss.layout_weight", lambda v, c: not v or c.model.stand_ins, "0 without model.stand_ins"),
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
    ("model.drm.width", lambda v, c: v % c.model.drm.heads == 0, "a multiple of model.drm.heads"),
)


def rules(system: str) -> tuple[Rule, ...]:
    """What must hold of a configuration of a system."""
    return _COMMON + (_HIDDEN_COT if system == "hidden_cot" else _GEODE)


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


def longest_row(sizes: GeodeConfig, pipeline: Pipeline) -> int:
    """Most positions that a row of a GEODE stage has: prefix, question, answer."""
    slots = sizes.drm.slots if sizes.drm else 0
    visual = pipeline.shapes.views * (sizes.vlm.vision.grid // 2) ** 2
    text = pipeline.config.question_length + pipeline.config.answer_length
    return sizes.categories + slots + visual + text


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
