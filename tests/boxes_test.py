"""The box code and the overlap of boxes, against interval arithmetic in float64."""

import numpy as np

from geode_jax.boxes import decode_boxes, encode_boxes, generalized_iou


def draw_boxes(*shape, seed=0):
    rng = np.random.default_rng([seed, *shape])
    parts = [rng.normal(size=(*shape, 3)), rng.uniform(0.2, 2.0, (*shape, 3))]
    return np.concatenate([*parts, rng.uniform(-1.5, 1.5, (*shape, 1))], -1).astype(np.float32)


def iou_reference(a, b):
    """Generalized IoU of two yaw-less boxes [6] by interval arithmetic in float64."""
    inner, outer = 1.0, 1.0
    for i in range(3):
        low, high = [x[i] - x[3 + i] / 2 for x in (a, b)], [x[i] + x[3 + i] / 2 for x in (a, b)]
        inner *= max(0.0, min(high) - max(low))
        outer *= max(high) - min(low)
    union = np.prod(a[3:6]) + np.prod(b[3:6]) - inner
    return inner / union - (outer - union) / outer


def test_box_code_round_trip_and_half_turns():
    boxes = draw_boxes(20)
    np.testing.assert_allclose(decode_boxes(encode_boxes(boxes)), boxes, atol=2e-6)
    turned = boxes + np.float32([0, 0, 0, 0, 0, 0, np.pi])
    np.testing.assert_allclose(encode_boxes(turned), encode_boxes(boxes), atol=2e-6)


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
