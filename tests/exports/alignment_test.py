"""Alignment of a reconstruction to a metric world, against worlds whose similarity is known."""

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from geode_jax.exports import alignment
from geode_jax.exports.frames import Similarity


def extrinsic(rotation, centres):
    """Camera-from-world poses [V, 3, 4] of cameras at the centres."""
    return np.concatenate([rotation, -rotation @ centres[:, :, None]], -1)


def world(seed: int, views: int, spread: float = 1.0):
    """Metric poses and depths, the same in a random similar world, and the map back."""
    random = np.random.default_rng(seed)
    turn = Rotation.random(random_state=random).as_matrix()
    scale = float(np.exp(random.uniform(-2, 2)))
    back = Similarity(turn, scale, random.normal(scale=3, size=3))
    rotation = Rotation.random(views, random_state=random).as_matrix()
    centres = random.normal(size=(views, 3)) * spread + random.normal(scale=3, size=3)
    # The inverse map by hand: x = R^T (y - b) / s.
    estimated = extrinsic(rotation @ turn, (centres - back.translation) @ turn / scale)
    depth = random.uniform(1, 4, (views, 6, 8))
    return random, extrinsic(rotation, centres), depth, estimated, depth / scale, back


def close(found: Similarity, true: Similarity, at, metres: float, degrees: float):
    """Whether both take points of the moving world near `at` to the same places."""
    angle = Rotation.from_matrix(found.rotation @ true.rotation.T).magnitude()
    assert np.degrees(angle) < degrees
    assert np.linalg.norm(found.points(at) - true.points(at), axis=-1).max() < metres


def centres_of(pose):
    return -np.einsum("vji,vj->vi", pose[:, :, :3], pose[:, :, 3])


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("views", "spread"), [(1, 1.0), (2, 1.0), (3, 1.0), (20, 1.0), (12, 0.01)])
def test_a_similar_world_comes_back_exactly(seed, views, spread):
    _, metric, depth, estimated, units, back = world(seed, views, spread)
    depth[:, 0, 0] = 0  # unknown
    found = alignment.align(estimated, metric, depth=units, metric_depth=depth)
    assert found.method == ("cameras" if views >= 3 and spread == 1.0 else "depth")
    close(found.similarity, back, centres_of(estimated), 1e-9, 1e-6)
    assert found.fitted.all() and found.residuals()["residual_m"] < 1e-9
    moved = found.similarity.extrinsic(estimated)
    np.testing.assert_allclose(moved, metric, atol=1e-9)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("spread", [1.0, 0.01])
def test_a_tenth_of_wrong_cameras_and_depths_does_not_move_it(seed, spread):
    random, metric, depth, estimated, units, back = world(seed, 20, spread)
    wrong = random.choice(20, 2, replace=False)
    estimated[wrong] = extrinsic(
        Rotation.random(2, random_state=random).as_matrix(), random.normal(scale=5, size=(2, 3))
    )
    bad = random.random(units.shape) < 0.1
    units = np.where(bad, random.uniform(0.01, 100, units.shape), units)
    found = alignment.align(estimated, metric, depth=units, metric_depth=depth)
    right = np.delete(np.arange(20), wrong)
    assert not found.fitted[wrong].any() and found.fitted[right].all()
    close(found.similarity, back, centres_of(estimated)[right], 1e-6, 1e-5)
    assert found.residuals()["residual_m"] < 1e-6
    assert found.displacements[wrong].min() > 0.1


@pytest.mark.parametrize("seed", range(4))
def test_noise_is_averaged_and_measured(seed):
    """Centres 2 cm and 1 degree off: the map is better than any one camera is."""
    random, metric, depth, estimated, units, back = world(seed, 40)
    noise = Rotation.from_rotvec(random.normal(scale=np.radians(1) / 3**0.5, size=(40, 3)))
    centres = centres_of(estimated) + random.normal(scale=0.02 / 3**0.5 / back.scale, size=(40, 3))
    noisy = extrinsic(noise.as_matrix() @ estimated[:, :, :3], centres)
    found = alignment.align(noisy, metric, depth=units, metric_depth=depth)
    close(found.similarity, back, centres_of(estimated), 0.02, 0.4)
    residuals = found.residuals()
    assert 0.01 < residuals["centres_m"] < 0.03 and 0.5 < residuals["rotations_deg"] < 1.5
    # What the largest of the three displaces at the median depth, by hand.
    arc = np.radians(found.rotations_deg) * np.median(depth)
    each = np.maximum(np.maximum(found.centres_m, arc), found.depth_relative * np.median(depth))
    assert residuals["residual_m"] == pytest.approx(np.median(each))


def test_cameras_in_a_line_turn_by_their_orientations():
    """Centres alone leave the turn about the line open."""
    _, metric, _, estimated, _, back = world(0, 6)
    line = np.arange(6.0)[:, None] * [0.3, 0.1, 0]
    metric = extrinsic(metric[:, :, :3], line)
    moved = (line - back.translation) @ back.rotation / back.scale
    estimated = extrinsic(estimated[:, :, :3], moved)
    found = alignment.align(estimated, metric)
    assert found.method == "cameras" and "depth_relative" not in found.residuals()
    close(found.similarity, back, moved, 1e-9, 1e-6)


def test_depths_count_by_their_confidence():
    _, metric, depth, estimated, units, back = world(0, 2)
    units[:, :4] *= 1.7  # two thirds of the pixels
    sure = np.ones_like(units)
    sure[:, :4] = 0.1
    found = alignment.align(estimated, metric, depth=units, confidence=sure, metric_depth=depth)
    assert found.similarity.scale == pytest.approx(back.scale)
    without = alignment.align(estimated, metric, depth=units, metric_depth=depth)
    assert without.similarity.scale == pytest.approx(back.scale / 1.7)


def test_random_geometry_does_not_fit_and_is_measured_so():
    random, metric, depth, _, _, _ = world(0, 10)
    other = extrinsic(
        Rotation.random(10, random_state=random).as_matrix(), random.normal(size=(10, 3))
    )
    units = random.uniform(0.1, 10, depth.shape)
    found = alignment.align(other, metric, depth=units, metric_depth=depth)
    assert found.residuals()["residual_m"] > 0.5


@pytest.mark.parametrize("views", [2, 6])
def test_nothing_that_gives_a_scale_is_an_error(views):
    _, metric, _, estimated, units, _ = world(0, views, spread=0.01)
    with pytest.raises(alignment.AlignmentError, match="nothing gives the scale"):
        alignment.align(estimated, metric, depth=units, metric_depth=np.zeros_like(units))


def test_weighted_least_squares_equal_an_independent_solution():
    """Against scipy's rotation of weighted vectors (Kabsch) and the scale of its residual."""
    random = np.random.default_rng(0)
    moving, fixed = random.normal(size=(2, 30, 3))
    weight = random.uniform(0.1, 1, 30)
    found = alignment.fit_similarity(moving, fixed, weight)
    m = moving - weight @ moving / weight.sum()
    f = fixed - weight @ fixed / weight.sum()
    rotation, _ = Rotation.align_vectors(f, m, weights=weight)
    np.testing.assert_allclose(found.rotation, rotation.as_matrix(), atol=1e-6)
    turned = rotation.apply(m)
    scale = (weight @ (turned * f).sum(-1)) / (weight @ (m**2).sum(-1))
    assert found.scale == pytest.approx(scale)
