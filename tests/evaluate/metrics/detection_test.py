"""IoU of oriented boxes against a Monte Carlo volume, matching against cases worked by hand."""

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geode_jax.evaluate.metrics.detection import DetectionMetrics, average_precision, oriented_iou

coordinate = st.floats(-1.0, 1.0)
size = st.floats(0.05, 3.0)
boxes = st.tuples(
    coordinate, coordinate, coordinate, size, size, size, st.floats(-4.0, 4.0)
).map(np.array)  # fmt: skip


def box(x=0.0, y=0.0, z=0.0, sx=1.0, sy=1.0, sz=1.0, yaw=0.0):
    return np.array([x, y, z, sx, sy, sz, yaw])


def iou(a, b):
    return float(oriented_iou(a[None], b[None])[0, 0])


def contains(points, one):
    offset = points - one[:3]
    cos, sin = np.cos(one[6]), np.sin(one[6])
    x = cos * offset[:, 0] + sin * offset[:, 1]
    y = -sin * offset[:, 0] + cos * offset[:, 1]
    local = np.stack([x, y, offset[:, 2]], axis=1)
    return np.all(np.abs(local) <= one[3:6] / 2, axis=1)


def test_monte_carlo():
    rng = np.random.default_rng(0)
    centres, sizes = rng.uniform(-0.5, 0.5, (6, 3)), rng.uniform(0.4, 1.6, (6, 3))
    a = np.concatenate([centres, sizes, rng.uniform(-4, 4, (6, 1))], axis=1)
    b = a + rng.normal(0, 0.15, a.shape)
    cube = rng.uniform(-0.5, 0.5, (40_000, 3))
    expected = np.zeros((6, 6))
    for i, j in np.ndindex(6, 6):
        cos, sin = np.cos(a[i, 6]), np.sin(a[i, 6])
        turn = np.array([[cos, -sin, 0.0], [sin, cos, 0.0], [0.0, 0.0, 1.0]])
        points = (cube * sizes[i]) @ turn.T + centres[i]
        shared = np.prod(sizes[i]) * contains(points, b[j]).mean()
        expected[i, j] = shared / (np.prod(sizes[i]) + np.prod(b[j, 3:6]) - shared)
    assert (expected > 0.1).sum() > 12  # a test of overlaps, not of misses
    np.testing.assert_allclose(oriented_iou(a, b), expected, atol=0.01)


def test_by_hand():
    assert iou(box(), box()) == pytest.approx(1.0)
    assert iou(box(), box(x=0.5)) == pytest.approx(0.5 / 1.5)
    assert iou(box(), box(z=0.5)) == pytest.approx(0.5 / 1.5)
    assert iou(box(), box(x=1.0)) == 0.0
    assert iou(box(), box(x=5.0)) == 0.0
    assert iou(box(sx=2.0, sy=2.0, sz=2.0), box(yaw=0.7)) == pytest.approx(1 / 8)
    # Two unit squares at 45 degrees share a regular octagon of area 2 (sqrt 2 - 1).
    octagon = 2 * (np.sqrt(2) - 1)
    assert iou(box(), box(yaw=np.pi / 4)) == pytest.approx(octagon / (2 - octagon))
    # A quarter turn swaps the two sizes.
    assert iou(box(sx=2.0), box(sy=2.0, yaw=np.pi / 2)) == pytest.approx(1.0)


def test_a_box_without_volume_overlaps_nothing():
    flat = box(sz=0.0)
    assert iou(flat, flat) == 0.0
    assert iou(flat, box()) == 0.0


@settings(max_examples=150, deadline=None)
@given(boxes, boxes)
def test_iou_is_symmetric_and_in_the_unit_interval(a, b):
    found = iou(a, b)
    assert 0.0 <= found <= 1.0
    assert iou(b, a) == pytest.approx(found, abs=1e-9)


@settings(max_examples=100, deadline=None)
@given(boxes, boxes, st.floats(-4.0, 4.0), st.tuples(coordinate, coordinate, coordinate))
def test_iou_does_not_depend_on_the_frame(a, b, turn, shift):
    def moved(one):
        x, y, z = one[:3]
        cos, sin = np.cos(turn), np.sin(turn)
        centre = np.array([cos * x - sin * y, sin * x + cos * y, z]) + 100.0 * np.array(shift)
        return np.concatenate([centre, one[3:6], [one[6] + turn]])

    assert iou(moved(a), moved(b)) == pytest.approx(iou(a, b), abs=1e-8)
    assert iou(a, a) == pytest.approx(1.0)


def test_average_precision_by_hand():
    # Ranks 1 and 3 are right, 3 boxes: precision 1 up to recall 1/3, then 2/3 up to 2/3.
    assert average_precision(np.array([True, False, True]), 3) == pytest.approx((1 + 2 / 3) / 3)
    assert average_precision(np.array([], bool), 2) == 0.0
    # The envelope: precision may not rise with recall.
    assert average_precision(np.array([False, True, True]), 2) == pytest.approx(2 / 3)


def test_scores_by_hand():
    metrics = DetectionMetrics(score_threshold=0.5)
    # Scene 1: class 0 found twice (the second claim is false), class 1 missed for its class.
    metrics.update(
        np.stack([box(), box(x=0.1), box(x=5.0)]),
        [0, 0, 0],
        [0.9, 0.8, 0.7],
        np.stack([box(), box(x=5.0), box(x=99.0)]),
        [0, 1, -1],
    )
    # Scene 2: class 1 found with IoU 1/3 and a low score.
    metrics.update(box(x=0.5)[None], [1], [0.3], box()[None], [1])
    found = metrics.result()
    assert found["detection_precision_25"] == pytest.approx(1 / 3)
    assert found["detection_recall_25"] == pytest.approx(1 / 3)
    assert found["detection_f1_25"] == pytest.approx(1 / 3)
    # Class 0: AP 1 (its first claim is right, there is one box). Class 1: 1 of 2 boxes at 0.25.
    assert found["detection_map_25"] == pytest.approx((1.0 + 0.5) / 2)
    assert found["detection_map_50"] == pytest.approx((1.0 + 0.0) / 2)


def test_boxes_are_matched_in_their_own_scene():
    metrics = DetectionMetrics()
    metrics.update(box()[None], [0], [0.9], box(x=9.0)[None], [0])
    metrics.update(box(x=9.0)[None], [0], [0.9], box()[None], [0])
    assert metrics.result()["detection_f1_25"] == 0.0


def test_edge_cases():
    assert DetectionMetrics().result() == {}
    metrics = DetectionMetrics()
    metrics.update(np.zeros((0, 7)), [], [], np.zeros((0, 7)), [])
    assert metrics.result() == {}
    metrics.update(np.zeros((0, 7)), [], [], box()[None], [2])
    metrics.update(box(sx=-1.0, sy=-1.0)[None], [2], [0.9], np.zeros((0, 7)), [])
    found = metrics.result()
    assert found["detection_f1_50"] == found["detection_map_50"] == 0.0


def test_infinite_and_huge_boxes_have_their_right_iou_without_a_warning():
    unit = [0, 0, 0, 1, 1, 1, 0]
    huge = [0, 0, 0, 1e200, 1e200, 1e200, 0]
    half = [0, 0, 0, 1e200, 1e200, 0.5e200, 0]
    tiny = [0, 0, 0, 1e-200, 1e-200, 1e-200, 0]
    far = [1e300, 0, 0, 1, 1, 1, 0]
    bad = [[*unit[:i], x, *unit[i + 1 :]] for i in range(7) for x in (np.inf, -np.inf, np.nan)]
    boxes = np.array([unit, huge, half, tiny, far, [*huge[:3], *[1.7e308] * 3, 0], *bad])
    with warnings.catch_warnings(), np.errstate(over="raise", invalid="raise", divide="raise"):
        warnings.simplefilter("error")
        iou = oriented_iou(boxes, boxes)
        metrics = DetectionMetrics()
        metrics.update(boxes[[5, 1, 0]], [0, 0, 0], [0.9, 0.8, 0.7], boxes[:2], [0, 0])
        scores = metrics.result()
    expected = np.zeros_like(iou)
    expected[:5, :5] = np.eye(5)
    expected[1, 2] = expected[2, 1] = 0.5
    np.testing.assert_allclose(iou, expected, atol=1e-12)
    assert (scores["detection_recall_25"], scores["detection_precision_25"]) == (1.0, 2 / 3)


def test_thin_boxes():
    """Two walls that cross share next to nothing, and a wall is itself however thin."""
    for thickness in (1e-3, 1e-9, 1e-100):
        wall = box(sx=2.0, sy=thickness, yaw=0.3)
        crossing = box(x=0.1, sx=thickness, sy=2.0, yaw=0.5)
        assert iou(wall, wall) == pytest.approx(1.0)
        assert iou(wall, crossing) == pytest.approx(0.0, abs=thickness)


def test_a_negative_size_has_no_volume():
    assert iou(box(sx=-1.0, sy=-1.0), box()) == 0.0
    assert iou(box(), box(sz=-1.0)) == 0.0
