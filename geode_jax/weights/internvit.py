"""InternViT and InternVL in both layouts: InternVL's own, and that of transformers.

`intern_vit_6b` and `internvl_chat` are the model types of the first (the 300M model's too),
`internvl_vision` and `internvl` of the second. Names differ, and query, key and value are one
tensor or three; a row below is a parameter with its name in either.
"""

from collections.abc import Collection, Mapping

from geode_jax.models.internvl import IMAGE_ID, InternVLConfig
from geode_jax.models.vit import VitConfig
from geode_jax.weights.qwen2 import (
    HEAD,
    check_settings,
    decoder_rules,
    read_decoder,
    read_dtype,
    write_decoder,
)
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
    """Rules of an `InternViT`."""
    own = model_type in OWN
    blocks = within(
        _rules(_BLOCK, own), f"encoder.{'layers' if own else 'layer'}.{{layer}}.", "blocks."
    )
    if not config.qkv_bias:
        blocks = tuple(rule for rule in blocks if rule.leaf != "blocks.attention.qkv.bias")
    return _rules(_VISION, own) + blocks


def internvl_rules(config: InternVLConfig, model_type: str) -> tuple[Rule, ...]:
    """Rules of an `InternVL`."""
    own = model_type in OWN
    tower = "vision_model." if own else "vision_tower."
    return (
        *within(vision_rules(config.vision, model_type), tower, "vision."),
        *within(_rules(_PROJECTOR, own), "", "projector."),
        *within(decoder_rules(config.decoder), "language_model.", "decoder."),
    )


# --- config.json ----------------------------------------------------------------------------------

_SETTINGS = {
    "norm_type": ("layer_norm",),
    "hidden_act": ("gelu",),
    "num_channels": (3,),
    "qk_normalization": (False,),
    "use_qk_norm": (False,),
    "use_mean_pooling": (True,),  # that is, no norm at the end
    "use_absolute_position_embeddings": (True,),
    "use_mask_token": (False,),
    "downsample_ratio": (0.5,),
    "ps_version": ("v2",),
    "select_layer": (-1,),
    "vision_feature_layer": (-1,),
    "vision_feature_select_strategy": ("default",),
    "projector_hidden_act": ("gelu",),
}
"""What `models.vit` computes, for `check_settings`."""

_VISION_DEFAULTS = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "image_size": 448,
    "patch_size": 14,
    "layer_norm_eps": 1e-6,
    "attention_bias": False,
}
"""transformers may leave out of `vision_config` what equals these, the defaults of its class."""


def read_vision(json: Mapping, model_type: str) -> VitConfig:
    """A vision encoder's config from `config.json`, or its `vision_config`.

    Raises:
        ValueError, KeyError: something is not supported or missing.
    """
    own = model_type in OWN
    if not own:
        json = _VISION_DEFAULTS | json
    check_settings(json, _SETTINGS)
    return VitConfig(
        image_size=_side(json["image_size"]),
        patch_size=_side(json["patch_size"]),
        width=json["hidden_size"],
        layers=json["num_hidden_layers"],
        heads=json["num_attention_heads"],
        mlp_width=json["intermediate_size"],
        qkv_bias=json["qkv_bias" if own else "attention_bias"],
        norm_eps=json["layer_norm_eps"],
        dtype=read_dtype(json),
    )


def _side(size: int | list[int]) -> int:
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) != 1:
        raise ValueError(f"not supported: a picture or patch of {size}, which is not square")
    return sides.pop()


def write_vision(config: VitConfig, model_type: str) -> dict:
    """`config.json` of a vision encoder: the inverse of `read_vision`."""
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


def read_internvl(json: Mapping, tensors: Collection[str], model_type: str) -> InternVLConfig:
    """An InternVL's config from `config.json`; arguments and errors as of `read_decoder`."""
    check_settings(json, _SETTINGS)
    text = json["llm_config" if model_type in OWN else "text_config"]
    # Versions differ in which of the two says whether the head is tied.
    tied = [part["tie_word_embeddings"] for part in (json, text) if "tie_word_embeddings" in part]
    dtype = read_dtype(json)
    text = {**text, "dtype": dtype, "tie_word_embeddings": any(tied or [True])}
    return InternVLConfig(
        vision=read_vision({**json["vision_config"], "dtype": dtype}, model_type),
        decoder=read_decoder(text, tensors, f"language_model.{HEAD}"),
        image_id=json.get("image_token_id", IMAGE_ID),
    )


def write_internvl(config: InternVLConfig, model_type: str) -> dict:
    """`config.json` of an InternVL: the inverse of `read_internvl`."""
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
