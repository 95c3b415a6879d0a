"""Qwen2 and Llama of transformers: the same logits, the same greedy text, and back."""

import json
import math
import re

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from geode_jax.errors import UserError
from geode_jax.models.decoder import QWEN2P5_1P5B, Decoder, DecoderConfig
from geode_jax.models.generate import generate
from geode_jax.weights import load_pretrained, save_pretrained
from geode_jax.weights.convert import plan
from tests.helpers.tiny_models import materialize
from tests.helpers.weights import change_config, close, randomize, reload, same_tensors

NEVER = -1
"""An end token that no model says."""
VOCABULARY, NEW = 61, 12
CASES = {
    "qwen2, tied, a key head for two": ("qwen2", True, 4, 2),
    "qwen2, one key head for four": ("qwen2", False, 4, 1),
    "qwen2, a key head each": ("qwen2", True, 2, 2),
    "llama, a key head for two": ("llama", False, 4, 2),
}

forward = jax.jit(lambda model, tokens: model(tokens))


@jax.jit
def say(model, prompt_QL, length_Q):
    """The NEW most likely next tokens of left-padded prompts."""
    return generate(
        model,
        model.no_prefix(1),
        prompt_QL[None],
        length_Q[None],
        max_new_tokens=NEW,
        eos_id=NEVER,
    ).tokens_SQA[0]


@pytest.fixture(scope="module", params=CASES)
def case(request, torch, tmp_path_factory):
    """(PyTorch's model, the folder that transformers saved, ours from that folder)."""
    import transformers

    kind, tied, heads, kv_heads = CASES[request.param]
    sizes = dict(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=40,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=tied,
        attn_implementation="eager",
    )
    config = {"qwen2": transformers.Qwen2Config, "llama": transformers.LlamaConfig}[kind]
    model = {"qwen2": transformers.Qwen2ForCausalLM, "llama": transformers.LlamaForCausalLM}[kind]
    reference = randomize(torch, model(config(**sizes)))
    folder = tmp_path_factory.mktemp("transformers")
    reference.save_pretrained(folder)
    return reference, folder, load_pretrained(folder)


def test_the_logits_are_those_of_transformers(torch, case):
    reference, _, model = case
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (2, 24))
    with torch.no_grad():
        expected = reference(torch.from_numpy(tokens)).logits.numpy()
    close(forward(model, tokens), expected)


def test_greedy_text_with_a_cache_is_that_of_transformers(torch, case):
    reference, _, model = case
    random = np.random.default_rng(1)
    length = np.array([5, 3, 1], np.int32)
    prompt = random.integers(0, VOCABULARY, (3, 5), np.int32)
    shown = np.arange(5) >= 5 - length[:, None]
    with torch.no_grad():
        expected = reference.generate(
            torch.from_numpy(np.where(shown, prompt, 0)).long(),
            attention_mask=torch.from_numpy(shown).long(),
            max_new_tokens=NEW,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )[:, 5:].numpy()
    assert len(np.unique(expected)) > 4  # no degenerate model
    np.testing.assert_array_equal(say(model, prompt, length), expected)


def test_our_export_is_transformers_own(torch, case, tmp_path):
    reference, folder, model = case
    save_pretrained(model, tmp_path)
    same_tensors(folder, tmp_path)
    again = reload(type(reference), tmp_path)
    tokens = torch.from_numpy(np.random.default_rng(2).integers(0, VOCABULARY, (2, 9)))
    with torch.no_grad():
        np.testing.assert_array_equal(again(tokens).logits, reference(tokens).logits)


# --- config.json ----------------------------------------------------------------------------------

THETA = {"rope_parameters": None, "rope_theta": 1e6, "dtype": None, "torch_dtype": "float32"}
"""As transformers 4 writes it."""
DYNAMIC = {"type": "dynamic", "rope_type": "dynamic", "factor": 2.0}
HONOURED = {
    "as transformers 4 writes it": THETA,
    "dynamic, within the trained length": THETA
    | {"rope_scaling": DYNAMIC, "max_position_embeddings": 24},
    "dynamic, beyond it": THETA | {"rope_scaling": DYNAMIC, "max_position_embeddings": 10},
    "dynamic, as transformers 5 writes it": {
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e6, "factor": 4.0},
        "max_position_embeddings": 10,
    },
    "theta outside of rope_scaling, and the same theta in rope_parameters": {
        "rope_theta": 1e6,
        "rope_scaling": {"rope_type": "default"},
    },
    "no theta at all": {"rope_parameters": None},
    "values that change nothing": {
        "sliding_window": 3,
        "layer_types": ["full_attention"] * 2,
        "attention_dropout": 0.5,
        "hidden_act": "swish",
        "quantization_config": None,
        "initializer_range": 9.0,
    },
    "epsilon": {"rms_norm_eps": 0.3},
}


def test_every_field_is_read_as_transformers_reads_it(torch, tmp_path):
    import transformers

    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, head_dim=16)
    config = transformers.Qwen2Config(
        vocab_size=VOCABULARY, num_key_value_heads=2, intermediate_size=40,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6}, **sizes,
    )  # fmt: skip
    randomize(torch, transformers.Qwen2ForCausalLM(config)).save_pretrained(tmp_path)
    written = (tmp_path / "config.json").read_text()
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (2, 24))
    logits = {}
    for name, changes in HONOURED.items():
        (tmp_path / "config.json").write_text(written)
        change_config(tmp_path, **changes)
        with torch.no_grad():
            theirs = reload(transformers.Qwen2ForCausalLM, tmp_path)(torch.from_numpy(tokens))
        logits[name] = np.asarray(forward(load_pretrained(tmp_path), tokens))
        close(logits[name], theirs.logits.numpy(), 1e-5)
        if "dynamic" in name:  # and it is not lost on the way back
            save_pretrained(load_pretrained(tmp_path), tmp_path / name)
            assert load_pretrained(tmp_path / name).config == load_pretrained(tmp_path).config
    plain, *_ = logits.values()
    changed = {name for name, x in logits.items() if not np.array_equal(x, plain)}
    assert changed == {
        "dynamic, beyond it",
        "dynamic, as transformers 5 writes it",
        "no theta at all",
        "epsilon",
    }


FULL, SLIDING = "full_attention", "sliding_attention"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "not supported: rope_type 'yarn'"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "not supported: rope_type 'llama3'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "not supported: rope_type 'linear'"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "not supported: rope_type 'longrope'"),
        ({"rope_scaling": DYNAMIC | {"type": "linear"}}, "rope_type and type differ"),
        ({"rope_scaling": DYNAMIC}, "rope_parameters and rope_scaling differ"),
        ({"rope_scaling": {"rope_type": "default"}}, "rope_parameters and rope_scaling differ"),
        ({"rope_theta": 1e4}, "rope_theta and that of rope_parameters differ"),
        ({"rope_parameters": {"mrope_section": [1, 2]}}, "'mrope_section' of rope_type 'default'"),
        ({"rope_parameters": {FULL: {"rope_theta": 1e4}}}, f"'{FULL}' of rope_type 'default'"),
        (THETA | {"rope_scaling": DYNAMIC, "max_position_embeddings": None},
         "'max_position_embeddings' is missing"),
        ({"rope_theta": 0}, "rope_theta must be a number above zero, at most 1e+12: 0"),
        ({"rope_theta": "1e6"}, "rope_theta must be a number above zero, at most 1e+12: '1e6'"),
        ({"partial_rotary_factor": 0.5}, "not supported: partial_rotary_factor 0.5"),
        ({"use_sliding_window": True}, "not supported: use_sliding_window True"),
        ({"layer_types": [FULL, SLIDING]}, "not supported: layer_types"),
        ({"attention_bias": True}, "not supported: attention_bias True"),
        ({"quantization_config": {"bits": 4}}, "not supported: quantization_config {'bits': 4}"),
        ({"is_causal": False}, "not supported: is_causal False"),
        ({"use_qk_norm": True}, "not supported: use_qk_norm True"),
        ({"logit_scale": 0.1, "x" * 500: 1}, "unknown: 'logit_scale', 'xxxxx"),
        ({"dtype": "float8_e4m3fn"}, "not supported: dtype 'float8_e4m3fn'"),
        ({"dtype": False}, "not supported: dtype False"),
        ({"num_hidden_layers": 10**9}, "1,000,000,000 layers, but the folder has only 27"),
        ({"num_hidden_layers": 1e400}, "Infinity is no JSON number"),
        ({"hidden_size": [8]}, "hidden_size must be a whole number from 1 to 1,048,576: [8]"),
        ({"hidden_size": True}, "hidden_size must be a whole number from 1 to 1,048,576: True"),
        ({"vocab_size": 10**12}, "vocab_size must be a whole number"),
        ({"num_attention_heads": 0}, "num_attention_heads must be a whole number"),
        ({"num_key_value_heads": 0}, "num_key_value_heads must be a whole number"),
        ({"head_dim": 7}, "not supported: rotary positions of heads of width 7"),
        ({"rms_norm_eps": 1e9}, "rms_norm_eps must be a number above zero, at most 1: 10000"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps must be a number above zero"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings must be true or false: 'no'"),
        ({"model_type": ["qwen2"]}, "model_type ['qwen2'] is none of"),
        ({"task_specific_params": eval("[" * 40 + "]" * 40)}, "nested too deeply"),
    ],
)  # fmt: skip
def test_a_field_that_would_make_another_model_is_refused(changes, said, tmp_path):
    sizes = dict(vocab_size=9, hidden_size=8, num_hidden_layers=2, num_attention_heads=2)
    config = dict(
        model_type="qwen2", num_key_value_heads=2, intermediate_size=8, rms_norm_eps=1e-6,
        rope_parameters={"rope_theta": 1e6, "rope_type": "default"}, **sizes,
    )  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    change_config(tmp_path, **changes)
    with pytest.raises(UserError, match=re.escape(said)):
        plan(tmp_path, [str(i) for i in range(27)])


def test_a_head_that_nothing_names_is_refused(tmp_path):
    """transformers would make one of random numbers; it is tied where the config says so."""
    sizes = dict(vocab_size=9, width=8, layers=1, heads=2, kv_heads=2, head_width=4, mlp_width=8)
    form = dict(mlp="swiglu", norm="rms", linear_bias=False, tied_head=True)
    save_pretrained(
        materialize(lambda rngs: Decoder(DecoderConfig(**sizes, **form), rngs=rngs)), tmp_path
    )
    assert load_pretrained(tmp_path).config.tied_head
    for said in (None, False):
        change_config(tmp_path, tie_word_embeddings=said)
        with pytest.raises(UserError, match=r"lm_head\.weight: missing"):
            load_pretrained(tmp_path)


# --- The real ones --------------------------------------------------------------------------------


def test_qwen2p5_1p5b_is_its_config_and_has_its_parameters(tmp_path):
    config = dict(
        architectures=["Qwen2ForCausalLM"],
        hidden_act="silu",
        hidden_size=1536,
        intermediate_size=8960,
        max_position_embeddings=32768,
        model_type="qwen2",
        num_attention_heads=12,
        num_hidden_layers=28,
        num_key_value_heads=2,
        rms_norm_eps=1e-06,
        rope_theta=1000000.0,
        sliding_window=32768,
        tie_word_embeddings=True,
        torch_dtype="bfloat16",
        use_sliding_window=False,
        vocab_size=151936,
    )
    (tmp_path / "config.json").write_text(json.dumps(config))
    made = plan(tmp_path)
    assert made.config == QWEN2P5_1P5B
    assert sum(map(math.prod, made.shapes.values())) == 1_543_714_304


def write_stories(source, folder) -> None:
    """llama2.c's file as a Hugging Face folder: rotated halves instead of rotated pairs."""
    raw = source.read_bytes()
    D, W, layers, H, G, X, context = np.frombuffer(raw, np.int32, 7)
    E, at = D // H, 28

    def take(*shape):
        nonlocal at
        x = np.frombuffer(raw, np.float32, math.prod(shape), at).reshape(shape)
        at += x.nbytes
        return x

    def halves(w, heads):
        w = w.reshape(layers, heads, E // 2, 2, D).swapaxes(2, 3)
        return np.ascontiguousarray(w).reshape(layers, heads * E, D)

    table = take(X, D)
    stacks = {"input_layernorm": take(layers, D)}
    stacks["self_attn.q_proj"] = halves(take(layers, H * E, D), H)
    stacks["self_attn.k_proj"] = halves(take(layers, G * E, D), G)
    stacks["self_attn.v_proj"] = take(layers, G * E, D)
    stacks["self_attn.o_proj"] = take(layers, D, H * E)
    stacks["post_attention_layernorm"] = take(layers, D)
    stacks["mlp.gate_proj"] = take(layers, W, D)
    stacks["mlp.down_proj"] = take(layers, D, W)
    stacks["mlp.up_proj"] = take(layers, W, D)
    tensors = {"model.embed_tokens.weight": table, "model.norm.weight": take(D)}
    for name, stack in stacks.items():
        tensors |= {f"model.layers.{i}.{name}.weight": w for i, w in enumerate(stack)}
    # Whatever follows (rotary tables of old files) is no parameter.
    save_file(tensors, folder / "model.safetensors")
    config = dict(
        model_type="llama",
        vocab_size=int(X),
        hidden_size=int(D),
        num_hidden_layers=int(layers),
        num_attention_heads=int(H),
        num_key_value_heads=int(G),
        intermediate_size=int(W),
        max_position_embeddings=int(context),
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        tie_word_embeddings=True,
    )
    (folder / "config.json").write_text(json.dumps(config))


def test_a_pretrained_model_tells_its_story(data_root, tmp_path):
    source = data_root / "stories260k"
    if not source.is_dir():
        pytest.skip(f"real data: no folder {source}")
    golden = json.loads((source / "golden_greedy.json").read_text())
    first, *rest = golden["greedy_ids"]
    write_stories(source / "stories260K.bin", tmp_path)
    model = load_pretrained(tmp_path)
    logits = forward(model, np.array([golden["greedy_ids"]]))[0]
    close(logits[0], golden["first_step_logits_after_bos"])
    np.testing.assert_array_equal(np.argmax(logits[:-1], axis=-1), rest)

    tell = jax.jit(
        lambda model: generate(
            model,
            model.no_prefix(1),
            np.full((1, 1, 1), first, np.int32),
            np.ones((1, 1), np.int32),
            max_new_tokens=len(rest),
            eos_id=NEVER,
        ).tokens_SQA[0, 0]
    )
    np.testing.assert_array_equal(tell(model), rest)
