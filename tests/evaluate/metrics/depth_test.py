import math

import numpy as np
import pytest

from geode_jax.evaluate.metrics.depth import DepthMetrics


def test_by_hand_over_two_batches():
    metrics = DepthMetrics()
    metrics.update([[1.0, 2.0]], [[1.0, 4.0]])
    metrics.update([5.0], [4.0])
    assert metrics.pixels == 3
    found = metrics.result()
    assert found["depth_rmse"] == pytest.approx(np.sqrt((0 + 4 + 1) / 3))
    assert found["depth_mae"] == pytest.approx(1.0)
    # 5/4 is exactly 1.25, which is not below it.
    assert found["depth_delta1"] == pytest.approx(1 / 3)


def test_batches_do_not_matter():
    rng = np.random.default_rng(0)
    target = rng.uniform(0.5, 5.0, (6, 8, 8)).astype(np.float32)
    prediction = target * rng.uniform(0.7, 1.4, target.shape).astype(np.float32)
    whole, parts = DepthMetrics(), DepthMetrics()
    whole.update(prediction, target)
    for cut in (slice(0, 1), slice(1, 5), slice(5, 6)):
        parts.update(prediction[cut], target[cut])
    assert parts.result() == pytest.approx(whole.result())
    ratio = np.maximum(prediction / target, target / prediction)
    assert whole.result()["depth_delta1"] == pytest.approx(np.mean(ratio < 1.25))
    error = prediction.astype(np.float64) - target
    assert whole.result()["depth_rmse"] == pytest.approx(np.sqrt(np.mean(error**2)))


def test_unknown_pixels_are_left_out():
    metrics = DepthMetrics()
    target = np.array([0.0, np.nan, np.inf, -1.0, 2.0, 2.0])
    metrics.update(np.full(6, 3.0), target, mask=[True] * 5 + [False])
    assert metrics.pixels == 1
    assert metrics.result()["depth_mae"] == pytest.approx(1.0)


def test_no_valid_pixel_gives_no_key():
    metrics = DepthMetrics()
    metrics.update(np.ones(3), np.zeros(3))
    assert metrics.result() == {}


def test_predictions_that_are_no_depth_fail():
    metrics = DepthMetrics()
    metrics.update([-2.0, 0.0], [2.0, 2.0])
    assert metrics.result()["depth_delta1"] == 0.0
    metrics.update([np.nan], [2.0])
    assert np.isnan(metrics.result()["depth_rmse"])


def eigen(prediction, target):
    """Eigen et al. 2014, Sec. 4.2 (1406.2283): linear RMSE and the share of delta < 1.25."""
    pairs = [
        (float(p), float(t))
        for p, t in zip(np.ravel(prediction), np.ravel(target), strict=True)
        if math.isfinite(t) and t > 0
    ]
    rmse = math.sqrt(math.fsum((p - t) ** 2 for p, t in pairs) / len(pairs))
    mae = math.fsum(abs(p - t) for p, t in pairs) / len(pairs)
    ratios = [max(p / t, t / p) if p > 0 else math.inf for p, t in pairs]
    return {
        "depth_rmse": rmse,
        "depth_mae": mae,
        "depth_delta1": sum(ratio < 1.25 for ratio in ratios) / len(pairs),
    }


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_odd_depths_against_the_definitions_of_eigen_et_al(dtype):
    """Zeros, huge and tiny numbers on both sides, and ratios on either side of 1.25."""
    kind = np.finfo(dtype)
    tiny, huge = max(float(kind.smallest_subnormal), 1e-45), min(float(kind.max), 1e100)
    odd = np.array([0, tiny, 1e-3, 0.8, 1, 1.2499, 1.25, 1.2501, 5, 1e4, huge], dtype)
    prediction, target = np.meshgrid(np.concatenate([odd, -odd]), odd)
    metrics = DepthMetrics()
    metrics.update(prediction, target)
    assert metrics.result() == pytest.approx(eigen(prediction, target), rel=1e-12)


def test_what_no_number_can_hold_is_infinite_without_a_warning():
    metrics = DepthMetrics()
    metrics.update([1e308, np.inf, 2.0], [1.0, 1e308, 2.0])
    assert metrics.result()["depth_rmse"] == np.inf
    assert metrics.result()["depth_delta1"] == pytest.approx(1 / 3)


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"prediction \(2,\) but target \(2, 1\)"):
        DepthMetrics().update(np.ones(2), np.ones((2, 1)))
