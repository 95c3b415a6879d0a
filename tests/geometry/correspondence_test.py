"""Correspondences and the terms built on them, against loops over patches in plain float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from geode_jax.geometry.correspondence import correspondences, gather_views, reprojection
from geode_jax.objectives import losses

GRID = (4, 5)
S, V, P, F = 2, 3, 20, 6


def rotation(axis, angle):
    axis = np.asarray(axis, np.float64) / np.linalg.norm(axis)
    cross = np.cross(np.eye(3), axis)
    return np.eye(3) - np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


@functools.cache
def scene():
    """Cameras around the origin that see a wavy wall with a step, by marching along the rays."""
    rng = np.random.default_rng(0)
    intrinsic = np.tile(np.array([[5.0, 0, 2.1], [0, 4.5, 1.4], [0, 0, 1]]), (S, V, 1, 1))
    extrinsic = np.zeros((S, V, 3, 4))
    for s, v in np.ndindex(S, V):
        extrinsic[s, v, :, :3] = rotation(rng.normal(size=3), 0.15)
        extrinsic[s, v, :, 3] = rng.normal(scale=0.25, size=3)
    depth, points = np.zeros((S, V, P)), np.zeros((S, V, P, 3))
    for s, v, p in np.ndindex(S, V, P):
        steps = np.linspace(0.5, 6.0, 2000)
        world = unproject(steps[:, None], p, extrinsic[s, v], intrinsic[s, v])
        wall = 3.0 + 0.3 * np.sin(world[:, 0]) - 1.2 * ((world[:, 0] > 0) & (world[:, 1] > 0))
        hit = np.argmax(world[:, 2] > wall)
        depth[s, v, p], points[s, v, p] = steps[hit], world[hit]
    return points, depth, extrinsic, intrinsic


def unproject(depth, p, extrinsic, intrinsic):
    ray = np.linalg.inv(intrinsic) @ (p % GRID[1], p // GRID[1], 1.0)
    return (depth * ray - extrinsic[:, 3]) @ extrinsic[:, :3]


def reference(points, mask, depth, extrinsic, intrinsic, tolerance):
    """index and mask by loops, and what became of every candidate pair."""
    index, found = np.zeros((S, V, V, P), int), np.zeros((S, V, V, P), bool)
    fates = dict.fromkeys(("unknown", "behind", "outside", "hidden", "kept"), 0)
    for s, a, b, p in np.ndindex(S, V, V, P):
        if a == b:
            continue
        x, y, z = extrinsic[s, b, :, :3] @ points[s, a, p] + extrinsic[s, b, :, 3]
        k = intrinsic[s, b]
        if not mask[s, a, p]:
            fates["unknown"] += 1
        elif not z > 1e-3:
            fates["behind"] += 1
        else:
            column = int(np.floor(k[0, 0] * x / z + k[0, 2] + 0.5))
            row = int(np.floor(k[1, 1] * y / z + k[1, 2] + 0.5))
            q = row * GRID[1] + column
            if not (0 <= column < GRID[1] and 0 <= row < GRID[0]):
                fates["outside"] += 1
            elif not (depth[s, b, q] > 0 and abs(z - depth[s, b, q]) <= tolerance * z):
                fates["hidden"] += 1
            else:
                fates["kept"] += 1
                index[s, a, b, p], found[s, a, b, p] = q, True
    return index, found, fates


find = jax.jit(correspondences, static_argnums=(5, 6))


@functools.cache
def pairs():
    """index, mask of the scene with all points known, as the losses take them."""
    points, depth, extrinsic, intrinsic = scene()
    return find(points, np.ones((S, V, P), bool), depth, extrinsic, intrinsic, GRID, 0.1)


@pytest.mark.parametrize("tolerance", [0.05, np.inf])
def test_correspondences_are_those_of_a_loop_over_patches(tolerance):
    points, depth, extrinsic, intrinsic = scene()
    rng = np.random.default_rng(1)
    mask = rng.random((S, V, P)) < 0.9
    depth = depth * (rng.random(depth.shape) < 0.95)  # some unknown
    points = points.copy()
    points[rng.random(points.shape[:3]) < 0.1] *= -1  # some behind the cameras
    index, found, fates = reference(points, mask, depth, extrinsic, intrinsic, tolerance)
    assert min(fates.values()) > 5, fates
    got_index, got_mask = find(points, mask, depth, extrinsic, intrinsic, GRID, tolerance)
    assert got_index.dtype == jnp.int32
    np.testing.assert_array_equal(got_mask, found)
    np.testing.assert_array_equal(got_index, index)


def test_the_same_camera_twice_maps_every_patch_to_itself():
    points, depth, extrinsic, intrinsic = scene()
    same = (array[:, [0, 0, 0]] for array in (points, np.ones((S, V, P), bool), depth, extrinsic))
    index, mask = find(*same, intrinsic, GRID, 0.01)
    other = ~np.eye(V, dtype=bool)
    np.testing.assert_array_equal(mask, np.broadcast_to(other[None, :, :, None], mask.shape))
    expected = np.where(mask, np.arange(P), 0)
    np.testing.assert_array_equal(index, expected)


@pytest.mark.parametrize("garbage", [np.nan, np.inf, 0.0])
def test_a_padding_view_has_no_pairs_and_disturbs_none(garbage):
    points, depth, extrinsic, intrinsic = (array.copy() for array in scene())
    index, mask = (np.array(array) for array in pairs())
    mask[:, 2], mask[:, :, 2] = False, False
    for array in (points, extrinsic, intrinsic):
        array[:, 2] = garbage
    depth[:, 2] = 0.0 if garbage == np.inf else garbage
    known = np.ones((S, V, P), bool)
    known[:, 2] = False
    got_index, got_mask = find(points, known, depth, extrinsic, intrinsic, GRID, 0.1)
    np.testing.assert_array_equal(got_mask, mask)
    np.testing.assert_array_equal(got_index, np.where(mask, index, 0))


def test_gather_views_reads_the_other_view():
    value = np.arange(S * V * P, dtype=np.float32).reshape(S, V, P)
    index = np.random.default_rng(0).integers(0, P, (S, V, V, P))
    s, _, b, _ = np.ogrid[:S, :V, :V, :P]
    np.testing.assert_array_equal(gather_views(value, index), value[s, b, index])


def test_reprojection_is_the_way_through_the_world():
    _, depth, extrinsic, intrinsic = scene()
    slope, offset = reprojection(extrinsic, intrinsic, GRID)
    moved = depth[:, :, None] * np.asarray(slope) + np.asarray(offset)[..., None]
    for s, a, b, p in list(np.ndindex(moved.shape))[::7]:
        world = unproject(depth[s, a, p], p, extrinsic[s, a], intrinsic[s, a])
        z = extrinsic[s, b, 2, :3] @ world + extrinsic[s, b, 2, 3]
        assert moved[s, a, b, p] == pytest.approx(z, abs=1e-5)


def cosine_reference(features, index, mask):
    cosines = []
    for s, a, b, p in np.argwhere(np.asarray(mask)):
        x, y = features[s, a, p], features[s, b, index[s, a, b, p]]
        cosines.append(x @ y / np.linalg.norm(x) / np.linalg.norm(y))
    return np.array(cosines)


def draw_features():
    return np.random.default_rng(3).normal(size=(S, V, P, F))


def test_cross_view_is_one_minus_cosine_and_its_literal_form_the_cosine():
    features, (index, mask) = draw_features(), pairs()
    cosine = cosine_reference(features, index, mask)
    assert len(cosine) > 50
    found = losses.cross_view(features, index, mask)
    np.testing.assert_allclose(found, ((1 - cosine).sum(), len(cosine)), rtol=1e-5)
    literal = losses.cross_view(features, index, mask, literal_sign=True)
    np.testing.assert_allclose(literal, (cosine.sum(), len(cosine)), rtol=1e-4)


def test_descent_on_cross_view_makes_views_agree_and_on_the_literal_form_disagree():
    features, (index, mask) = draw_features(), pairs()
    before = cosine_reference(features, index, mask).mean()
    for literal in (False, True):

        def total(x, literal=literal):
            return losses.cross_view(x, index, mask, literal_sign=literal)[0]

        grad = np.asarray(jax.jit(jax.grad(total))(features.astype(np.float32)))
        after = cosine_reference(features - 0.05 * grad, index, mask).mean()
        assert (before - after if literal else after - before) > 0.01


def test_cross_view_of_features_that_agree_is_zero():
    index, mask = pairs()
    features = np.broadcast_to(np.arange(1.0, F + 1), (S, V, P, F))
    total, count = losses.cross_view(features, index, mask)
    assert float(total) == pytest.approx(0.0, abs=1e-4)
    assert count > 50


def consistency_reference(depth, index, mask):
    _, _, extrinsic, intrinsic = scene()
    total = 0.0
    for s, a, b, p in np.argwhere(np.asarray(mask)):
        world = unproject(depth[s, a, p], p, extrinsic[s, a], intrinsic[s, a])
        z = extrinsic[s, b, 2, :3] @ world + extrinsic[s, b, 2, 3]
        total += (z - depth[s, b, index[s, a, b, p]]) ** 2
    return total


def consistency(depth, index, mask):
    _, _, extrinsic, intrinsic = scene()
    return losses.multi_view_consistency(depth, extrinsic, intrinsic, GRID, index, mask)


def test_multi_view_consistency_of_predicted_depths():
    index, mask = pairs()
    depth = scene()[1] + np.random.default_rng(5).normal(scale=0.2, size=(S, V, P))
    found = consistency(depth, index, mask)
    expected = consistency_reference(depth, index, mask)
    np.testing.assert_allclose(found, (expected, np.sum(mask)), rtol=1e-4)
    # True depths agree up to the size of a patch; both predictions of a pair are moved.
    assert consistency(scene()[1], index, mask)[0] < 0.5 * expected
    grad = jax.jit(jax.grad(lambda d: consistency(d, index, mask)[0]))(depth)
    step = 1e-4
    for s, v, p in ((0, 0, 7), (1, 2, 12)):
        nudge = np.zeros_like(depth)
        nudge[s, v, p] = step
        numeric = consistency_reference(depth + nudge, index, mask)
        numeric = (numeric - consistency_reference(depth - nudge, index, mask)) / (2 * step)
        assert float(grad[s, v, p]) == pytest.approx(numeric, rel=1e-3, abs=1e-4)


@functools.cache
def compiled(name):
    def cross_view(x, index, mask, extrinsic, intrinsic):
        return losses.cross_view(x, index, mask)

    def multi_view(x, index, mask, extrinsic, intrinsic):
        return losses.multi_view_consistency(x, extrinsic, intrinsic, GRID, index, mask)

    loss = {"cross_view": cross_view, "multi_view": multi_view}[name]
    return jax.jit(jax.value_and_grad(loss, has_aux=True))


@pytest.mark.parametrize("garbage", [np.nan, np.inf, 0.0])
@pytest.mark.parametrize("name", ["cross_view", "multi_view"])
def test_unpaired_cells_and_padding_views_change_nothing(name, garbage):
    _, depth, extrinsic, intrinsic = (array.astype(np.float32) for array in scene())
    student = draw_features().astype(np.float32) if name == "cross_view" else depth
    index, mask = (np.array(array) for array in pairs())
    mask[:, 2], mask[:, :, 2] = False, False
    mask[..., 3] = False
    used = mask.any(axis=2)
    for s, a, b, p in np.argwhere(mask):
        used[s, b, index[s, a, b, p]] = True
    assert used.any() and not used[:, :2].all() and not used[:, 2].any()
    expected, expected_grad = compiled(name)(student, index, mask, extrinsic, intrinsic)
    student = student.copy()
    student[~used] = garbage
    extrinsic[:, 2], intrinsic[:, 2] = garbage, garbage
    found, grad = compiled(name)(student, index, mask, extrinsic, intrinsic)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    np.testing.assert_allclose(grad, expected_grad, rtol=1e-5, atol=1e-7)
    assert np.all(np.asarray(grad)[~used] == 0) and np.any(np.asarray(grad)[used] != 0)
    nothing, grad = compiled(name)(student, index, np.zeros_like(mask), extrinsic, intrinsic)
    assert nothing == (0.0, 0.0)
    np.testing.assert_array_equal(grad, 0.0)


def test_cross_view_of_a_zero_feature_has_a_finite_gradient():
    features, (index, mask) = draw_features(), pairs()
    features[:, 0] = 0.0
    grad = jax.jit(jax.grad(lambda x: losses.cross_view(x, index, mask)[0]))(features)
    assert np.all(np.isfinite(grad))
