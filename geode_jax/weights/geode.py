"""Config and rules between GEODE and `remote.modeling_geode`."""

import dataclasses
from collections.abc import Collection, Mapping

from geode_jax.models.drm import DrmConfig
from geode_jax.models.geode import GeodeConfig
from geode_jax.weights import parts
from geode_jax.weights.fields import number_pair, part, size, sizes_of
from geode_jax.weights.internvit import internvl_rules, read_internvl, write_internvl
from geode_jax.weights.rules import Rule, within

MODEL_TYPE = "geode"

_LAYOUT = "internvl"
"""Layout of InternViT and Qwen2, which are those of transformers."""

_OWN = ("drh_width", "categories", "views")
"""Fields with the same name on both sides."""


def write_geode(config: GeodeConfig) -> dict:
    """Returns the `config.json` of a GEODE.

    Raises:
        ValueError: the decoder is not a Qwen2.
    """
    vlm = write_internvl(config.vlm, _LAYOUT)
    if vlm["text_config"]["model_type"] != "qwen2":
        raise ValueError("the decoder is not a Qwen2")
    return vlm | {
        "model_type": MODEL_TYPE,
        "architectures": ["GeodeModel"],
        "auto_map": {
            "AutoConfig": "modeling_geode.GeodeConfig",
            "AutoModel": "modeling_geode.GeodeModel",
        },
        "drm": None if config.drm is None else dataclasses.asdict(config.drm),
        "patch_grid": list(config.patch_grid),
        **{name: getattr(config, name) for name in _OWN},
    }


_READ = frozenset(
    # sizes of the model, and fields that the modelling file reads
    (*_OWN, "drm", "patch_grid", "answer_length", "prefix", "reg_token_id", "box_token_id")
)


def read_geode(json: Mapping, tensors: Collection[str]) -> GeodeConfig:
    """Returns the config of a GEODE: the inverse of `write_geode`.

    Arguments and errors are those of `qwen2.read_decoder`.
    """
    return GeodeConfig(
        vlm=read_internvl(json, tensors, _LAYOUT, _READ),
        drm=None if json["drm"] is None else sizes_of(DrmConfig, part(json, "drm"), "drm"),
        patch_grid=number_pair(json, "patch_grid"),
        **{name: size(json, name, least=0) for name in _OWN},
    )


def geode_rules(config: GeodeConfig) -> tuple[Rule, ...]:
    """Returns the rules of a `Geode`."""
    rules = [*within(internvl_rules(config.vlm, _LAYOUT), "", "vlm.")]
    if config.drm is not None:
        rules += within(_drm_rules(config.drm), "drm.", "drm.")
    if config.drh_width:
        rules += parts.layer_norm("drh.norm", "drh.norm")
        rules += parts.mlp("drh.scalar", "drh.scalar")
        rules += parts.mlp("drh.box", "drh.box")
    if config.categories:
        rules.append(Rule("layout.slots", "layout.slots", "m d -> m d"))
        rules += parts.matrix("layout.facts", "layout.facts")
        rules += parts.spatial_head("spatial_head", "spatial_head")
        rules += parts.matrix("patch_classifier", "patch_classifier")
    return tuple(rules)


_MAMBA = (
    # key, leaf, axes
    ("norm.weight", "norm.scale", "d -> d"),
    ("mixer.in_proj.weight", "mixer.in_proj.kernel", "(two e) d -> d two e"),
    ("mixer.conv1d.weight", "mixer.conv.kernel", "e 1 w -> w e"),
    ("mixer.conv1d.bias", "mixer.conv.bias", "e -> e"),
    ("mixer.x_proj.weight", "mixer.x_proj.kernel", "o e -> e o"),
    ("mixer.dt_proj.weight", "mixer.dt_proj.kernel", "e r -> r e"),
    ("mixer.dt_proj.bias", "mixer.dt_proj.bias", "e -> e"),
    ("mixer.A_log", "mixer.A_log", "e u -> e u"),
    ("mixer.D", "mixer.D", "e -> e"),
    ("mixer.out_proj.weight", "mixer.out_proj.kernel", "d e -> e d"),
)
"""Names and shapes of `mamba_ssm`."""


def _drm_rules(config: DrmConfig) -> tuple[Rule, ...]:
    rules = [
        *parts.layer_norm("visual_norm", "visual_norm"),
        *parts.mlp("visual", "visual"),
        Rule("frame_embedding", "frame_embedding", "f d -> f d"),
        *parts.mlp("point", "point"),
        *parts.mlp("camera", "camera"),
        *parts.layer_norm("context_norm", "context_norm"),
        *parts.cross_attention("fuse", "fuse"),
        Rule("slots", "slots", "m d -> m d"),
        Rule("state_norm.weight", "state_norm.scale", "d -> d"),
        *parts.cross_attention("readout", "readout"),
        *parts.layer_norm("mlp_norm", "mlp_norm"),
        *parts.mlp("mlp", "mlp"),
        *parts.layer_norm("norm", "norm"),
        *parts.matrix("project", "project"),
    ]
    for i in range(config.layers):
        rules += [Rule(f"mamba.{i}.{k}", f"mamba.{i}.{leaf}", axes) for k, leaf, axes in _MAMBA]
    if config.condition_on_question:
        rules += parts.matrix("question", "question")
    return tuple(rules)
