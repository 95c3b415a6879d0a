"""The configuration of a run: its rules, and its file beside the run."""

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ml_collections

from geode_jax.data.mixture import parse_mixture
from geode_jax.data.scene_arrays import GEODE_VISION
from geode_jax.errors import UserError
from geode_jax.exports.files import read_json_object
from geode_jax.models.decoder import REMAT
from geode_jax.objectives.losses import TERMS
from geode_jax.runs import config as runs_config
from geode_jax.runs import systems
from geode_jax.runs.summary import SUMMARY
from geode_jax.runs.systems import TEXT
from geode_jax.training.checkpoint_files import has_model
from geode_jax.training.metrics import write_json


def check_config(config: ml_collections.ConfigDict) -> None:
    """Refuse values that would fail later, in words that do not name the field.

    Raises:
        UserError: the first field that breaks its rule. The data pipeline checks its own fields.
    """
    if config.get("system") not in systems.SYSTEMS:
        known = ", ".join(systems.SYSTEMS)
        raise UserError(f"config: system: {config.get('system')!r} is not one of {known}")
    _check_fields(config, missing_ok=False)


def _check_fields(config: ml_collections.ConfigDict, *, missing_ok: bool) -> None:
    for names, holds, rule in runs_config.rules(config.system):
        for name in names.split():
            try:
                value = functools.reduce(lambda part, key: part[key], name.split("."), config)
            except (KeyError, TypeError):
                if missing_ok:  # a run of before the field existed
                    continue
                raise UserError(f"config: {name}: missing") from None
            try:
                good = holds(value, config)
            except UserError:
                raise
            except (TypeError, ValueError, AttributeError, ArithmeticError):  # of another type
                good = False
            if not good:
                raise UserError(
                    f"config: {name}: {value if value != '' else repr(value)} is not {rule}"
                )


def save_config(config: ml_collections.ConfigDict, workdir: Path) -> None:
    """Keep the configuration beside the run, for `ask` and for whoever reads the results."""
    workdir.mkdir(parents=True, exist_ok=True)
    write_json(workdir / "config.json", config.to_dict())


def is_begun(workdir: Path) -> bool:
    """Whether a folder holds a run, or what is left of one without its `config.json`."""
    return (workdir / "config.json").exists() or (workdir / SUMMARY).exists() or has_model(workdir)


_SECTIONS = ("data", "model", "loss", "optimizer", "train", "eval")


def load_config(workdir: Path) -> ml_collections.ConfigDict:
    """The configuration a run was started with.

    Raises:
        UserError: the folder is no run, or the file is damaged.
    """
    path = workdir / "config.json"
    if not path.exists():
        if is_begun(workdir):
            raise UserError(
                f"{path}: missing, though the folder has a run's checkpoints or summary: put the "
                "file back from a copy, or use another --workdir"
            )
        raise UserError(f"{path}: no run was started in this folder")
    values = read_json_object(path)
    if values.get("system") not in systems.SYSTEMS:
        raise UserError(f"{path}: system: must be one of {', '.join(systems.SYSTEMS)}")
    for name in _SECTIONS:
        if not isinstance(values.get(name), dict):
            raise UserError(f"{path}: {name}: must be an object")
    try:
        config = ml_collections.ConfigDict(values)
        _check_fields(config, missing_ok=True)
    except (UserError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: {error}") from None
    return config


def plain(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """A configuration as it is read back from a file: lists in place of tuples."""
    return json.loads(config.to_json())


def flat(tree: dict, prefix: str = "") -> dict[str, Any]:
    """A tree of dicts as one, with names such as `data/root`."""
    out = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            out |= flat(value, f"{prefix}{name}/")
        else:
            out[prefix + name] = value
    return out


Rule = tuple[str, Callable, str]
"""Fields, what must hold of a field's value in a configuration, the same in words."""


def _at_least(least: float) -> tuple[Callable, str]:
    return lambda value, _: value >= least, f"at least {least}"


def _one_of(choices: Sequence[str]) -> tuple[Callable, str]:
    return lambda value, _: value in choices, f"one of {', '.join(choices)}"


_POSITIVE = (lambda value, _: 0 < value < float("inf"), "positive")


_COMMON: tuple[Rule, ...] = (
    ("data.root data.export data.rgbd data.vision tokenizer", *TEXT),
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
