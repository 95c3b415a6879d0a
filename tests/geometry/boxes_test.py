"""The box codes, what losses make of them, and the overlap of boxes.

The overlap against interval arithmetic in float64.
"""

import jax
import numpy as np
import pytest

from geode_jax.geometry.boxes import decode_boxes, encode_boxes, generalized_iou, other_code
from geode_jax.objectives import losses
from geode_jax.objectives.geode import box_regression


def draw_boxes(*shape, seed=0):
    rng = np.random.default_rng([seed, *shape])
    parts = [rng.normal(size=(*shape, 3)), rng.uniform(0.2, 2.0, (*shape, 3))]
    return np.concatenate([*parts, rng.uniform(-0.75, 0.75, (*shape, 1))], -1).astype(np.float32)


def iou_reference(a, b):
    """Generalized IoU of two yaw-less boxes [6] by interval arithmetic in float64."""
    inner, outer = 1.0, 1.0
    for i in range(3):
        low, high = [x[i] - x[3 + i] / 2 for x in (a, b)], [x[i] + x[3 + i] / 2 for x in (a, b)]
        inner *= max(0.0, min(high) - max(low))
        outer *= max(high) - min(low)
    union = np.prod(a[3:6]) + np.prod(b[3:6]) - inner
    return inner / union - (outer - union) / outer


def corners(boxes):
    """The corners [..., 8, 3] of boxes [..., 7]."""
    sides = np.stack(np.meshgrid(*[[-0.5, 0.5]] * 3, indexing="ij"), -1).reshape(8, 3)
    local = sides * boxes[..., None, 3:6]
    cos, sin = np.cos(boxes[..., None, 6]), np.sin(boxes[..., None, 6])
    x = cos * local[..., 0] - sin * local[..., 1]
    y = sin * local[..., 0] + cos * local[..., 1]
    return np.stack([x, y, local[..., 2]], -1) + boxes[..., None, :3]


def assert_same_corners(a, b):
    distance = np.linalg.norm(corners(a)[..., :, None, :] - corners(b)[..., None, :, :], axis=-1)
    assert np.all(distance.min(-1) < 1e-5) and np.all(distance.min(-2) < 1e-5)


def test_box_code_round_trip_within_an_eighth_turn():
    boxes = draw_boxes(20)
    np.testing.assert_allclose(decode_boxes(encode_boxes(boxes)), boxes, atol=2e-6)


@pytest.mark.parametrize("quarters", [-2, -1, 1, 2, 3])
def test_every_name_of_a_box_has_one_code_and_decodes_to_the_same_corners(quarters):
    boxes = draw_boxes(20)
    turned = boxes + np.float32([0, 0, 0, 0, 0, 0, quarters * np.pi / 2])
    if quarters % 2:
        turned[:, [3, 4]] = turned[:, [4, 3]]
    assert_same_corners(turned, boxes)
    code = encode_boxes(turned)
    np.testing.assert_allclose(code, encode_boxes(boxes), atol=4e-6)
    assert_same_corners(np.asarray(decode_boxes(code)), boxes)


def names(boxes):
    """The four names [4, ...] of boxes."""
    turned = boxes.copy()
    turned[..., 3], turned[..., 4] = boxes[..., 4], boxes[..., 3]
    turned[..., 6] += np.float32(np.pi / 2)
    half = np.float32([0, 0, 0, 0, 0, 0, np.pi])
    return np.stack([boxes, boxes + half, turned, turned - half])


def test_both_codes_are_of_the_same_box():
    boxes = draw_boxes(20)
    code = encode_boxes(boxes)
    assert_same_corners(np.asarray(decode_boxes(other_code(code))), boxes)
    np.testing.assert_array_equal(other_code(other_code(code)), code)


# Each with what its value is turned into, and how fast that changes at most as the true box turns
# by a radian: sine and cosine of the doubled angle move by 2 together and by the root of 8 in
# sum, the squared cosine of the angle, which weighs two overlaps of weight 2 in [-1, 1], by 1.
BOX_LOSSES = {
    "detection": (losses.box_loss, lambda x: x, 8**0.5 + 4),
    "regression": (box_regression, np.sqrt, 2.0),
    "named objects": (losses.huber_box, lambda x: x, 8**0.5),
}
box_losses = pytest.mark.parametrize(
    ("loss", "grown", "slope"), BOX_LOSSES.values(), ids=BOX_LOSSES.keys()
)


def each(loss):
    """The loss of every pair of a code and a box, and its gradient in the code."""

    def one(code, box):
        return loss(code[None], box[None], np.array([True]))[0]

    return jax.jit(jax.vmap(jax.value_and_grad(one)))


@box_losses
def test_a_box_loss_is_zero_at_every_name_and_code_of_the_truth(loss, grown, slope):
    boxes = draw_boxes(60)
    boxes[:20, 6] += np.float32(np.pi / 4)
    code = np.asarray(encode_boxes(boxes))
    predicted = np.asarray(encode_boxes(draw_boxes(60, seed=1))) + 0.1
    of = each(loss)
    expected = np.asarray(of(predicted, boxes)[0])
    for name in names(boxes):
        for own in (code, np.asarray(other_code(code))):
            value, gradient = of(own, name)
            np.testing.assert_allclose(value, 0.0, atol=1e-5)
            assert np.all(np.isfinite(gradient))
        np.testing.assert_allclose(of(predicted, name)[0], expected, rtol=1e-4)
        np.testing.assert_allclose(of(other_code(predicted), name)[0], expected, rtol=1e-4)


@box_losses
def test_a_box_loss_is_continuous_as_the_true_box_turns(loss, grown, slope):
    """All the way round in steps of a degree, and in tiny ones over 45, 90 and 180 degrees."""
    of = each(loss)
    boxes = draw_boxes(40)
    wild = np.asarray(encode_boxes(draw_boxes(40, seed=1))) + draw_boxes(40, 8, seed=2)[..., 0]
    for predicted in (wild.astype(np.float32), np.asarray(encode_boxes(boxes))):
        yaws = [np.radians(np.arange(-180.0, 361.0))]
        yaws += [np.radians(y + 0.01 * np.arange(-3, 4)) for y in (-45, 45, 90, 135, 180, 225, 315)]
        for yaw in yaws:
            turned = np.repeat(boxes[:, None], len(yaw), axis=1)
            turned[..., 6] = yaw
            codes = np.repeat(predicted[:, None], len(yaw), axis=1)
            value, gradient = of(codes.reshape(-1, 8), turned.reshape(-1, 7))
            value = grown(np.asarray(value, np.float64)).reshape(40, -1)
            step = np.abs(np.diff(value, axis=1))
            assert np.all(step <= slope * (yaw[1] - yaw[0]) * 1.01 + 1e-4), step.max()
            assert np.all(np.isfinite(gradient))


@box_losses
def test_a_degree_over_45_costs_less_than_a_metre(loss, grown, slope):
    before, after = np.float32([[1, 2, 0.5, 2.0, 0.5, 1.0, np.radians(y)] for y in (44.5, 45.5)])
    moved = before + np.float32([1, 0, 0, 0, 0, 0, 0])
    (turn, shift), _ = each(loss)(
        np.asarray(encode_boxes(np.stack([after, moved]))), np.stack([before, before])
    )
    assert turn < 0.06 and shift >= 0.5


def test_a_query_is_matched_by_either_code_of_its_box():
    box = np.float32([[1, 2, 0.5, 2.0, 0.5, 1.0, 0.3]])
    code = np.asarray(encode_boxes(box))
    shifted = code + np.float32([0.2, 0, 0, 0, 0, 0, 0, 0])
    queries = np.concatenate([shifted, np.asarray(other_code(code)), shifted])
    logits = np.zeros((1, 3, 2), np.float32)
    found = losses.detection(
        logits, queries[None], box[None], np.zeros((1, 1), int), np.array([True])
    )
    assert found.query_SN.tolist() == [[1]]
    np.testing.assert_allclose(found.boxes, (0.0, 1.0), atol=1e-5)


def test_generalized_iou():
    a, b = draw_boxes(30), draw_boxes(30, seed=1)
    expected = [iou_reference(*pair) for pair in np.stack([a, b], 1).astype(np.float64)]
    found = np.asarray(generalized_iou(encode_boxes(a), encode_boxes(b)))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert found.min() < 0 < found.max()
    np.testing.assert_allclose(generalized_iou(encode_boxes(a), encode_boxes(a)), 1.0, atol=1e-5)


def test_overlap_and_sizes_of_wild_predictions_are_finite():
    wild = np.float32([[0, 0, 0, 90, 90, 90, 0, 1], [1e3, 0, 0, -90, -90, -90, 0, 0]])
    assert np.all(np.isfinite(generalized_iou(wild, wild[::-1])))
    assert np.all(np.isfinite(decode_boxes(wild)))
    assert np.all(np.asarray(decode_boxes(wild))[:, 3:6] > 0)
