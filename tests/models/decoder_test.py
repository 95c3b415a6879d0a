"""The trunk against PyTorch's Qwen2, against itself without a cache, and against its own rules."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import hidden_cot
from geode_jax.measure.parameters import count_by_part
from geode_jax.models.decoder import CrossAttention, Decoder, DecoderConfig, KeyValues, fan_out
from geode_jax.models.student import StudentConfig
from geode_jax.models.task_heads import HeadsConfig
from geode_jax.objectives.hidden_cot import HiddenCoT, HiddenCoTConfig
from geode_jax.ops.attention import Intervals, causal
from geode_jax.sharding import abstract_model, make_mesh
from tests.helpers.tiny_models import STUDENT, materialize

TINY = STUDENT.decoder  # three layers, cross-attention before the second, two key heads for four
S, Q, PREFIX, TEXT, SEEN = 2, 3, 3, 4, 5
LENGTH = PREFIX + TEXT


@pytest.fixture(scope="module")
def tiny() -> Decoder:
    return materialize(lambda rngs: Decoder(TINY, rngs=rngs))


@pytest.fixture(scope="module")
def scenes() -> dict[str, np.ndarray]:
    """Embeddings of S prefixes and Q texts each, and S scenes' features, of which some count."""
    random = np.random.default_rng(1)
    shapes = dict(prefix=(S, PREFIX), text=(S, Q, TEXT), z=(S, SEEN))
    arrays = {
        name: random.normal(size=(*shape, TINY.width)).astype(np.float32)
        for name, shape in shapes.items()
    }
    return arrays | {"seen_length": np.array([SEEN, 2], np.int32)}


def run_whole(model, rows_BLD, z_SMD, seen_length_S):
    """Rows in scene order through the trunk at once, causally."""
    B, L, _ = rows_BLD.shape
    positions = jnp.broadcast_to(jnp.arange(L), (B, L))
    vision = {"seen": model.cross_keys(z_SMD), "seen_length_S": seen_length_S}
    return model.run(rows_BLD, positions, causal(B, L), **vision)[0]


def rows_of(scenes) -> np.ndarray:
    """[S * Q, LENGTH, D]: every text after its scene's prefix."""
    prefix = np.repeat(scenes["prefix"][:, None], Q, axis=1)
    return np.concatenate([prefix, scenes["text"]], axis=2).reshape(S * Q, LENGTH, -1)


@pytest.fixture(scope="module")
def whole(tiny, scenes) -> np.ndarray:
    """Hidden states of all rows, computed at once."""
    hidden = jax.jit(run_whole)(tiny, rows_of(scenes), scenes["z"], scenes["seen_length"])
    return np.asarray(hidden)


def test_a_token_at_a_time_equals_the_whole(tiny, scenes, whole):
    @jax.jit
    def start(model, prefix, z, seen_length):
        seen = model.cross_keys(z)
        hidden, cache = model.run_prefix(prefix, seen, seen_length)
        return hidden, fan_out(cache, Q, TEXT), seen

    @jax.jit
    def advance(model, x_BD, column, cache, seen, seen_length):
        at = jnp.full((S * Q, 1), column)
        hidden, cache = model.run(
            x_BD[:, None],
            at,
            Intervals(jnp.full_like(at, PREFIX), jnp.full_like(at, PREFIX), at + 1),
            cache=cache,
            offset=column,
            seen=seen,
            seen_length_S=seen_length,
        )
        return hidden[:, 0], cache

    hidden, cache, seen = start(tiny, scenes["prefix"], scenes["z"], scenes["seen_length"])
    own = whole.reshape(S, Q, LENGTH, -1)
    np.testing.assert_allclose(hidden, own[:, 0, :PREFIX], atol=2e-6)
    np.testing.assert_array_equal(own[:, 0, :PREFIX], own[:, 1, :PREFIX])
    text = scenes["text"].reshape(S * Q, TEXT, -1)
    for i in range(TEXT):
        column = np.int32(PREFIX + i)
        hidden, cache = advance(tiny, text[:, i], column, cache, seen, scenes["seen_length"])
        np.testing.assert_allclose(hidden, whole[:, PREFIX + i], atol=2e-6)


def test_fan_out_keeps_scenes_together_and_leaves_room():
    keys = np.arange(2 * S * PREFIX * 2 * 3, dtype=np.float32).reshape(2, S, PREFIX, 2, 3)
    ((wide, _),) = fan_out([KeyValues(keys, keys)], Q, TEXT)
    assert wide.shape == (2, S * Q, LENGTH, 2, 3)
    for row in range(S * Q):
        np.testing.assert_array_equal(wide[:, row, :PREFIX], keys[:, row // Q])
    assert (np.asarray(wide)[:, :, PREFIX:] == 0).all()


def test_a_later_token_never_reaches_an_earlier_state(tiny, scenes):
    rows = rows_of(scenes)[::Q]

    @jax.jit
    def gradients(model, rows, z, seen_length):
        """Of every position's state by every embedding and feature: [L, B, L] and [L, S, M]."""
        direction = jax.random.normal(jax.random.key(3), (TINY.width,))
        value, vjp = jax.vjp(lambda rows, z: run_whole(model, rows, z, seen_length), rows, z)

        def of(position):
            by_row, by_z = vjp(jnp.zeros_like(value).at[:, position].set(direction))
            return jnp.abs(by_row).max(-1), jnp.abs(by_z).max(-1)

        return jax.lax.map(of, jnp.arange(LENGTH))

    by_row, by_z = gradients(tiny, rows, scenes["z"], scenes["seen_length"])
    seen_from = np.tril(np.ones((LENGTH, LENGTH), bool))[:, None].repeat(S, 1)
    np.testing.assert_array_equal(np.asarray(by_row) > 0, seen_from)
    counts = np.arange(SEEN) < scenes["seen_length"][:, None]
    np.testing.assert_array_equal(np.asarray(by_z) > 0, np.broadcast_to(counts, by_z.shape))


# --- Cross-attention ------------------------------------------------------------------------------


def test_cross_attention_reads_the_valid_features_of_its_own_scene(scenes):
    cross = materialize(lambda rngs: CrossAttention(TINY, rngs=rngs))
    x = rows_of(scenes)
    look = jax.jit(lambda cross, x, z, length: cross(x, cross.keys(z), length) - x)
    bias = np.asarray(cross.out.bias[...])
    unseeing = look(cross, x, scenes["z"], np.zeros(S, np.int32))
    np.testing.assert_allclose(unseeing, np.broadcast_to(bias, x.shape), atol=1e-6)

    length = scenes["seen_length"]
    out = np.asarray(look(cross, x, scenes["z"], length)).reshape(S, Q, LENGTH, -1)
    assert np.abs(out - bias).min(axis=-1).max() > 1e-3
    other = scenes["z"].copy()
    other[1, 2:] += 1  # beyond the second scene's two features
    np.testing.assert_array_equal(out.reshape(x.shape), look(cross, x, other, length))
    other[1, 1] += 1
    changed = np.asarray(look(cross, x, other, length)).reshape(out.shape)
    np.testing.assert_array_equal(out[0], changed[0])
    assert (np.abs(out[1] - changed[1]).max(-1) > 0).all()


def test_cross_attention_starts_by_looking_for_its_like():
    cross = jax.jit(lambda key: CrossAttention(TINY, rngs=nnx.Rngs(key)))(jax.random.key(0))
    np.testing.assert_array_equal(cross.q.kernel[...], cross.k.kernel[...])
    assert cross.q.kernel is not cross.k.kernel  # they learn apart


def test_a_text_model_needs_no_vision(tiny, scenes):
    """Without features the cross-attention is left out, its bias too, and stages do not matter."""
    plain = materialize(lambda rngs: Decoder(dataclasses.replace(TINY, cross_layers=()), rngs=rngs))
    blocks = [nnx.state(stage.blocks) for stage in tiny.stages]
    nnx.update(plain.stages[0].blocks, jax.tree.map(lambda *x: np.concatenate(x), *blocks))
    nnx.update(plain.norm, nnx.state(tiny.norm))
    nnx.update(plain.head, nnx.state(tiny.head))
    plain.embedding[...] = tiny.embedding[...]
    ids = np.random.default_rng(0).integers(0, TINY.vocab_size, (2, 6))
    logits = jax.jit(lambda model: model(ids))
    expected = logits(tiny)
    assert expected.shape == (2, 6, TINY.vocab_size) and expected.dtype == np.float32
    np.testing.assert_allclose(logits(plain), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"kv_heads": 3}, "kv_heads, 3"), ({"cross_layers": (3,)}, r"cross_layers: \(3,\)")],
)
def test_impossible_sizes_are_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        Decoder(dataclasses.replace(TINY, **changes), rngs=nnx.Rngs(0))


# --- Qwen2 ----------------------------------------------------------------------------------------


def copy_qwen2(torch_model, model: Decoder) -> None:
    """Weights of a Hugging Face Qwen2 into a decoder without cross-attention."""
    weights = {name: w.detach().numpy() for name, w in torch_model.model.named_parameters()}
    c, blocks = model.config, model.stages[0].blocks
    D, E = c.width, c.head_width

    def stack(name, shape=None):
        layers = [weights[f"layers.{i}.{name}"].T for i in range(c.layers)]
        return jnp.asarray(np.stack([x if shape is None else x.reshape(shape) for x in layers]))

    for name, heads in (("q", c.heads), ("k", c.kv_heads), ("v", c.kv_heads)):
        projection = getattr(blocks.attention, name)
        projection.kernel[...] = stack(f"self_attn.{name}_proj.weight", (D, heads, E))
        projection.bias[...] = stack(f"self_attn.{name}_proj.bias", (heads, E))
    blocks.attention.out.kernel[...] = stack("self_attn.o_proj.weight", (c.heads, E, D))
    for name in ("up", "gate", "down"):
        getattr(blocks.mlp, name).kernel[...] = stack(f"mlp.{name}_proj.weight")
    blocks.attention_norm.scale[...] = stack("input_layernorm.weight")
    blocks.mlp_norm.scale[...] = stack("post_attention_layernorm.weight")
    model.norm.scale[...] = jnp.asarray(weights["norm.weight"])
    model.embedding[...] = jnp.asarray(weights["embed_tokens.weight"])


def test_qwen2_of_transformers_gives_the_same_logits():
    torch = pytest.importorskip("torch", reason="PyTorch, the reference implementation, is absent")
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = DecoderConfig(
        vocab_size=61,
        width=32,
        layers=3,
        heads=4,
        kv_heads=2,
        head_width=8,
        mlp_width=48,
        mlp="swiglu",
        norm="rms",
        qkv_bias=True,
        linear_bias=False,
        tied_head=True,
        rope_theta=1e6,
        norm_eps=1e-6,
    )
    reference = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=config.vocab_size,
            hidden_size=config.width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads,
            intermediate_size=config.mlp_width,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            rms_norm_eps=config.norm_eps,
            tie_word_embeddings=True,
            max_position_embeddings=512,
            attn_implementation="eager",
        )
    ).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in reference.parameters():
            # Large enough that attention is far from uniform and every bias and norm counts.
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    model = materialize(lambda rngs: Decoder(config, rngs=rngs))
    copy_qwen2(reference, model)
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (2, 300))
    with torch.no_grad():
        expected = reference(torch.from_numpy(ids)).logits.numpy()
    logits = np.asarray(jax.jit(lambda model, ids: model(ids))(model, ids))
    np.testing.assert_allclose(logits, expected, atol=2e-4 * np.abs(expected).max())
    assert (logits.argmax(-1) == expected.argmax(-1)).mean() > 0.99


# --- The paper's sizes ----------------------------------------------------------------------------


def full_decoder(**changes) -> DecoderConfig:
    """The trunk of `configs/hidden_cot.py:full` with a 32k tokenizer."""
    m = hidden_cot.get_config("full").model
    sizes = dict(
        vocab_size=32_000,
        width=m.width,
        layers=m.layers,
        heads=m.heads,
        kv_heads=m.heads,
        head_width=m.width // m.heads,
        mlp_width=m.mlp_width,
        cross_layers=tuple(m.cross_layers),
        remat=m.remat,
        dtype=m.dtype,
    )
    return DecoderConfig(**sizes | changes)


@pytest.fixture(scope="module")
def full_counts() -> dict[str, int]:
    """Parameters by part of `full`, VGGT-1B's 37 x 37 patches and a 1024-wide teacher."""
    m = hidden_cot.get_config("full").model
    heads = HeadsConfig(
        width=m.heads_width,
        depth_bins=m.depth_bins,
        depth_cells=m.depth_cells,
        queries=m.queries,
        detection_layers=m.detection_layers,
        categories=20,
        teacher_width=1024,
    )
    student = StudentConfig(
        decoder=full_decoder(),
        heads=heads,
        vision_width=2048,
        patch_grid=(37, 37),
        max_views=32,
        projector_width=m.projector_width,
        thinking_tokens=m.thinking_tokens,
        vision_prefix=m.vision_prefix,
        category_ids=((1,),) * 20,
    )
    objective = HiddenCoT(HiddenCoTConfig(student))
    return count_by_part(nnx.state(abstract_model(objective.build, make_mesh())))


def test_full_has_the_papers_trunk(full_counts):
    assert round(full_counts["trunk"] / 1e9, 3) == 1.209
    assert round(full_counts["embeddings and LM head"] / 1e9, 3) == 0.131
    assert full_counts["thinking tokens"] == 8 * 2048
    assert full_counts["log-variances"] == 8


def test_full_has_the_papers_parameters_with_the_vggt_aggregator(full_counts):
    # VGGT-1B's aggregator (24 + 24 blocks and the DINOv2-L patch embedding), which the paper counts
    # with its student: by arithmetic from the module definitions.
    vggt_aggregator = 909_000_000
    total = sum(full_counts.values()) + vggt_aggregator
    assert 2.285e9 <= total < 2.295e9, full_counts  # "2.29B"


def test_layers_of_full_width_train():
    config = full_decoder(vocab_size=32, layers=2, cross_layers=(1,))
    model = materialize(lambda rngs: Decoder(config, rngs=rngs))
    ids = np.random.default_rng(0).integers(0, 32, (1, 6))
    z = np.random.default_rng(1).normal(size=(1, 4, config.width))

    @jax.jit
    def gradient_norms(model):
        def loss(model):
            x = model.embed(ids)
            hidden, kv = model.run(
                x,
                jnp.arange(6)[None],
                causal(1, 6),
                seen=model.cross_keys(jnp.asarray(z, config.dtype)),
                seen_length_S=jnp.array([4]),
            )
            assert x.dtype == hidden.dtype == kv[0].k.dtype == jnp.bfloat16
            log_prob = jax.nn.log_softmax(model.logits(hidden[:, :-1]))
            return -jnp.take_along_axis(log_prob, ids[:, 1:, None], axis=-1).mean()

        value, gradient = jax.value_and_grad(loss)(model)
        return value, jax.tree.map(lambda g: jnp.linalg.norm(g.ravel()), nnx.state(gradient))

    value, norms = gradient_norms(model)
    assert 0.5 * np.log(32) < value < 2 * np.log(32)
    for path, norm in nnx.to_flat_state(norms):
        # A bias that all keys share moves no softmax.
        assert np.isfinite(norm[...]) and (norm[...] > 0 or path[-2:] == ("k", "bias")), path
