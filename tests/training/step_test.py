"""The step: microbatches that add up exactly, steps that are skipped, parameters that stay."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from geode_jax.models.layers import param
from geode_jax.objectives import losses, totals
from geode_jax.objectives.hidden_cot import HiddenCoT, HiddenCoTConfig
from geode_jax.objectives.text import text_term
from geode_jax.sharding import make_mesh
from geode_jax.training.optimizer import UNLIMITED_SKIPS, OptimizerConfig, make_optimizer
from geode_jax.training.step import TrainState, init_state, make_train_step
from tests.helpers.tiny_models import STUDENT, materialize, tiny_batch

ONE_LAYER = dataclasses.replace(
    STUDENT, decoder=dataclasses.replace(STUDENT.decoder, layers=1, cross_layers=(0,))
)


def copied(tree):
    """A copy on the host: the step donates its state."""
    return jax.tree.map(np.array, tree)


def assert_same(before, after):
    jax.tree.map(np.testing.assert_array_equal, before, after)


# --- Microbatches ---------------------------------------------------------------------------------


def uneven_batch():
    """Four scenes; some carry targets that others lack, and answers of every length."""
    batch = tiny_batch(scenes=4)
    known = np.array([True, False, False, True])
    relations = batch.relations_mask_SQr & known[:, None, None]
    batch = dataclasses.replace(
        batch,
        boxes_known_S=known,
        teacher_depth_bins_mask_S=~known,
        teacher_features_mask_S=np.array([False, False, True, False]),
        relations_mask_SQr=relations,
        topk_mask_SQA=batch.topk_mask_SQA & known[:, None, None],
    )
    tokens = batch.answer_length_SQ.sum(axis=1)
    assert len(set(tokens.tolist())) > 1
    return batch


class FewTerms(HiddenCoT):
    """The losses that need no geometry and no matching, which compile in a fifth of the time."""

    def terms(self, model, batch):
        student = model.student
        scene = student.encode_scene(batch)
        hidden, encoding, names = student.read(scene, batch)
        spatial = student.spatial_head(encoding, names)
        relations = spatial.relations_SQr, batch.relations_SQr, batch.relations_mask_SQr
        value = spatial.log_value_SQ[..., None], batch.value_SQ[..., None], batch.value_mask_SQ
        depth = batch.teacher_depth_bins_SVPZ, batch.teacher_depth_bins_mask_S[:, None, None]
        return {
            "text": text_term(student.decoder, hidden, batch, self.config.temperature),
            "spatial/relations": losses.binary_kl(*relations),
            "spatial/value": losses.huber(*value),
            "depth_kl": losses.depth_bin_kl(scene.z_SVPD[..., : depth[0].shape[-1]], *depth),
        }


@pytest.mark.parametrize(
    "make", [FewTerms, pytest.param(HiddenCoT, marks=pytest.mark.slow)], ids=["few", "all"]
)
def test_microbatches_give_the_gradient_of_the_whole_batch(make):
    bounds = -2.0, 1.0
    config = HiddenCoTConfig(ONE_LAYER, temperature=2.0, log_variance_bounds=bounds)
    objective = make(config)
    model = materialize(objective.build)
    # At and beyond their bounds, where microbatches push either way; one between them.
    for name, s in {"text": 1.0, "depth_kl": -2.0, "depth_reg": 1.1, "detection": -2.2}.items():
        model.log_variance[name][...] = jnp.float32(s)
    graph, params, frozen = nnx.split(model, objective.trainable, ...)
    # Plain descent at rate 1: the update is the gradient.
    optimizer = optax.apply_if_finite(optax.sgd(1.0), UNLIMITED_SKIPS)
    batch, found = uneven_batch(), {}
    for n in (1, 4):
        own = jax.tree.map(jnp.array, params)  # the step donates it
        state = TrainState(jnp.zeros((), jnp.int32), own, frozen, optimizer.init(params))
        state, metrics = make_train_step(objective, graph, optimizer, state, n)(state, batch)
        found[n] = copied(state.params), copied(metrics)
    (one, metrics), (many, many_metrics) = found[1], found[4]
    assert metrics.keys() == many_metrics.keys()
    for name in metrics:
        np.testing.assert_allclose(many_metrics[name], metrics[name], rtol=2e-6, err_msg=name)
    # The norm of the gradient is that of its parts together, not of their mean.
    size = float(metrics["grad_norm"])
    gradient = jax.tree.map(lambda a, b: a - b, copied(params), one)
    squares = sum(float(np.sum(np.square(x, dtype=np.float64))) for x in jax.tree.leaves(gradient))
    np.testing.assert_allclose(squares**0.5, size, rtol=1e-4)
    for (path, a), (_, b) in zip(*map(nnx.to_flat_state, (one, many)), strict=True):
        np.testing.assert_allclose(a[...], b[...], atol=1e-6 * size, rtol=1e-6, err_msg=str(path))


class Weighed(nnx.Module):
    def __init__(self):
        self.log_variance = param(jnp.zeros(()))


@dataclasses.dataclass(frozen=True)
class GivenLoss:
    """Eq. 2 of one loss that is given."""

    trainable = nnx.Param

    def build(self, rngs):
        return Weighed()

    def terms(self, model, batch):
        return {"text": (jnp.sum(batch["sum"]), jnp.sum(batch["count"]))}

    def total(self, model, terms):
        return totals.uncertainty_total(terms, {"text": model.log_variance[...]}, (-7.0, 4.0))


@pytest.mark.parametrize("microbatches", [1, 2, 4])
def test_an_uncertainty_at_its_bound_moves_as_the_whole_batch_says(microbatches):
    """Of sums 10 and 1000 the one alone would push it in, the other out of its bound."""
    graph, params, frozen = nnx.split(Weighed(), nnx.Param, ...)
    optimizer = optax.apply_if_finite(optax.sgd(1.0), UNLIMITED_SKIPS)
    state = TrainState(jnp.zeros((), jnp.int32), params, frozen, optimizer.init(params))
    step = make_train_step(GivenLoss(), graph, optimizer, state, microbatches)
    tried = set()
    for sums, counts in (
        ([10, 1000, 10, 1000], [1, 1, 1, 1]),
        ([10, 1000, 0, 0], [1, 9, 0, 0]),
        ([0, 1e-4, 0, 1e-3], [0, 1, 0, 1]),
        ([0, 60, 0, 0], [0, 1, 0, 0]),
        ([0, 0, 0, 0], [0, 0, 0, 0]),
    ):
        for s in (-9.0, -7.0, -1.0, 4.0, 5.0):
            own = jax.tree.map(lambda x, s=s: jnp.full_like(x, s), params)
            state = TrainState(jnp.zeros((), jnp.int32), own, frozen, optimizer.init(own))
            batch = {"sum": np.float32(sums), "count": np.float32(counts)}
            after, metrics = step(state, batch)
            mean, bound = sum(sums) / max(sum(counts), 1), min(max(s, -7.0), 4.0)
            gradient = 0.5 - 0.5 * np.exp(-bound) * mean if sum(counts) else 0.0
            outward = (s >= 4 and gradient < 0) or (s <= -7 and gradient > 0)
            tried.add((s, outward))
            gradient = 0.0 if outward else gradient
            moved = s - float(after.params["log_variance"][...])
            assert moved == pytest.approx(gradient, rel=1e-5, abs=1e-6)
            assert metrics["grad_norm"] == pytest.approx(abs(gradient), rel=1e-5, abs=1e-6)
            total = 0.5 * np.exp(-bound) * mean + 0.5 * bound if sum(counts) else 0.0
            assert metrics["loss"] == pytest.approx(total, rel=1e-5)
            assert metrics["weight/text"] == pytest.approx(0.5 * np.exp(-bound), rel=1e-5)
    assert {(s, outward) for s in (-7.0, 4.0) for outward in (True, False)} <= tried


# --- A line through points, the smallest objective ------------------------------------------------


class Line(nnx.Module):
    def __init__(self):
        self.learned = param(jnp.ones(3), None)
        self.still = param(jnp.full(3, 0.5), None)


@dataclasses.dataclass(frozen=True)
class FitLine:
    trainable = nnx.PathContains("learned")

    def build(self, rngs):
        line = Line()
        line.learned[...] = jax.random.normal(rngs.params(), (3,))
        return line

    def terms(self, model, batch):
        error = batch["x"] @ (model.learned[...] + model.still[...]) - batch["y"]
        mask = batch["mask"]
        return {"error": (jnp.sum(jnp.where(mask, error**2, 0)), jnp.sum(mask, dtype=jnp.float32))}

    def total(self, model, terms):
        part, count = terms["error"]
        return part / count + jnp.sum(model.learned[...]), {"error": jnp.ones(())}


def points(seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    x, y = random.standard_normal((4, 5, 3)), random.standard_normal((4, 5))
    mask = np.arange(5) < np.array([5, 1, 0, 2])[:, None]
    return {"x": x.astype(np.float32), "y": y.astype(np.float32), "mask": mask}


@pytest.fixture(scope="module")
def line():
    """The compiled step on two microbatches, and what makes a fresh state."""
    config = OptimizerConfig(
        name="adamw", learning_rate=0.1, weight_decay=0.1, warmup_steps=0, steps=100
    )

    def start(seed: int = 0):
        make = functools.partial(make_optimizer, config)
        return init_state(FitLine(), make, seed, make_mesh())

    made = start()
    return make_train_step(FitLine(), *made, 2), lambda seed=0: start(seed)[2]


def test_metrics_of_a_step_against_numpy(line):
    step, start = line
    state, batch = start(), points()
    w = np.asarray(state.params["learned"][...], np.float64)
    state, metrics = step(state, batch)
    error = (batch["x"] @ (w + 0.5) - batch["y"])[batch["mask"]]
    inputs = batch["x"][batch["mask"]]
    np.testing.assert_allclose(metrics["loss/error"], np.mean(error**2), rtol=1e-5)
    assert metrics["count/error"] == 8 and metrics["weight/error"] == 1
    np.testing.assert_allclose(metrics["loss"], np.mean(error**2) + w.sum(), rtol=1e-5)
    gradient = 2 * (error[:, None] * inputs).mean(0) + 1
    np.testing.assert_allclose(metrics["grad_norm"], np.linalg.norm(gradient), rtol=1e-5)
    assert metrics["skipped"] == metrics["skipped_in_a_row"] == 0
    assert state.step == 1


def test_what_is_frozen_has_no_gradient_no_moments_and_stays(line):
    step, start = line
    state = start()
    assert list(state.params) == ["learned"] and list(state.frozen) == ["still"]
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert [leaf.shape for leaf in moments] == [(3,), (3,)]  # Adam's two
    before = copied((state.params, state.frozen))
    for seed in range(3):
        state, _ = step(state, points(seed))
    assert_same(before[1], state.frozen)
    assert (np.asarray(state.params["learned"][...]) != before[0]["learned"][...]).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_step_that_is_not_finite_leaves_everything_as_it_was(line, bad):
    step, start = line
    state, _ = step(start(), points(0))
    before = copied((state.params, state.opt_state.inner_state))
    broken = points(1)
    broken["x"][3, 0, 1] = bad  # in the second microbatch
    for skipped in (1, 2):
        state, metrics = step(state, broken)
        assert not np.isfinite(metrics["grad_norm"])
        assert metrics["skipped"] == metrics["skipped_in_a_row"] == skipped
        assert_same(before, (state.params, state.opt_state.inner_state))
    assert state.step == 3  # the data go on
    state, metrics = step(state, points(2))
    assert (metrics["skipped"], metrics["skipped_in_a_row"]) == (2, 0)
    # As if the bad ones had never been.
    expected, _ = step(start(), points(0))
    expected, _ = step(expected, points(2))
    assert_same(expected.params, state.params)


def test_the_seed_decides_the_parameters(line):
    _, start = line
    first, again, other = (start(seed).params["learned"][...] for seed in (3, 3, 4))
    assert (first == again).all() and (first != other).all()
