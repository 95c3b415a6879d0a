"""Masks, sums and precision of all losses; depth and spatial losses against float64 SciPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import special, stats

from geode_jax.geometry.boxes import encode_boxes
from geode_jax.objectives import losses
from geode_jax.objectives.geode import box_regression, value_regression
from tests.helpers.losses import (
    distillation,
    draw,
    draw_boxes,
    draw_ids,
    draw_mask,
    draw_probs,
    draw_topk,
    spoil,
    text_cross_entropy,
    value_and_grad,
)

CENTRES = losses.depth_bin_centres(6)

# name: (loss of (student, *targets, mask), student, targets), for masks [3, 5].
_full, _ids, _logprobs = draw_topk(9, 4, 3, 5)
MASKED = {
    "cross_entropy": (losses.cross_entropy, draw(3, 5, 9), [draw_ids(9, 3, 5)]),
    "token_cross_entropy": (text_cross_entropy, draw(3, 5, 9), [draw_ids(9, 3, 5)]),
    "distillation": (distillation, draw(3, 5, 9), [_ids, _logprobs]),
    "distillation at 2": (
        lambda *a: distillation(*a, temperature=2.0),
        draw(3, 5, 9),
        [_ids, _logprobs],
    ),
    "depth_l1": (losses.depth_l1, draw(3, 5), [np.exp(draw(3, 5, seed=1))]),
    "depth_bin_ce": (
        lambda *a: losses.depth_bin_ce(*a, CENTRES),
        draw(3, 5, 6),
        [np.exp(draw(3, 5, seed=1))],
    ),
    "depth_bin_kl": (losses.depth_bin_kl, draw(3, 5, 6), [draw_probs(3, 5, 6, seed=1)]),
    "box_loss": (losses.box_loss, draw(3, 5, 8), [draw_boxes(3, 5, seed=1)]),
    "squared_distance": (losses.squared_distance, draw(3, 5, 4), [draw(3, 5, 4, seed=1)]),
    "log_depth_distance": (
        losses.log_depth_distance,
        np.exp(draw(3, 5)),
        [np.exp(draw(3, 5, seed=1))],
    ),
    "huber": (losses.huber, draw(3, 5, 4), [draw(3, 5, 4, seed=1)]),
    "huber_box": (losses.huber_box, draw(3, 5, 8), [draw_boxes(3, 5, seed=1)]),
    "value_regression": (
        value_regression,
        draw(3, 5),
        [np.exp(draw(3, 5, seed=1)), np.full((3, 5), 0.01, np.float32)],
    ),
    "box_regression": (box_regression, draw(3, 5, 8), [draw_boxes(3, 5, seed=1)]),
    "binary_kl": (losses.binary_kl, draw(3, 5), [draw_probs(3, 5, seed=1)]),
}
masked_losses = pytest.mark.parametrize("case", MASKED.values(), ids=MASKED.keys())


@masked_losses
@pytest.mark.parametrize("garbage", [np.nan, np.inf, 0.0])
def test_what_a_mask_leaves_out_changes_neither_value_nor_gradient(case, garbage):
    loss, student, targets = case
    mask = draw_mask(3, 5)
    expected = value_and_grad(loss, student, *targets, mask)
    spoiled = [spoil(array, mask, garbage) for array in (student, *targets)]
    total, count, grad = value_and_grad(loss, *spoiled, mask)
    assert total == pytest.approx(expected[0], rel=1e-6)
    assert count == expected[1] == mask.sum()
    np.testing.assert_allclose(grad, expected[2], rtol=1e-6, atol=1e-7)
    counted = np.any(grad.reshape(3, 5, -1) != 0, axis=-1)
    np.testing.assert_array_equal(counted, mask)


@pytest.mark.parametrize("name", ["depth_l1", "depth_bin_ce"])
def test_depths_count_by_their_weights(name):
    """As sums of single pixels, each times its weight, in float64; a mask hides NaN weights."""
    loss, student, (target,) = MASKED[name]
    mask, weight = draw_mask(3, 5), np.random.default_rng(3).random((3, 5)).astype(np.float32)

    def weighted(student, target, weight):
        if name == "depth_l1":
            return losses.depth_l1(student, target, mask, weight)
        return losses.depth_bin_ce(student, target, mask, CENTRES, weight)

    total, count = weighted(student, target, np.where(mask, weight, np.nan))
    single = [
        float(loss(student[i, j : j + 1], target[i, j : j + 1], np.array([True]))[0])
        * float(weight[i, j])
        for i, j in np.argwhere(mask)
    ]
    assert float(total) == pytest.approx(sum(single), rel=1e-5)
    assert float(count) == pytest.approx(weight[mask].sum(dtype=np.float64), rel=1e-6)
    even = weighted(student, target, np.full((3, 5), 0.5, np.float32))
    plain = loss(student, target, mask)
    assert float(even[0] / even[1]) == pytest.approx(float(plain[0] / plain[1]), rel=1e-6)


@masked_losses
@pytest.mark.parametrize("garbage", [np.nan, np.inf, 0.0])
def test_an_empty_mask_gives_zero_and_no_gradient(case, garbage):
    loss, student, targets = case
    mask = np.zeros((3, 5), bool)
    spoiled = [spoil(array, mask, garbage) for array in (student, *targets)]
    total, count, grad = value_and_grad(loss, *spoiled, mask)
    assert (total, count) == (0.0, 0.0)
    np.testing.assert_array_equal(grad, 0.0)


@masked_losses
def test_sums_add_up_over_examples(case):
    loss, student, targets = case
    row = np.arange(3)[:, None].repeat(5, axis=1)
    total, count, _ = value_and_grad(loss, student, *targets, row != 1)
    rows = [value_and_grad(loss, student, *targets, row == i) for i in (0, 2)]
    assert total == pytest.approx(sum(row[0] for row in rows), rel=1e-5)
    assert count == sum(row[1] for row in rows) == 10


some_losses = pytest.mark.parametrize(
    "case", [MASKED[name] for name in ("cross_entropy", "depth_bin_kl", "squared_distance")]
)


@some_losses
def test_a_mask_may_hold_for_whole_examples(case):
    loss, student, targets = case
    mask = np.array([True, False, True])
    expected = loss(student, *targets, mask[:, None].repeat(5, axis=1))
    np.testing.assert_array_equal(loss(student, *targets, mask), expected)


@some_losses
def test_half_precision_students_are_summed_in_float32(case):
    loss, student, targets = case
    half = jnp.asarray(student, jnp.bfloat16)
    total, count = loss(half, *targets, True)
    exact, _ = loss(half.astype(jnp.float32), *targets, True)
    assert total.dtype == count.dtype == jnp.float32
    assert float(total) == pytest.approx(float(exact), rel=1e-6)


# Depth


def test_depth_l1_counts_known_pixels_only():
    depth, target = np.array([1.0, 2.0, 3.0]), np.array([1.5, 0.0, 1.0])
    np.testing.assert_allclose(losses.depth_l1(depth, target, True), (2.5, 2))


def test_depth_bins_are_even_in_log_depth():
    np.testing.assert_allclose((CENTRES[0], CENTRES[-1]), (0.3, 10.0), rtol=1e-6)
    assert np.ptp(np.diff(np.log(CENTRES))) < 1e-5


def test_depth_bin_ce_splits_a_target_between_its_two_neighbours():
    logits = draw(4, 6)
    between = float(CENTRES[2] ** 0.25 * CENTRES[3] ** 0.75)
    target = np.array([0.1, between, float(CENTRES[4]), 50.0], np.float32)
    weights = np.zeros((4, 6))
    weights[0, 0], weights[1, 2:4], weights[2, 4], weights[3, 5] = 1.0, (0.25, 0.75), 1.0, 1.0
    expected = -(weights * special.log_softmax(logits, axis=-1)).sum()
    total, count = losses.depth_bin_ce(logits, target, True, CENTRES)
    assert float(total) == pytest.approx(expected, rel=1e-4)
    assert count == 4


def test_expected_depth_inverts_the_assignment_to_bins():
    depth = np.linspace(0.3, 10.0, 50, dtype=np.float32)
    with np.errstate(divide="ignore"):
        logits = np.log(np.asarray(losses.assign_bins(depth, CENTRES)))
    np.testing.assert_allclose(losses.expected_depth(logits, CENTRES), depth, rtol=1e-4)


def test_depth_bin_kl_normalises_the_teacher_and_skips_unknown_cells():
    logits, probs = draw(3, 5, 6), draw_probs(3, 5, 6, seed=1)
    probs[0, 0] = (0, 0, 0.5, 0.5, 0, 0)  # 0 log 0 = 0
    expected = stats.entropy(probs, special.softmax(logits, axis=-1), axis=-1)
    total, count, grad = value_and_grad(losses.depth_bin_kl, logits, 0.9 * probs, True)
    assert total == pytest.approx(expected.sum(), rel=1e-5)
    assert count == 15
    assert np.all(np.isfinite(grad))
    probs[1, 2] = 0.0
    total, count = losses.depth_bin_kl(logits, probs, True)
    assert float(total) == pytest.approx(expected.sum() - expected[1, 2], rel=1e-5)
    assert count == 14


# Spatial and feature losses (correspondence_test.py has those of several views)


def test_squared_distance_is_the_first_term_of_eq_1():
    student, teacher = draw(2, 3, 4, 5), draw(2, 3, 4, 5, seed=1)
    expected = np.sum((student.astype(np.float64) - teacher) ** 2)
    found = losses.squared_distance(student, teacher, True)
    np.testing.assert_allclose(found, (expected, 24), rtol=1e-5)


def test_log_depth_distance_leaves_out_unknown_depths():
    depth, teacher = np.exp(draw(2, 3)), np.exp(draw(2, 3, seed=1))
    teacher[0, 0] = 0.0  # unknown
    expected = np.sum(np.log(depth.ravel()[1:] / teacher.ravel()[1:]) ** 2)
    found = losses.log_depth_distance(depth, teacher, True)
    np.testing.assert_allclose(found, (expected, 5), rtol=1e-5)


def test_huber_losses_are_those_of_optax():
    prediction, target, mask = 3 * draw(3, 5, 4), draw(3, 5, 4, seed=1), draw_mask(3, 5)
    expected = np.sum(optax.losses.huber_loss(prediction, target)[mask])
    found = losses.huber(prediction, target, mask)
    np.testing.assert_allclose(found, (expected, mask.sum()), rtol=1e-5)
    # The other code of a box swaps its length and width and turns it by 90 degrees.
    code, boxes = draw(3, 5, 8), draw_boxes(3, 5, seed=1)
    one = np.asarray(encode_boxes(boxes))
    other = one[..., [0, 1, 2, 4, 3, 5, 6, 7]] * np.float32([1] * 6 + [-1, -1])
    both = [optax.losses.huber_loss(code, target).sum(axis=-1) for target in (one, other)]
    found = losses.huber_box(code, boxes, np.ones((3, 5), bool))
    np.testing.assert_allclose(found, (np.minimum(*both).sum(), 15), rtol=1e-5)


def test_teachers_receive_no_gradient():
    x, y = draw(3, 4), draw_probs(3, 4, seed=1)
    for loss in (losses.squared_distance, losses.depth_bin_kl):
        assert not np.any(jax.grad(lambda t, f=loss: f(x, t, True)[0])(y))
    assert not np.any(jax.grad(lambda t: losses.binary_kl(x, t, True)[0])(y))


def test_binary_kl():
    logit, prob = 4 * draw(3, 5), draw_probs(3, 5, seed=1).astype(np.float64)
    q = special.expit(logit.astype(np.float64))
    expected = (special.rel_entr(prob, q) + special.rel_entr(1 - prob, 1 - q)).sum()
    total, count = losses.binary_kl(logit, prob, True)
    assert float(total) == pytest.approx(expected, rel=1e-5)
    assert count == 15


def test_binary_kl_of_hard_targets_is_cross_entropy_and_finite():
    logit, prob = np.float32([3.0, -2.0, 200.0, 200.0]), np.float32([1.0, 1.0, 1.0, 0.0])
    total, _, grad = value_and_grad(losses.binary_kl, logit, prob, True)
    assert total == pytest.approx(np.log1p(np.exp(-3)) + np.log1p(np.exp(2)) + 200.0, rel=1e-6)
    np.testing.assert_allclose(grad, special.expit(logit) - prob, atol=1e-6)
