"""The totals of eq. 2 and of its ablation."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.nnx import Variable

from geode_jax.errors import UserError
from geode_jax.objectives import losses, totals
from geode_jax.objectives.hidden_cot import GROUPS, TARGETS, HiddenCoT, HiddenCoTConfig
from tests.helpers.losses import draw
from tests.helpers.tiny_models import STUDENT


def pair(total, count):
    return jnp.float32(total), jnp.float32(count)


def test_means_are_taken_after_the_sums_are_added():
    assert totals.mean(pair(6.0, 4.0)) == 1.5
    assert totals.mean(pair(np.nan, 0.0)) == 0.0
    assert totals.combine([pair(6.0, 4.0), pair(3.0, 1.0)], [1.0, 0.5]) == (3.0, 1.0)
    assert totals.combine([pair(6.0, 4.0), pair(0.0, 0.0)]) == (1.5, 1.0)
    assert totals.combine([pair(0.0, 0.0), pair(0.0, 0.0)]) == (0.0, 0.0)


def terms_and_parameters():
    terms = {name: pair(i + 1.0, 2.0) for i, name in enumerate(losses.TERMS)}
    terms["detection"] = pair(0.0, 0.0)
    s = dict(zip(losses.TERMS, jnp.asarray(draw(len(losses.TERMS))), strict=True))
    return terms, s


def test_uncertainty_total_is_eq_2():
    terms, s = terms_and_parameters()
    total, weights = totals.uncertainty_total(terms, s)
    expected = 0.0
    for name, (value, count) in terms.items():
        sigma = np.sqrt(np.exp(np.float64(s[name])))
        assert float(weights[name]) == pytest.approx(1 / (2 * sigma**2), rel=1e-5)
        if count:
            expected += value / count / (2 * sigma**2) + np.log(sigma)
    assert float(total) == pytest.approx(float(expected), rel=1e-5)
    assert set(weights) == set(losses.TERMS)


def test_uncertainty_gradients_are_the_analytic_ones_and_absent_terms_have_none():
    terms, s = terms_and_parameters()

    def total(s, means):
        pairs = {name: (means[name] * terms[name][1], terms[name][1]) for name in terms}
        return totals.uncertainty_total(pairs, s)[0]

    means = {name: totals.mean(pair) for name, pair in terms.items()}
    grad_s, grad_mean = jax.grad(total, (0, 1))(s, means)
    for name in losses.TERMS:
        present = name != "detection"
        weight = 0.5 * np.exp(-s[name])
        assert float(grad_mean[name]) == pytest.approx(present * weight, rel=1e-5)
        expected = present * (0.5 - weight * means[name])
        assert float(grad_s[name]) == pytest.approx(float(expected), rel=1e-4, abs=1e-6)
    assert grad_s["detection"] == 0.0


def test_absent_terms_with_garbage_in_them_do_no_harm():
    terms = {"text": pair(1.0, 1.0), "spatial": pair(jnp.nan, 0.0)}
    s = {"text": jnp.float32(0.0), "spatial": jnp.float32(0.0)}
    total, grad = jax.value_and_grad(lambda s: totals.uncertainty_total(terms, s)[0])(s)
    assert total == 0.5
    assert grad == {"text": 0.0, "spatial": 0.0}


@pytest.mark.parametrize("start", [-9.0, -3.0, 0.0, 3.0, 9.0])
@pytest.mark.parametrize("loss", [0.5, 1e-6, 1e6])
def test_log_variance_finds_its_optimum_within_bounds_from_anywhere(start, loss):
    terms = {"text": pair(loss, 1.0)}
    low, high = -3.0, 3.0

    def total(s):
        return totals.uncertainty_total(terms, {"text": s}, (low, high))[0]

    step = jax.jit(lambda s: s - jnp.clip(jax.grad(total)(s), -1.0, 1.0) * 0.2)
    s = jnp.float32(start)
    for _ in range(400):
        s = step(s)
    # Eq. 2 is least at sigma^2 = L.
    optimum = np.clip(np.log(loss), low, high)
    assert float(jnp.clip(s, low, high)) == pytest.approx(optimum, abs=0.01)
    # A gradient that points out of the bounds is 0: s stays within a step of them.
    if low <= start <= high:
        assert low - 0.21 <= float(s) <= high + 0.21
    weight = totals.uncertainty_total(terms, {"text": s}, (low, high))[1]["text"]
    assert 0.5 * np.exp(-high) * 0.999 <= float(weight) <= 0.5 * np.exp(-low) * 1.001


def test_static_total():
    terms, _ = terms_and_parameters()
    weights = {name: 0.5 * i for i, name in enumerate(losses.TERMS)}
    total, used = totals.static_total(terms, weights)
    expected = sum(weights[n] * v / c for n, (v, c) in terms.items() if c)
    assert float(total) == pytest.approx(float(expected))
    assert {name: float(w) for name, w in used.items()} == weights


@pytest.mark.parametrize(
    "total, weight", [(totals.uncertainty_total, jnp.float32(0.0)), (totals.static_total, 0.0)]
)
def test_a_term_without_a_weight_is_an_error(total, weight):
    with pytest.raises(KeyError, match="spatial"):
        total({"spatial": pair(1.0, 1.0)}, {"text": weight})


@pytest.mark.parametrize("dropped", GROUPS)
def test_dropping_a_loss_takes_its_terms_out_of_the_total(dropped):
    terms, s = terms_and_parameters()
    model = SimpleNamespace(log_variance={name: Variable(value) for name, value in s.items()})
    kept = tuple(name for name in losses.TERMS if name not in GROUPS[dropped])
    (all_of_them, used), (without, others) = (
        HiddenCoT(HiddenCoTConfig(STUDENT, terms=of)).total(model, terms)
        for of in (losses.TERMS, kept)
    )
    assert set(used) - set(others) == set(GROUPS[dropped]) and len(others) == len(kept)
    gone = {name: terms[name] for name in GROUPS[dropped]}
    alone, _ = totals.uncertainty_total(gone, {name: s[name] for name in gone})
    assert float(all_of_them - without) == pytest.approx(float(alone), abs=1e-5)


def test_lambda_cross_weighs_the_second_term_of_eq_1():
    terms = {"spatial/cross_view": pair(6.0, 2.0), "spatial/relations": pair(8.0, 4.0)}
    model = SimpleNamespace(log_variance={})
    for weight in (0.0, 0.1, 2.0):
        config = HiddenCoTConfig(STUDENT, weights="static", cross_view_weight=weight)
        total, _ = HiddenCoT(config).total(model, terms)
        assert float(total) == pytest.approx(3.0 * weight + 2.0)
    with pytest.raises(UserError, match="cross_view_weight: -1 is not a number"):
        HiddenCoTConfig(STUDENT, cross_view_weight=-1)


def test_a_term_learns_from_any_of_its_targets():
    objective = HiddenCoT(HiddenCoTConfig(STUDENT))
    everything = frozenset().union(*(needed for of in TARGETS.values() for needed in of))
    assert objective.missing_targets(everything) == {}
    assert set(objective.missing_targets(frozenset())) == set(losses.TERMS) - {"text"}
    for name in everything:
        needing = {term for term, of in TARGETS.items() if all(name in needed for needed in of)}
        assert set(objective.missing_targets(everything - {name})) == needing
