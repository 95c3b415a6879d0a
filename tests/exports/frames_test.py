"""The transformation to Sonata's frame, against the definition of that frame."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geode_jax.exports.frames import ROOM_HEIGHT, Y_DOWN, Similarity, to_sonata_frame


def cloud(seed=0, n=500):
    """Returns points of a box, 4 x 3 wide and 2.5 high, in VGGT's frame: y down, off centre."""
    rng = np.random.default_rng(seed)
    return rng.uniform([-1, -2, 3], [3, 0.5, 6], (n, 3))


def random_pose(rng):
    q, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    return np.concatenate([q * np.linalg.det(q), rng.normal(size=(3, 1))], axis=1)


def test_a_cloud_becomes_metres_z_up_centred_with_its_floor_at_zero():
    points = cloud()
    out = to_sonata_frame(points, outliers=0).points(points)
    low, high = out.min(0), out.max(0)
    np.testing.assert_allclose(low[:2], -high[:2], atol=1e-12)
    np.testing.assert_allclose([low[2], high[2]], [0, ROOM_HEIGHT], atol=1e-12)
    # Up is -y: the point with the largest y lies on the floor.
    assert out[points[:, 1].argmax(), 2] == pytest.approx(0, abs=1e-12)


def test_a_known_scale_is_kept():
    points = cloud()
    out = to_sonata_frame(points, metres_per_unit=1.0).points(points)
    apart = np.linalg.norm(points[:-1] - points[1:], axis=1)
    np.testing.assert_allclose(np.linalg.norm(out[:-1] - out[1:], axis=1), apart)


def test_a_frame_that_is_right_already_only_moves():
    points = cloud()
    similarity = to_sonata_frame(points, up=(0, 0, 2), metres_per_unit=1.0)
    np.testing.assert_array_equal(similarity.rotation, np.eye(3))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-1, 1), min_size=3, max_size=3).filter(lambda v: np.dot(v, v) > 1e-3))
def test_up_becomes_z(up):
    rotation = to_sonata_frame(cloud(), up=tuple(up)).rotation
    np.testing.assert_allclose(rotation @ up / np.linalg.norm(up), [0, 0, 1], atol=1e-6)
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-6)
    assert np.linalg.det(rotation) == pytest.approx(1, abs=1e-6)


def test_straight_down_is_a_half_turn():
    rotation = to_sonata_frame(cloud(), up=(0, 0, -1)).rotation
    np.testing.assert_array_equal(rotation @ [0, 0, -1], [0, 0, 1])
    assert np.linalg.det(rotation) == 1


def test_outliers_move_nothing():
    points = cloud(n=1000)
    far = np.concatenate([points, [[100, 100, 100], [-100, -100, -100]]])
    a, b = to_sonata_frame(points), to_sonata_frame(far)
    np.testing.assert_allclose(a.scale, b.scale, rtol=0.02)
    np.testing.assert_allclose(a.translation, b.translation, atol=0.1)


def test_cameras_see_what_they_saw_in_metres():
    rng = np.random.default_rng(1)
    points, poses = cloud(1), np.stack([random_pose(rng) for _ in range(3)])
    similarity = to_sonata_frame(points)
    before = np.einsum("vij,nj->vni", poses[:, :, :3], points) + poses[:, None, :, 3]
    new = similarity.extrinsic(poses)
    after = np.einsum("vij,nj->vni", new[:, :, :3], similarity.points(points)) + new[:, None, :, 3]
    np.testing.assert_allclose(after, similarity.scale * before, atol=1e-9)
    assert isinstance(similarity, Similarity)


@pytest.mark.parametrize(
    ("points", "arguments", "rule"),
    [
        (np.zeros((0, 3)), {}, "is not|are not"),
        (np.zeros((4, 2)), {}, "are not"),
        (np.full((4, 3), np.nan), {}, "not finite"),
        (np.ones((4, 3)), {}, "no height"),
        (np.ones((4, 3)), {"up": (0, 0, 0)}, "no direction"),
        (np.ones((4, 3)), {"metres_per_unit": 0}, "metres_per_unit 0 is no length"),
        (np.ones((4, 3)), {"height": -3}, "height -3 is no length"),
        (np.ones((4, 3)), {"outliers": 0.5}, "no share of outliers"),
    ],
)
def test_refusals(points, arguments, rule):
    with pytest.raises(ValueError, match=rule):
        to_sonata_frame(points, **arguments)


def test_up_is_against_y_by_default():
    np.testing.assert_allclose(to_sonata_frame(cloud()).rotation @ Y_DOWN, [0, 0, 1], atol=1e-12)
