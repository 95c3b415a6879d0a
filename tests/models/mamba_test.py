"""Mamba against transformers' slow path, against itself in parts, and as it starts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from geode_jax.models.mamba import MambaBlock, MambaConfig, MambaMixer
from geode_jax.training.optimizer import labels
from tests.helpers.tiny_models import materialize

TINY = MambaConfig(width=20, layers=2, expand=2, states=5, taps=4)  # rank 2
B, L = 2, 11

run = jax.jit(lambda block, x, cache=None, first=None: block(x, cache, first))


@pytest.fixture(scope="module")
def tiny() -> MambaBlock:
    return materialize(lambda rngs: MambaBlock(TINY, rngs=rngs))


@pytest.fixture(scope="module")
def x_BLD() -> np.ndarray:
    return np.random.default_rng(1).standard_normal((B, L, TINY.width)).astype(np.float32)


@pytest.fixture(scope="module")
def whole(tiny, x_BLD):
    """Output and cache of all positions at once."""
    return run(tiny, x_BLD)


def close(got, want) -> None:
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_a_token_at_a_time_equals_the_whole(tiny, x_BLD, whole):
    y, cache = whole
    assert cache.window_BtI.shape == (B, TINY.taps - 1, TINY.inner)
    assert cache.state_BUI.shape == (B, TINY.states, TINY.inner)
    out, now = run(tiny, x_BLD[:, :2])  # a prompt shorter than the window
    steps = [out]
    for i in range(2, L):
        out, now = run(tiny, x_BLD[:, i : i + 1], now)
        steps.append(out)
    close((jnp.concatenate(steps, 1), now), (y, cache))


def test_segments_of_a_row_are_as_if_apart(tiny, x_BLD, whole):
    first = np.zeros((B, L), bool)
    first[:, [4, 5, 9]] = True  # after four positions of the cache's segment
    _, cache = whole
    together, last = run(tiny, x_BLD, cache, first)
    close(together[:, :4], run(tiny, x_BLD, cache)[0][:, :4])
    for start, stop in ((4, 5), (5, 9), (9, L)):
        apart, _ = run(tiny, np.roll(x_BLD, -start, axis=1))
        close(together[:, start:stop], apart[:, : stop - start])
    close(last, run(tiny, x_BLD[:, 9:])[1])


def test_segments_exchange_no_gradient_and_neither_does_the_future(tiny, x_BLD):
    first = np.zeros((B, L), bool)
    first[0, 5] = True

    @jax.jit
    def gradients(block, x):
        """Of every position's output by every input: [L, B, L]."""
        direction = jax.random.normal(jax.random.key(3), (TINY.width,))
        y, vjp = jax.vjp(lambda x: block(x, None, first)[0], x)

        def of(position):
            return jnp.abs(vjp(jnp.zeros_like(y).at[:, position].set(direction))[0]).max(-1)

        return jax.lax.map(of, jnp.arange(L))

    seen = np.tril(np.ones((L, L), bool))[:, None].repeat(B, 1)
    seen[5:, 0, :5] = False
    np.testing.assert_array_equal(np.asarray(gradients(tiny, x_BLD)) > 0, seen)


# --- PyTorch --------------------------------------------------------------------------------------


def copy_mamba(reference, block: MambaBlock) -> None:
    """Weights of a block of Hugging Face's Mamba."""
    weights = {name: jnp.asarray(w.detach().numpy()) for name, w in reference.named_parameters()}
    mixer, D = block.mixer, block.mixer.config.width
    block.norm.scale[...] = weights["norm.weight"]
    mixer.in_proj.kernel[...] = weights["mixer.in_proj.weight"].T.reshape(D, 2, -1)
    mixer.conv.kernel[...] = weights["mixer.conv1d.weight"][:, 0].T
    mixer.conv.bias[...] = weights["mixer.conv1d.bias"]
    for name in ("x_proj", "dt_proj", "out_proj"):
        getattr(mixer, name).kernel[...] = weights[f"mixer.{name}.weight"].T
    mixer.dt_proj.bias[...] = weights["mixer.dt_proj.bias"]
    mixer.A_log[...] = weights["mixer.A_log"]
    mixer.D[...] = weights["mixer.D"]


def test_mamba_of_transformers_gives_the_same_output():
    torch = pytest.importorskip("torch", reason="PyTorch, the reference implementation, is absent")
    from transformers import MambaConfig as ReferenceConfig
    from transformers.models.mamba.modeling_mamba import MambaBlock as Reference

    config = MambaConfig(width=40, layers=1)  # 16 states, 4 taps, rank 3
    reference = Reference(
        ReferenceConfig(
            hidden_size=config.width,
            num_hidden_layers=config.layers,
            state_size=config.states,
            conv_kernel=config.taps,
            expand=config.expand,
            layer_norm_epsilon=config.norm_eps,
            vocab_size=8,
        ),
        layer_idx=0,
    ).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in reference.parameters():
            # Large enough that every bias and norm counts, and no output drowns the others.
            std = 0.4 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5
            parameter.copy_(std * torch.randn(parameter.shape, generator=generator))
    block = materialize(lambda rngs: MambaBlock(config, rngs=rngs))
    copy_mamba(reference, block)
    x = np.random.default_rng(0).standard_normal((2, 70, config.width)).astype(np.float32)
    for theirs, part in ((reference.mixer, block.mixer), (reference, block)):
        with torch.no_grad():
            expected = theirs(torch.from_numpy(x)).numpy()
        got = np.asarray(run(part, x)[0])
        assert np.median(np.abs(expected)) > 0.01 * np.abs(expected).max()
        np.testing.assert_allclose(got, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


# --- Parameters -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fresh() -> MambaMixer:
    config = MambaConfig(width=128, layers=4)
    return jax.jit(lambda key: MambaMixer(config, rngs=nnx.Rngs(key)))(jax.random.key(0))


def test_the_scan_starts_as_the_paper_says(fresh):
    E, U, R = 256, 16, 8
    assert fresh.A_log.shape == (E, U) and fresh.x_proj.kernel.shape == (E, R + 2 * U)
    A = -np.exp(np.asarray(fresh.A_log[...]))
    np.testing.assert_allclose(A, np.broadcast_to(-np.arange(1, U + 1), A.shape), rtol=1e-5)
    np.testing.assert_array_equal(fresh.D[...], np.ones(E))
    assert fresh.A_log.dtype == fresh.D.dtype == np.float32
    delta = np.asarray(jax.nn.softplus(fresh.dt_proj.bias[...]))
    assert delta.min() >= 0.999e-3 and delta.max() <= 0.1001
    # Log-uniform: a quarter of the channels in every half decade.
    counts, _ = np.histogram(np.log10(delta), bins=4, range=(-3.001, -0.999))
    assert (np.abs(counts - E / 4) < 5 * np.sqrt(E * 3 / 16)).all(), counts


def test_projections_start_as_in_pytorch(fresh):
    for kernel, fan_in, layers in (
        (fresh.in_proj.kernel, 128, 1),
        (fresh.conv.kernel, 4, 1),
        (fresh.conv.bias, 4, 1),
        (fresh.x_proj.kernel, 256, 1),
        (fresh.dt_proj.kernel, 8, 1),
        (fresh.out_proj.kernel, 256, 4),
    ):
        value, std = np.asarray(kernel[...]), (3 * fan_in * layers) ** -0.5
        assert abs(value.mean()) < 5 * std / value.size**0.5
        np.testing.assert_allclose(value.std(), std, rtol=4 / value.size**0.5)
    for uniform, fan_in in ((fresh.dt_proj.kernel, 8), (fresh.conv.kernel, 4)):
        largest = np.abs(np.asarray(uniform[...])).max() * fan_in**0.5
        assert 0.98 < largest <= 1


@pytest.mark.parametrize(("name", "matrices"), [("adamw", "decay"), ("muon", "muon")])
def test_only_the_projections_are_matrices_to_the_optimizer(name, matrices):
    """Filters, A, D and biases are neither decayed nor orthogonalised, not even in a trunk."""
    block = materialize(lambda rngs: MambaBlock(TINY, rngs=rngs))
    params = nnx.state(nnx.Dict(stages=block), nnx.Param)
    paths = [path[1:] for path, _ in nnx.to_flat_state(params)]
    found = dict(zip(paths, labels(params, name), strict=True))
    projections = {
        ("mixer", part, "kernel") for part in ("in_proj", "x_proj", "dt_proj", "out_proj")
    }
    assert {path for path in paths if found[path] == matrices} == projections
    assert {path for path in paths if found[path] == "plain"} == {
        ("norm", "scale"),
        ("mixer", "A_log"),
        ("mixer", "D"),
        ("mixer", "conv", "kernel"),
        ("mixer", "conv", "bias"),
        ("mixer", "dt_proj", "bias"),
    }
