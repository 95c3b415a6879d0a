"""Qwen2 and Llama: the decoders of Hugging Face that `models.decoder` computes.

They differ in the bias of query, key and value. Both rotate halves, as Hugging Face's converters
have permuted Llama's interleaved pairs.
"""

from collections.abc import Collection, Mapping

from geode_jax.models.decoder import DecoderConfig
from geode_jax.weights.rules import Rule

HEAD = "lm_head.weight"
IGNORED = (r"(language_model\.)?model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)
"""Buffers that old checkpoints hold and the config determines."""

ARCHITECTURES = {"qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM"}


def check_settings(json: Mapping, allowed: Mapping[str, tuple]) -> None:
    """Refuses settings of a config that the model here does not have.

    Args:
        json: the config, or a part of it.
        allowed: setting -> values; the first is meant where the config does not say.

    Raises:
        ValueError: all that is not allowed.
    """
    wrong = [
        f"{name} {json[name]!r}"
        for name, values in allowed.items()
        if json.get(name, values[0]) not in values
    ]
    if wrong:
        raise ValueError(f"not supported: {', '.join(wrong)}")


def read_decoder(json: Mapping, tensors: Collection[str], head: str = HEAD) -> DecoderConfig:
    """A decoder's config from `config.json`.

    Args:
        json: the content.
        tensors: names in the checkpoint. One that holds a head has a head of its own, whatever the
            config says of tied embeddings.
        head: name of the head.

    Raises:
        ValueError, KeyError: something is not supported or missing.
    """
    check_settings(
        json,
        {
            "model_type": tuple(ARCHITECTURES),
            "hidden_act": ("silu",),
            "use_sliding_window": (False,),
            "attention_bias": (False,),
            "mlp_bias": (False,),
        },
    )
    # Old configs have `rope_theta` outside.
    rope = json.get("rope_parameters") or json.get("rope_scaling") or {}
    scaling = rope.get("rope_type", rope.get("type", "default"))
    if scaling not in ("default", "dynamic"):  # dynamic: none within the length of pretraining
        raise ValueError(f"not supported: rope_type {scaling!r}")
    heads = json["num_attention_heads"]
    return DecoderConfig(
        vocab_size=json["vocab_size"],
        width=json["hidden_size"],
        layers=json["num_hidden_layers"],
        heads=heads,
        kv_heads=json.get("num_key_value_heads") or heads,
        head_width=json.get("head_dim") or json["hidden_size"] // heads,
        mlp_width=json["intermediate_size"],
        mlp="swiglu",
        norm="rms",
        qkv_bias=json["model_type"] == "qwen2",
        linear_bias=False,
        tied_head=head not in tensors and json.get("tie_word_embeddings", True),
        rope_theta=float(rope.get("rope_theta", json.get("rope_theta", 10_000.0))),
        norm_eps=json["rms_norm_eps"],
        dtype=read_dtype(json),
    )


def read_dtype(json: Mapping) -> str:
    """The dtype that a config asks for."""
    return json.get("dtype") or json.get("torch_dtype") or "float32"


def write_decoder(config: DecoderConfig) -> dict:
    """`config.json` of a decoder: the inverse of `read_decoder`.

    Raises:
        ValueError: neither Qwen2 nor Llama has its form.
    """
    c = config
    form = (c.mlp, c.norm, c.linear_bias, c.cross_layers)
    if form != ("swiglu", "rms", False, ()):
        raise ValueError(f"neither Qwen2 nor Llama: (mlp, norm, linear_bias, cross_layers) {form}")
    kind = "qwen2" if c.qkv_bias else "llama"
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
    }


def decoder_rules(config: DecoderConfig) -> tuple[Rule, ...]:
    """Rules of a decoder in one stage."""

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
