"""Config and rules of Hugging Face's Qwen2 and Llama, which `models.decoder` computes.

Qwen2 has biases on query, key and value, Llama has none. Both rotate halves: Hugging Face's
converters have permuted Llama's interleaved pairs.
"""

from collections.abc import Collection, Mapping

from geode_jax.models.decoder import DecoderConfig
from geode_jax.weights.fields import (
    MAX_EPSILON,
    MAX_LAYERS,
    MAX_VOCABULARY,
    check_fields,
    dtype_of,
    flag,
    names,
    part,
    positive,
    size,
)
from geode_jax.weights.rules import Rule

HEAD = "lm_head.weight"
IGNORED = (r"(language_model\.)?model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)
"""Buffers in old checkpoints, which follow from the config."""

ARCHITECTURES = {"qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM"}


_HONOURED = names(
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
    "num_key_value_heads head_dim rms_norm_eps tie_word_embeddings rope_theta rope_scaling "
    "rope_parameters max_position_embeddings layer_types"
)
_ALLOWED = {
    "model_type": tuple(ARCHITECTURES),
    "hidden_act": ("silu", "swish"),
    "use_sliding_window": (False, None),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "partial_rotary_factor": (1.0, None),
    "original_max_position_embeddings": (None,),
    "qk_norm": (False, None),
    "use_qk_norm": (False, None),
    "moe_config": (None,),
}
_IRRELEVANT = {
    # Windows slide only if `use_sliding_window` or `layer_types` asks for it, which is refused.
    "qwen2": frozenset({"sliding_window", "max_window_layers"}),
    "llama": frozenset(),
}

_KV_HEADS = {"qwen2": 32, "llama": None}
"""Default of transformers for `num_key_value_heads`; None: the number of heads."""


def read_decoder(
    json: Mapping, tensors: Collection[str], head: str = HEAD, tied: bool = False
) -> DecoderConfig:
    """Returns the config of a decoder.

    Args:
        json: content of `config.json`.
        tensors: names of the tensors in the checkpoint. If the head is among them, it is not tied,
            even if the config ties embeddings.
        head: name of the head's tensor.
        tied: default of `tie_word_embeddings`; in transformers it is False for these architectures.

    Raises:
        ValueError, KeyError: a field is not supported or missing.
    """
    kind = json["model_type"]
    if kind not in ARCHITECTURES:
        raise ValueError(f"not supported: model_type {kind!r}")
    check_fields(json, _HONOURED, _ALLOWED, _IRRELEVANT[kind])
    heads, width = size(json, "num_attention_heads"), size(json, "hidden_size")
    layers = size(json, "num_hidden_layers", MAX_LAYERS)
    theta, dynamic = _read_rope(json)
    if json.get("layer_types") not in (None, ["full_attention"] * layers):
        raise ValueError("not supported: layer_types other than full_attention in every layer")
    given = {"num_key_value_heads": _KV_HEADS[kind], "head_dim": None, **json}
    for name, default in (("num_key_value_heads", heads), ("head_dim", width // heads)):
        if given[name] is None:
            given[name] = default
    head_width, kv_heads = size(given, "head_dim"), size(given, "num_key_value_heads")
    if heads % kv_heads:
        unnamed = "" if json.get("num_key_value_heads") else " (the default of transformers)"
        raise ValueError(
            f"num_key_value_heads {kv_heads}{unnamed} does not divide num_attention_heads {heads}"
        )
    if head_width % 2 or (dynamic and head_width == 2):
        raise ValueError(f"not supported: rotary positions of heads of width {head_width}")
    tied = flag(json, "tie_word_embeddings", tied)
    return DecoderConfig(
        vocab_size=size(json, "vocab_size", MAX_VOCABULARY),
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_width=head_width,
        mlp_width=size(json, "intermediate_size"),
        mlp="swiglu",
        norm="rms",
        qkv_bias=kind == "qwen2",
        linear_bias=False,
        tied_head=tied and head not in tensors,
        rope_theta=theta,
        dynamic_rope=dynamic,
        norm_eps=positive(json, "rms_norm_eps", MAX_EPSILON),
        dtype=dtype_of(json),
    )


_THETA = 10_000.0
"""Default base of the rotary frequencies."""


def _read_rope(json: Mapping) -> tuple[float, tuple[int, float] | None]:
    """Returns theta and, for dynamic scaling, (trained length, factor).

    transformers 5 writes `rope_parameters`, and older versions `rope_theta` and `rope_scaling`.
    Version 5 reads both and prefers `rope_scaling`. If two of them differ, the result depends on
    the version, so such a config is refused.
    """
    outside = positive(json, "rope_theta") if json.get("rope_theta") is not None else None
    spellings = {
        name: _rope_spelling(part(json, name), outside)
        for name in ("rope_parameters", "rope_scaling")
        if json.get(name)
    }
    found = list(spellings.values()) or [{"rope_type": "default", "rope_theta": outside or _THETA}]
    scaled = [rope for rope in found if rope["rope_type"] not in ("default", "dynamic")]
    if scaled:
        raise ValueError(f"not supported: rope_type {scaled[0]['rope_type']!r}")
    if found[0] != found[-1]:
        raise ValueError("rope_parameters and rope_scaling differ: remove the wrong one")
    rope = found[0]
    if outside not in (None, rope["rope_theta"]):
        raise ValueError("rope_theta and that of rope_parameters differ: remove the wrong one")
    if rope["rope_type"] == "default":
        return rope["rope_theta"], None
    return rope["rope_theta"], (
        size(json, "max_position_embeddings", MAX_VOCABULARY),
        positive(rope, "factor"),
    )


def _rope_spelling(rope: Mapping, outside: float | None) -> dict:
    """Returns the entries of `rope_parameters` or `rope_scaling` under their newer names."""
    kinds = [rope[name] for name in ("rope_type", "type") if rope.get(name) is not None]
    if kinds[1:] not in ([], kinds[:1]):
        raise ValueError("rope_type and type differ: remove the wrong one")
    kind = kinds[0] if kinds else "default"
    if not isinstance(kind, str):
        raise ValueError("rope_type must be text")
    entries = {name: value for name, value in rope.items() if value is not None}
    entries |= {"rope_type": kind, "rope_theta": outside or _THETA} | entries
    entries["rope_theta"] = positive(entries, "rope_theta")
    if kind in ("default", "dynamic"):
        known = {"rope_type", "type", "rope_theta", *(["factor"] if kind == "dynamic" else [])}
        unknown = [n for n, v in entries.items() if (n, v) != ("partial_rotary_factor", 1.0)]
        unknown = sorted(set(unknown) - known)
        if unknown:
            raise ValueError(f"not supported: {unknown[0]!r} of rope_type {kind!r}")
    entries.pop("type", None)
    entries.pop("partial_rotary_factor", None)
    return entries


def write_decoder(config: DecoderConfig) -> dict:
    """Returns the `config.json` of a decoder: the inverse of `read_decoder`.

    Raises:
        ValueError: the decoder is neither a Qwen2 nor a Llama.
    """
    c = config
    form = (c.mlp, c.norm, c.linear_bias, c.cross_layers)
    if form != ("swiglu", "rms", False, ()):
        raise ValueError(f"neither Qwen2 nor Llama: (mlp, norm, linear_bias, cross_layers) {form}")
    kind = "qwen2" if c.qkv_bias else "llama"
    scaling = {}
    if c.dynamic_rope:
        length, factor = c.dynamic_rope
        scaling["max_position_embeddings"] = length
        scaling["rope_scaling"] = {"rope_type": "dynamic", "factor": factor}
    return {
        "model_type": kind,
        "architectures": [ARCHITECTURES[kind]],
        "vocab_size": c.vocab_size,
        "hidden_size": c.width,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_width,
        "intermediate_size": c.mlp_width,
        "hidden_act": "silu",
        "rms_norm_eps": c.norm_eps,
        "rope_theta": c.rope_theta,
        "tie_word_embeddings": c.tied_head,
        **scaling,
    }


def decoder_rules(config: DecoderConfig) -> tuple[Rule, ...]:
    """Returns the rules of a decoder of one stage."""

    def block(key, leaf, axes):
        return Rule(f"model.layers.{{layer}}.{key}", f"stages.0.blocks.{leaf}", axes)

    attention = [
        rule
        for name in ("q", "k", "v")
        for rule in (
            block(
                f"self_attn.{name}_proj.weight",
                f"attention.{name}.kernel",
                "(h e) d -> layer d h e",
            ),
            block(f"self_attn.{name}_proj.bias", f"attention.{name}.bias", "(h e) -> layer h e"),
        )
        if config.qkv_bias or rule.leaf.endswith("kernel")
    ]
    head = () if config.tied_head else (Rule(HEAD, "head.kernel", "x d -> d x"),)
    return (
        Rule("model.embed_tokens.weight", "embedding", "x d -> x d"),
        block("input_layernorm.weight", "attention_norm.scale", "d -> layer d"),
        *attention,
        block("self_attn.o_proj.weight", "attention.out.kernel", "d (h e) -> layer h e d"),
        block("post_attention_layernorm.weight", "mlp_norm.scale", "d -> layer d"),
        block("mlp.gate_proj.weight", "mlp.gate.kernel", "w d -> layer d w"),
        block("mlp.up_proj.weight", "mlp.up.kernel", "w d -> layer d w"),
        block("mlp.down_proj.weight", "mlp.down.kernel", "d w -> layer w d"),
        Rule("model.norm.weight", "norm.scale", "d -> d"),
        *head,
    )
