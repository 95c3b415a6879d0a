"""Matching, focal loss, box loss and set prediction against SciPy and float64 NumPy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize, special

from geode_jax.geometry.boxes import decode_boxes, encode_boxes, generalized_iou
from geode_jax.objectives import losses, totals
from tests.helpers.losses import draw, draw_boxes, draw_ids, spoil, value_and_grad

detect = jax.jit(losses.detection)
match = jax.jit(losses.match)
overlap_of = jax.jit(generalized_iou)


@pytest.mark.parametrize(("boxes", "queries"), [(12, 16), (7, 7), (9, 5), (1, 4)])
def test_match_costs_what_scipy_finds(boxes, queries):
    rng = np.random.default_rng(boxes)
    cost = rng.normal(scale=5.0, size=(8, boxes, queries)).astype(np.float32)
    mask = rng.random((8, boxes)) < 0.7
    mask[0], mask[1] = True, False
    matched = np.asarray(match(cost, mask))
    assert matched.dtype == np.int32
    for cost_NM, mask_N, query_N in zip(cost, mask, matched, strict=True):
        row, column = optimize.linear_sum_assignment(cost_NM[mask_N])
        found = np.flatnonzero(query_N >= 0)
        assert not np.any(query_N[~mask_N] >= 0)
        assert len(found) == len(row)
        assert len(set(query_N[found])) == len(found)
        best = cost_NM[mask_N][row, column].sum()
        assert cost_NM[found, query_N[found]].sum() == pytest.approx(best, abs=1e-4)


def test_match_survives_costs_that_are_not_finite():
    cost = np.full((3, 4), np.nan, np.float32)
    cost[0, 2], cost[1], cost[1, 0] = 1.0, np.inf, -2.0
    query = np.asarray(match(cost, np.ones(3, bool)))
    assert tuple(query[:2]) == (2, 0)
    assert query[2] in (1, 3)


def focal_reference(logits, positive, alpha=0.25, gamma=2.0):
    p = special.expit(logits.astype(np.float64))
    return np.where(
        positive,
        -alpha * (1 - p) ** gamma * np.log(p),
        -(1 - alpha) * p**gamma * np.log1p(-p),
    )


def test_focal_loss_and_its_count_of_objects():
    logits = 3 * draw(3, 4, 5)
    target = np.array([[0, -1, 4, -1], [-1, -1, -1, -1], [1, 1, 1, 1]])
    known = np.array([True, True, False])
    expected = focal_reference(logits, target[..., None] == np.arange(5))[:2].sum()
    logits[2] = np.nan
    total, count, grad = value_and_grad(losses.focal_loss, logits, target, known)
    assert total == pytest.approx(expected, rel=1e-5)
    assert count == 2 + 1  # an empty known room counts 1
    assert np.all(np.isfinite(grad)) and np.all(grad[:2] != 0) and np.all(grad[2] == 0)


def test_focal_loss_of_extreme_logits_is_finite():
    logits = np.array([[[1e4, -1e4]]], np.float32)
    for target in (0, 1, -1):
        total, _, grad = value_and_grad(losses.focal_loss, logits, np.array([[target]]), True)
        assert np.isfinite(total) and np.all(np.isfinite(grad))


def box_reference(code, box):
    """The cost to the nearer code of the box; boxes_test.py has an oracle of the overlap."""

    def encoded(yaw, length, width):
        size = np.log([length, width, box[5]])
        return np.concatenate([box[:3], size, [np.sin(2 * yaw), np.cos(2 * yaw)]])

    def swapped(code):
        return np.concatenate([code[[0, 1, 2, 4, 3, 5]], -code[6:]])

    costs = []
    for target in (encoded(box[6], *box[3:5]), encoded(box[6] + np.pi / 2, *box[4:2:-1])):
        straight = np.cos(0.5 * np.arctan2(target[6], target[7])) ** 2
        overlap = straight * float(overlap_of(code, target))
        overlap += (1 - straight) * float(overlap_of(swapped(code), swapped(target)))
        costs.append(np.abs(code - target).sum() + 2.0 * (1 - overlap))
    return min(costs)


def test_box_loss_is_that_of_the_nearer_code():
    code, boxes = draw(3, 5, 8), draw_boxes(3, 5, seed=1)
    expected = sum(box_reference(code[i], boxes[i]) for i in np.ndindex(3, 5))
    total, count = losses.box_loss(code, boxes, True)
    assert float(total) == pytest.approx(expected, rel=1e-5)
    assert count == 15


def test_descent_on_the_box_loss_finds_the_box():
    target = draw_boxes(1)
    code = jnp.asarray(encode_boxes(target)) + draw(1, 8)
    step = jax.jit(jax.grad(lambda code: losses.box_loss(code, target, True)[0]))
    for i in range(300):
        code -= 0.1 * 0.98**i * step(code)
    np.testing.assert_allclose(decode_boxes(code), target, atol=0.02)


def detection_inputs():
    logits, code = draw(3, 6, 4), draw(3, 6, 8)
    boxes, labels = draw_boxes(3, 5, seed=1), draw_ids(4, 3, 5)
    labels[0, 3:], labels[1] = -1, -1
    return logits, code, boxes, labels


def test_detection_takes_the_cheapest_assignment():
    logits, code, boxes, labels = detection_inputs()
    classes, box, query = detect(logits, code, boxes, labels, True)
    focal, distance = 0.0, 0.0
    for s in range(3):
        real = np.flatnonzero(labels[s] >= 0)
        yes = focal_reference(logits[s], np.ones_like(logits[s], bool))
        no = focal_reference(logits[s], np.zeros_like(logits[s], bool))
        cost = np.array(
            [
                [box_reference(code[s, m], boxes[s, n]) + 2.0 * (yes - no)[m, labels[s, n]]
                 for m in range(6)]
                for n in real
            ]
        ).reshape(-1, 6)  # fmt: skip
        best = min(
            itertools.permutations(range(6), len(real)),
            key=lambda choice: sum(cost[i, m] for i, m in enumerate(choice)),
        )
        np.testing.assert_array_equal(np.asarray(query)[s, real], best)
        positive = np.zeros((6, 4), bool)
        for n, m in zip(real, best, strict=True):
            positive[m, labels[s, n]] = True
            distance += box_reference(code[s, m], boxes[s, n])
        focal += focal_reference(logits[s], positive).sum()
    np.testing.assert_allclose(classes, (focal, 3 + 1 + 5), rtol=1e-5)
    np.testing.assert_allclose(box, (distance, 8), rtol=1e-5)


def test_detection_ignores_unknown_scenes_and_padding():
    known = np.array([True, True, False])

    def total(predictions, boxes, labels):
        classes, box, _ = losses.detection(*predictions, boxes, labels, known)
        return totals.mean(classes) + totals.mean(box), (classes, box)

    grad = jax.jit(jax.grad(total, has_aux=True))
    for garbage in (np.nan, np.inf, 0.0):
        check_detection_ignores(garbage, grad, known)


def check_detection_ignores(garbage, grad, known):
    logits, code, boxes, labels = detection_inputs()
    expected, pairs = grad((logits, code), boxes, labels)
    spoiled = [spoil(x, known, garbage) for x in (logits, code)]
    boxes = spoil(boxes, known[:, None] & (labels >= 0), garbage)
    found, found_pairs = grad(tuple(spoiled), boxes, spoil(labels, known, np.nan))
    np.testing.assert_allclose(np.array(found_pairs), np.array(pairs), rtol=1e-6)
    for f, e in zip(found, expected, strict=True):
        np.testing.assert_allclose(f, e, rtol=1e-6, atol=1e-7)
        assert np.any(np.asarray(f[0]) != 0) and np.all(np.asarray(f[2]) == 0)


@pytest.mark.parametrize(("boxes", "known"), [(5, False), (0, True)])
def test_detection_without_any_box(boxes, known):
    logits, code, target, labels = detection_inputs()
    target, labels = target[:, :boxes], labels[:, :boxes]
    classes, box, query = detect(logits, code, target, labels, known)
    assert box == (0.0, 0.0)
    assert classes[1] == (3 if known else 0)
    assert (classes[0] > 0) == known
    assert np.all(np.asarray(query) == -1)


def test_take_matched_reorders_queries_to_boxes():
    value = draw(2, 4, 3)
    query = np.array([[2, 0, -1], [3, 1, 2]], np.int32)
    found = np.asarray(losses.take_matched(value, query))
    np.testing.assert_array_equal(found[0, :2], value[0, [2, 0]])
    np.testing.assert_array_equal(found[1], value[1, [3, 1, 2]])
