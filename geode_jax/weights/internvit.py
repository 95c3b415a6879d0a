"""Config and rules of InternViT and InternVL in two layouts: InternVL's own and transformers'.

The model types of InternVL's own layout are `intern_vit_6b` (also of the 300M model) and
`internvl_chat`; those of transformers are `internvl_vision` and `internvl`. Names differ, and
query, key and value are one tensor or three. Each row below is a parameter with its two names.
"""

from collections.abc import Collection, Mapping

from geode_jax.models.internvl import IMAGE_ID, InternVLConfig
from geode_jax.models.vit import VitConfig
from geode_jax.weights.fields import (
    MAX_EPSILON,
    MAX_LAYERS,
    MAX_VOCABULARY,
    check_fields,
    dtype_of,
    flag,
    names,
    nested,
    part,
    positive,
    size,
)
from geode_jax.weights.qwen2 import HEAD, decoder_rules, read_decoder, write_decoder
from geode_jax.weights.rules import Rule, within

OWN = ("intern_vit_6b", "internvl_chat")
"""Model types of InternVL's own layout."""

_VISION = (
    # leaf, axes, InternVL's own name, transformers' name
    ("class_token", "1 1 d -> d", "embeddings.class_embedding", "embeddings.cls_token"),
    (
        "positions",
        "1 p d -> p d",
        "embeddings.position_embedding",
        "embeddings.position_embeddings",
    ),
    (
        "patches.kernel",
        "d c i j -> i j c d",
        "embeddings.patch_embedding.weight",
        "embeddings.patch_embeddings.projection.weight",
    ),
    (
        "patches.bias",
        "d -> d",
        "embeddings.patch_embedding.bias",
        "embeddings.patch_embeddings.projection.bias",
    ),
)
_BLOCK = (
    ("attention_norm.scale", "d -> layer d", "norm1.weight", "layernorm_before.weight"),
    ("attention_norm.bias", "d -> layer d", "norm1.bias", "layernorm_before.bias"),
    (
        "attention.qkv.kernel",
        "(qkv h e) d -> layer d qkv h e",
        "attn.qkv.weight",
        "attention.{qkv=q,k,v}_proj.weight",
    ),
    (
        "attention.qkv.bias",
        "(qkv h e) -> layer qkv h e",
        "attn.qkv.bias",
        "attention.{qkv=q,k,v}_proj.bias",
    ),
    (
        "attention.out.kernel",
        "d (h e) -> layer h e d",
        "attn.proj.weight",
        "attention.projection_layer.weight",
    ),
    ("attention.out.bias", "d -> layer d", "attn.proj.bias", "attention.projection_layer.bias"),
    ("attention_scale", "d -> layer d", "ls1", "lambda_1"),
    ("mlp_norm.scale", "d -> layer d", "norm2.weight", "layernorm_after.weight"),
    ("mlp_norm.bias", "d -> layer d", "norm2.bias", "layernorm_after.bias"),
    ("mlp.up.kernel", "w d -> layer d w", "mlp.fc1.weight", "mlp.fc1.weight"),
    ("mlp.up.bias", "w -> layer w", "mlp.fc1.bias", "mlp.fc1.bias"),
    ("mlp.down.kernel", "d w -> layer w d", "mlp.fc2.weight", "mlp.fc2.weight"),
    ("mlp.down.bias", "d -> layer d", "mlp.fc2.bias", "mlp.fc2.bias"),
    ("mlp_scale", "d -> layer d", "ls2", "lambda_2"),
)
_PROJECTOR = (
    ("norm.scale", "c -> c", "mlp1.0.weight", "multi_modal_projector.layer_norm.weight"),
    ("norm.bias", "c -> c", "mlp1.0.bias", "multi_modal_projector.layer_norm.bias"),
    ("mlp.up.kernel", "d c -> c d", "mlp1.1.weight", "multi_modal_projector.linear_1.weight"),
    ("mlp.up.bias", "d -> d", "mlp1.1.bias", "multi_modal_projector.linear_1.bias"),
    ("mlp.down.kernel", "o d -> d o", "mlp1.3.weight", "multi_modal_projector.linear_2.weight"),
    ("mlp.down.bias", "o -> o", "mlp1.3.bias", "multi_modal_projector.linear_2.bias"),
)


def _rules(rows, own: bool) -> tuple[Rule, ...]:
    return tuple(Rule(row[2] if own else row[3], row[0], row[1]) for row in rows)


def vision_rules(config: VitConfig, model_type: str) -> tuple[Rule, ...]:
    """Returns the rules of an `InternViT`."""
    own = model_type in OWN
    blocks = within(
        _rules(_BLOCK, own), f"encoder.{'layers' if own else 'layer'}.{{layer}}.", "blocks."
    )
    if not config.qkv_bias:
        blocks = tuple(rule for rule in blocks if rule.leaf != "blocks.attention.qkv.bias")
    return _rules(_VISION, own) + blocks


def internvl_rules(config: InternVLConfig, model_type: str) -> tuple[Rule, ...]:
    """Returns the rules of an `InternVL`."""
    own = model_type in OWN
    tower = "vision_model." if own else "vision_tower."
    return (
        *within(vision_rules(config.vision, model_type), tower, "vision."),
        *within(_rules(_PROJECTOR, own), "", "projector."),
        *within(decoder_rules(config.decoder), "language_model.", "decoder."),
    )


# --- config.json ----------------------------------------------------------------------------------

_VISION_SIZES = (
    "hidden_size num_hidden_layers num_attention_heads intermediate_size image_size patch_size "
    "layer_norm_eps"
)
_VISION_HONOURED = names(f"{_VISION_SIZES} qkv_bias attention_bias")
_VISION_ALLOWED = {
    "norm_type": ("layer_norm",),
    "hidden_act": ("gelu",),
    "num_channels": (3,),
    "qk_normalization": (False,),
    "use_qk_norm": (False,),
    "use_mean_pooling": (True,),  # which means no norm at the end
    "use_absolute_position_embeddings": (True,),
    "use_mask_token": (False,),
    "use_moe": (False, None),
}
_VISION_IRRELEVANT = names(
    # settings of the mixture of experts that `use_moe` turns on
    "capacity_factor eval_capacity_factor laux_allreduce moe_coeff_ratio moe_intermediate_size "
    "moe_output_scale noisy_gate_policy num_experts num_routed_experts num_shared_experts "
    "shared_expert_intermediate_size use_residual use_rts use_weighted_residual"
)

_TRANSFORMERS_DEFAULTS = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "image_size": 448,
    "patch_size": 14,
    "layer_norm_eps": 1e-6,
    "attention_bias": False,
}
"""Defaults of transformers' `InternVLVisionConfig`, which `vision_config` may leave out."""
_OWN_DEFAULTS = {
    "hidden_size": 3200,
    "num_hidden_layers": 48,
    "num_attention_heads": 25,
    "intermediate_size": 12800,
    "image_size": 224,
    "patch_size": 14,
    "layer_norm_eps": 1e-6,
    "qkv_bias": False,
    "qk_normalization": True,
    "norm_type": "rms_norm",
}
"""Defaults of InternVL's `InternVisionConfig`, the sizes of the 6B model."""


def read_vision(json: Mapping, model_type: str) -> VitConfig:
    """Returns the config of a vision encoder from `config.json`, or from its `vision_config`.

    Raises:
        ValueError, KeyError: a field is not supported or missing.
    """
    own = model_type in OWN
    json = (_OWN_DEFAULTS if own else _TRANSFORMERS_DEFAULTS) | {**json}
    kind = "intern_vit_6b" if own else "internvl_vision"
    allowed = {**_VISION_ALLOWED, "model_type": (kind,)}
    check_fields(json, _VISION_HONOURED, allowed, _VISION_IRRELEVANT)
    bias, other = ("qkv_bias", "attention_bias") if own else ("attention_bias", "qkv_bias")
    if other in json:
        raise ValueError(f"not supported: {other}, which is called {bias} in a {kind}")
    return VitConfig(
        image_size=_side(json, "image_size"),
        patch_size=_side(json, "patch_size"),
        width=size(json, "hidden_size"),
        layers=size(json, "num_hidden_layers", MAX_LAYERS),
        heads=size(json, "num_attention_heads"),
        mlp_width=size(json, "intermediate_size"),
        qkv_bias=flag(json, bias, False),
        norm_eps=positive(json, "layer_norm_eps", MAX_EPSILON),
        dtype=dtype_of(json),
    )


_MAX_SIDE = 1 << 13
"""Maximum side of a picture, in pixels."""


def _side(json: Mapping, name: str) -> int:
    """Returns the side of a square, which the field has as a number or as a list of two."""
    value = json[name]
    if isinstance(value, list):
        if len(value) != 2 or value[0] != value[1]:
            raise ValueError(f"not supported: {name} {value[:4]}, which is not square")
        json = {name: value[0]}
    return size(json, name, _MAX_SIDE)


def write_vision(config: VitConfig, model_type: str) -> dict:
    """Returns the `config.json` of a vision encoder: the inverse of `read_vision`."""
    c = config
    sizes = {
        "model_type": model_type,
        "hidden_size": c.width,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "intermediate_size": c.mlp_width,
        "layer_norm_eps": c.norm_eps,
        "norm_type": "layer_norm",
        "hidden_act": "gelu",
        "image_size": c.image_size,
        "patch_size": c.patch_size,
    }
    if model_type in OWN:
        names = {"architectures": ["InternVisionModel"], "qk_normalization": False}
        return sizes | names | {"qkv_bias": c.qkv_bias}
    return sizes | {"architectures": ["InternVLVisionModel"], "attention_bias": c.qkv_bias}


_HONOURED = names("image_token_id tie_word_embeddings vision_config")
_ALLOWED = {
    "downsample_ratio": (0.5,),
    "ps_version": ("v2",),
    "select_layer": (-1,),
    "vision_feature_layer": (-1,),
    "vision_feature_select_strategy": ("default",),
    "projector_hidden_act": ("gelu",),
    "use_backbone_lora": (0, None),
    "use_llm_lora": (0, None),
    "image_fold": (None,),
}
_OWN_DEFAULT_VERSION = {"ps_version": "v1"}
"""Default of `InternVLChatConfig`, which transposes the order of an image's tokens."""
_IRRELEVANT = names(
    # Settings of the preparation of pictures and of the prompt, and copies of other fields.
    "dynamic_image_size max_dynamic_patch min_dynamic_patch pad2square use_thumbnail template "
    "system_message hidden_size image_seq_length mlp_checkpoint"
)


def read_internvl(
    json: Mapping,
    tensors: Collection[str],
    model_type: str,
    further: frozenset[str] = frozenset(),
) -> InternVLConfig:
    """Returns the config of an InternVL; errors are those of `qwen2.read_decoder`.

    Args:
        json, tensors: as in `qwen2.read_decoder`.
        model_type: the layout, `internvl` or `internvl_chat`.
        further: further fields, which the caller reads.
    """
    own = model_type in OWN
    name, honoured = "llm_config" if own else "text_config", set(_HONOURED | further)
    if own:
        json, honoured = _OWN_DEFAULT_VERSION | {**json}, honoured | {"force_image_size"}
    check_fields(json, frozenset(honoured | {name}), _ALLOWED, _IRRELEVANT)
    with nested(name):
        text, dtype = {"model_type": "qwen2", **part(json, name)}, dtype_of(json)
        # transformers reads the outer `tie_word_embeddings`, InternVL's own code the inner one.
        tie = "tie_word_embeddings"
        ties = [flag(j, tie, False) for j in (json, text) if j.get(tie) is not None]
        if not ties and not own:
            ties = [True]  # the default of transformers' InternVLConfig
        text |= {"dtype": dtype, "tie_word_embeddings": any(ties)}
        decoder = read_decoder(text, tensors, f"language_model.{HEAD}")
    with nested("vision_config"):
        vision = read_vision({**part(json, "vision_config"), "dtype": dtype}, model_type)
    if (forced := json.get("force_image_size")) not in (None, 0, vision.image_size):
        raise ValueError(
            f"not supported: force_image_size {forced!r} beside image_size {vision.image_size}"
        )
    image_id = IMAGE_ID
    if json.get("image_token_id") is not None:
        image_id = size(json, "image_token_id", MAX_VOCABULARY, least=0)
    return InternVLConfig(vision=vision, decoder=decoder, image_id=image_id)


def write_internvl(config: InternVLConfig, model_type: str) -> dict:
    """Returns the `config.json` of an InternVL: the inverse of `read_internvl`."""
    c, own = config, model_type in OWN
    text = write_decoder(c.decoder)
    json = {
        "model_type": model_type,
        "architectures": ["InternVLChatModel" if own else "InternVLForConditionalGeneration"],
        "downsample_ratio": 0.5,
        "image_token_id": c.image_id,
        "tie_word_embeddings": c.decoder.tied_head,
        "vision_config": write_vision(c.vision, OWN[0] if own else "internvl_vision"),
    }
    if own:
        return json | {"llm_config": text, "ps_version": "v2", "select_layer": -1}
    length = (c.vision.grid // 2) ** 2
    return json | {"text_config": text, "image_seq_length": length, "vision_feature_layer": -1}
