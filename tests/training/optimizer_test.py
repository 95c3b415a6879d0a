"""Who gets Muon, who gets weight decay, and that a stack of matrices is a stack of matrices."""

import dataclasses

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from geode_jax.objectives.hidden_cot import HiddenCoT, HiddenCoTConfig
from geode_jax.training.optimizer import (
    MUON_RMS,
    OptimizerConfig,
    labels,
    learning_rate,
    make_optimizer,
)
from tests.helpers.tiny_models import STUDENT, materialize

RATE, DECAY = 0.01, 50.0
ATTENTION = {("q",), ("k",), ("v",), ("out",)}
MATRICES = {
    *((stage, "blocks", "attention", *name) for stage in (0, 1) for name in ATTENTION),
    *((stage, "blocks", "mlp", name) for stage in (0, 1) for name in ("up", "down")),
    *((1, "cross", *name) for name in ATTENTION),
}
"""The trunk's, of a decoder with one block, a cross-attention and two more blocks."""


@pytest.fixture(scope="module")
def params() -> nnx.State:
    return nnx.state(materialize(HiddenCoT(HiddenCoTConfig(STUDENT)).build), nnx.Param)


def config(name: str) -> OptimizerConfig:
    """Without warm-up, and with a weight decay that nobody could overlook."""
    return OptimizerConfig(
        name=name,
        learning_rate=RATE,
        weight_decay=DECAY,
        warmup_steps=0,
        steps=1000,
        clip_norm=1e9,
    )


@pytest.fixture(scope="module")
def muon(params):
    """The optimizer's compiled update and its first state."""
    optimizer = make_optimizer(config("muon"), params)
    return jax.jit(optimizer.update), jax.jit(optimizer.init)(params)


def by_path(state) -> dict[tuple, np.ndarray]:
    return {path: np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(state)}


def is_kernel(path: tuple) -> bool:
    return path[-1] == "kernel"


def test_muon_gets_the_matrices_of_the_trunk_and_nothing_else(params):
    paths = [path for path, _ in nnx.to_flat_state(params)]
    found = dict(zip(paths, labels(params, "muon"), strict=True))
    trunk = {("student", "decoder", "stages", *rest, "kernel") for rest in MATRICES}
    assert {path for path in paths if found[path] == "muon"} == trunk
    assert {path for path in paths if found[path] == "decay"} == {
        path for path in paths if is_kernel(path) and path not in trunk
    }
    # Of these there are some, and they are neither.
    plain = {path for path in paths if found[path] == "plain"}
    for path in (
        ("student", "decoder", "embedding"),
        ("student", "thinking"),
        ("student", "view_embedding"),
        ("student", "pool_query"),
        ("student", "none_embedding"),
        ("student", "detection_head", "places"),
        ("student", "decoder", "stages", 1, "blocks", "attention", "q", "bias"),
        ("student", "decoder", "stages", 1, "blocks", "mlp_norm", "scale"),
        ("student", "decoder", "norm", "bias"),
        ("log_variance", "text"),
    ):
        assert path in plain
    assert found["student", "decoder", "head", "kernel"] == "decay"
    assert {found[path] for path in paths if any("head" in str(part) for part in path)} <= {
        "decay",
        "plain",
    }


def test_adamw_has_no_muon(params):
    paths = [path for path, _ in nnx.to_flat_state(params)]
    found = labels(params, "adamw")
    assert {path for path, x in zip(paths, found, strict=True) if x == "decay"} == {
        path for path in paths if is_kernel(path)
    }
    assert set(found) == {"decay", "plain"}


def check_only_matrices_shrink(params, update, start) -> None:
    updates, _ = update(jax.tree.map(np.zeros_like, params), start, params)
    before, moved = by_path(params), by_path(updates)
    assert before.keys() == moved.keys()
    for path, value in before.items():
        expected = -RATE * DECAY * value if is_kernel(path) else np.zeros_like(value)
        np.testing.assert_allclose(moved[path], expected, rtol=1e-5, atol=0, err_msg=str(path))


def test_without_a_gradient_only_matrices_shrink(params, muon):
    check_only_matrices_shrink(params, *muon)


@pytest.fixture(scope="module")
def few(params) -> nnx.State:
    """Some of each sort, which compile faster."""
    names = ("spatial_head", "thinking", "log_variance", "cross", "embedding")
    return nnx.filter_state(params, nnx.Any(*map(nnx.PathContains, names)))


@pytest.fixture(scope="module")
def adamw(few):
    """As `muon`, with a gradient clipped to norm 1."""
    optimizer = make_optimizer(dataclasses.replace(config("adamw"), clip_norm=1.0), few)
    return jax.jit(optimizer.update), jax.jit(optimizer.init)(few)


def test_without_a_gradient_adamw_shrinks_only_matrices(few, adamw):
    check_only_matrices_shrink(few, *adamw)


def test_the_whole_gradient_is_clipped(few, adamw):
    update, start = adamw
    entries = sum(leaf.size for leaf in jax.tree.leaves(few))
    for norm, clipped in ((10.0, 1.0), (0.5, 0.5)):
        size = norm / entries**0.5
        gradient = jax.tree.map(lambda x: np.full(x.shape, size, np.float32), few)  # noqa: B023
        _, state = update(gradient, start, few)
        moments = [mu for _, mu in optax.tree.get_all_with_path(state, "mu")]
        moments = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(moments)])
        assert moments.size == entries
        # Adam's first moment after one step is a tenth of what the clipping left.
        np.testing.assert_allclose(np.linalg.norm(moments), 0.1 * clipped, rtol=1e-5)


def as_matrices(path: tuple, value: np.ndarray) -> list[np.ndarray]:
    """[fan-in, fan-out] of every layer of a kernel of the trunk."""
    layers = value if "blocks" in path else value[None]
    inputs = 2 if path[-2] == "out" else 1
    fan_in = int(np.prod(layers.shape[1 : 1 + inputs]))
    return [layer.reshape(fan_in, -1) for layer in layers]


def test_every_matrix_is_updated_as_if_it_were_alone(params, muon):
    """Two steps of optax's Muon on the single two-dimensional slices, which it knows natively."""
    update, state = muon
    random = np.random.default_rng(0)
    alone = optax.contrib.muon(
        learning_rate(config("muon")), consistent_rms=MUON_RMS, weight_decay=DECAY
    )
    trunk = [path for path in by_path(params) if "stages" in path and is_kernel(path)]
    assert any(len(as_matrices(path, by_path(params)[path])) == 2 for path in trunk)

    def slices(state):
        values = by_path(state)
        return {str(path): as_matrices(path, values[path]) for path in trunk}

    start, alone_update = alone.init(slices(params)), jax.jit(alone.update)
    for _ in range(2):
        gradient = jax.tree.map(
            lambda x: random.standard_normal(x.shape, np.float32) * 1e-3, params
        )
        updates, state = update(gradient, state, params)
        expected, start = alone_update(slices(gradient), start, slices(params))
        # The decay, which is the same for all, would hide the rest.
        for name, found in slices(updates).items():
            for one, want, value in zip(found, expected[name], slices(params)[name], strict=True):
                shrunk = RATE * DECAY * value
                np.testing.assert_allclose(one + shrunk, want + shrunk, atol=2e-6, err_msg=name)
                # About the size of an Adam step: 0.2 to a few tenths of the rate.
                assert 0.1 * RATE < np.sqrt(np.mean((one + shrunk) ** 2)) < 0.4 * RATE


def test_the_others_take_adams_first_step(params, muon):
    update, state = muon
    gradient = jax.tree.map(np.ones_like, params)
    updates, _ = update(gradient, state, params)
    for path, moved in by_path(updates).items():
        if not is_kernel(path):
            np.testing.assert_allclose(moved, -RATE, rtol=1e-4, err_msg=str(path))


@pytest.mark.parametrize(("warmup", "steps", "reached"), [(100, 1000, 100), (100, 40, 10)])
def test_the_rate_warms_up_and_decays_by_the_step(warmup, steps, reached):
    rate = learning_rate(
        OptimizerConfig(
            name="adamw",
            learning_rate=RATE,
            weight_decay=0.0,
            warmup_steps=warmup,
            steps=steps,
            final_fraction=0.1,
        )
    )
    values = np.array([rate(step) for step in (0, reached // 2, reached, (reached + steps) // 2)])
    np.testing.assert_allclose(values, RATE * np.array([0, 0.5, 1, 0.55]), rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose([rate(steps), rate(2 * steps)], 0.1 * RATE, rtol=1e-5)
