"""Config and rules between the Hidden-CoT student and `remote.modeling_hidden_cot`."""

import dataclasses
import itertools
from collections.abc import Collection, Mapping
from typing import Any

from geode_jax.models.decoder import DecoderConfig
from geode_jax.models.student import StudentConfig
from geode_jax.models.task_heads import HeadsConfig
from geode_jax.weights import parts
from geode_jax.weights.fields import (
    MAX_LAYERS,
    MAX_VOCABULARY,
    MAX_WIDTH,
    check_fields,
    dtype_of,
    flag,
    number_pair,
    part,
    positive,
    size,
    sizes_of,
    whole_numbers,
)
from geode_jax.weights.rules import Rule, within

MODEL_TYPE = "hidden_cot"

_OWN = (
    *("vision_width", "camera_width", "max_views", "projector_width"),
    *("thinking_tokens", "vision_prefix"),
)
"""Fields with the same name on both sides."""
_SEES = "question_sees_thinking"

_DECODER = {
    "vocab_size": "vocab_size",
    "hidden_size": "width",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "head_dim": "head_width",
    "intermediate_size": "mlp_width",
    "layer_norm_eps": "norm_eps",
    "rope_theta": "rope_theta",
    "qkv_bias": "qkv_bias",
    "linear_bias": "linear_bias",
}
"""Entries of `config.json` -> fields of the decoder."""


def write_student(config: StudentConfig) -> dict:
    """Returns the `config.json` of a student.

    Raises:
        ValueError: the modelling file has no such decoder.
    """
    c, decoder = config, config.decoder
    form = (decoder.mlp, decoder.norm, decoder.tied_head)
    if form != ("gelu", "layer", False):
        raise ValueError(f"not a decoder of a student: (mlp, norm, tied_head) {form}")
    return {
        "model_type": MODEL_TYPE,
        "architectures": ["HiddenCotModel"],
        "auto_map": {
            "AutoConfig": "modeling_hidden_cot.HiddenCotConfig",
            "AutoModel": "modeling_hidden_cot.HiddenCotModel",
        },
        **{name: getattr(decoder, field) for name, field in _DECODER.items()},
        "cross_attention_layers": list(decoder.cross_layers),
        **{name: getattr(c, name) for name in _OWN},
        _SEES: c.question_sees_thinking,
        "patch_grid": list(c.patch_grid),
        "heads": dataclasses.asdict(c.heads),
        "category_ids": [list(ids) for ids in c.category_ids],
    }


_READ = frozenset(
    (*_DECODER, *_OWN, _SEES, "cross_attention_layers", "patch_grid", "heads", "category_ids")
    # read by the modelling file or by the encoder of frames
    + ("answer_length", "vision", "reg_token_id", "box_token_id")
)
_SWITCHES, _NUMBERS = ("qkv_bias", "linear_bias"), ("layer_norm_eps", "rope_theta")


def read_student(json: Mapping, tensors: Collection[str]) -> StudentConfig:
    """Returns the config of a student: the inverse of `write_student`.

    Raises:
        ValueError, KeyError: a field is not supported or missing.
    """
    del tensors
    check_fields(json, _READ, {"tie_word_embeddings": (False,)})
    sizes: dict[str, Any] = {}
    for name, field in _DECODER.items():
        if name in _SWITCHES:
            sizes[field] = flag(json, name, json[name])
        elif name in _NUMBERS:
            sizes[field] = positive(json, name)
        else:
            most = {"vocab_size": MAX_VOCABULARY, "num_hidden_layers": MAX_LAYERS}
            sizes[field] = size(json, name, most.get(name, MAX_WIDTH))
    heads = sizes_of(HeadsConfig, part(json, "heads"), "heads")
    categories = json["category_ids"]
    if not isinstance(categories, list) or len(categories) not in (0, heads.categories):
        raise ValueError(f"category_ids must be a list of heads.categories {heads.categories}")
    nouns = tuple(whole_numbers({"category_ids": ids}, "category_ids") for ids in categories)
    if any(not ids or max(ids) >= sizes["vocab_size"] for ids in nouns):
        raise ValueError("category_ids must be lists of ids of the vocabulary")
    return StudentConfig(
        decoder=DecoderConfig(
            **sizes,
            cross_layers=whole_numbers(json, "cross_attention_layers"),
            dtype=dtype_of(json),
        ),
        heads=heads,
        **{name: size(json, name, least=0) for name in _OWN},
        question_sees_thinking=flag(json, _SEES, False),  # older folders do not have it
        patch_grid=number_pair(json, "patch_grid"),
        category_ids=nouns,
    )


def student_rules(config: StudentConfig) -> tuple[Rule, ...]:
    """Returns the rules of a `Student`."""
    rules = [
        *parts.layer_norm("vision_norm", "vision_norm"),
        *parts.mlp("projector", "projector"),
        Rule("view_embedding", "view_embedding", "v d -> v d"),
        *parts.layer_norm("z_norm", "z_norm"),
        Rule("pool_query", "pool_query", "n d -> n d"),
        *parts.matrix("depth_encoder", "depth_encoder"),
        *within(_decoder_rules(config.decoder), "decoder.", "decoder."),
        *parts.mlp("depth_head.mlp", "depth_head.mlp"),
        *within(_detection_rules(config.heads), "detection_head.", "detection_head."),
        Rule("none_embedding", "none_embedding", "n d -> n d"),
        Rule("patch_scale", "patch_scale", "1 -> "),
        *parts.spatial_head("spatial_head", "spatial_head"),
    ]
    if config.camera_width:
        rules += parts.layer_norm("camera_norm", "camera_norm")
        rules += parts.matrix("camera", "camera")
    if config.thinking_tokens:
        rules.append(Rule("thinking", "thinking", "n k d -> n k d"))
    if config.heads.teacher_width:
        rules += parts.matrix("feature_head", "feature_head")
    return tuple(rules)


def _decoder_rules(config: DecoderConfig) -> tuple[Rule, ...]:
    c = config
    rules = [
        Rule("embed_tokens.weight", "embedding", "x d -> x d"),
        *parts.layer_norm("norm", "norm"),
        Rule("lm_head.weight", "head.kernel", "x d -> d x"),
    ]
    bounds = sorted({0, *c.cross_layers, c.layers})
    for i, (first, stop) in enumerate(itertools.pairwise(bounds)):
        if first in c.cross_layers:
            rules += parts.cross_attention(
                f"layers.{first}.cross_attn",
                f"stages.{i}.cross",
                bias=c.qkv_bias,
                out_bias=c.linear_bias,
            )
        # The layers of a stage are one stacked parameter in JAX.
        numbers = ",".join(map(str, range(first, stop)))
        rules += [
            Rule(
                f"layers.{{layer={numbers}}}.{rule.key}",
                f"stages.{i}.blocks.{rule.leaf}",
                rule.axes.replace(" -> ", " -> layer "),
            )
            for rule in _block_rules(c)
        ]
    return tuple(rules)


def _block_rules(c: DecoderConfig) -> tuple[Rule, ...]:
    leaves = tuple(f"attention.{name}" for name in ("q", "k", "v", "out"))
    bias = "o -> o" if c.linear_bias else ""
    return (
        *parts.layer_norm("input_layernorm", "attention_norm"),
        *parts.attention("self_attn", leaves, bias=c.qkv_bias, out_bias=c.linear_bias),
        *parts.layer_norm("post_attention_layernorm", "mlp_norm"),
        *parts.matrix("mlp.up", "mlp.up", bias=bias),
        *parts.matrix("mlp.down", "mlp.down", bias=bias),
    )


def _detection_rules(config: HeadsConfig) -> tuple[Rule, ...]:
    layers = tuple(
        rule
        for i in range(config.detection_layers)
        for rule in within(_query_layer_rules(), f"layers.{i}.", f"layers.{i}.")
    )
    return (
        *parts.matrix("reduce", "reduce"),
        Rule("places", "places", "n d -> n d"),
        *layers,
        *parts.layer_norm("norm", "norm"),
        *parts.matrix("classes", "classes"),
        *parts.mlp("boxes", "boxes"),
    )


def _query_layer_rules() -> tuple[Rule, ...]:
    attentions = tuple(
        rule
        for name in ("look", "talk")
        for rule in parts.attention(
            name, (name, f"{name}_keys", f"{name}_values", f"{name}_out"), bias=False
        )
    )
    norms = tuple(rule for i in range(3) for rule in parts.layer_norm(f"norms.{i}", f"norms.{i}"))
    return (*attentions, *parts.mlp("mlp", "mlp"), *norms)
