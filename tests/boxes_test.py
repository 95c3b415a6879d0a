"""The box code and the overlap of boxes, against interval arithmetic in float64."""

import numpy as np
import pytest

from geode_jax.boxes import decode_boxes, encode_boxes, generalized_iou


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
