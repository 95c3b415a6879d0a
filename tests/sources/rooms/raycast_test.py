"""Ray casting and box distances, against brute force without shared code."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geode_jax.geometry.upright_boxes import box_gaps, footprint_gaps
from geode_jax.sources.rooms import raycast

BOXES = np.array(
    [
        [0.6, 0.9, 0.5, 1.2, 0.6, 1.0, 0.4],
        [-1.2, 0.2, 0.3, 0.8, 0.5, 0.6, -0.6],
        [-1.15, 0.25, 0.85, 0.4, 0.3, 0.5, 1.2],  # stands on the one before
        [0.2, -1.4, 1.0, 0.5, 0.5, 2.0, 0.0],
    ]
)
ROOM = np.array([4.2, 5.0, 2.6])


def cameras():
    eyes = np.array([[1.7, -1.9, 1.5], [-1.8, 2.1, 1.4], [0.0, 0.0, 1.6]])
    return raycast.camera_poses(eyes, np.array([2.2, -0.9, 1.1]), np.array([-0.3, -0.4, 0.05]))


def box_frame(box):
    """Returns the axes (rows) of a box in the world frame."""
    cos, sin = np.cos(box[6]), np.sin(box[6])
    return np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]])


def first_hit(origin, ray):
    """Returns (smallest depth over all faces as polygons, its box); -1 = the room."""
    best = (np.inf, -1)
    solids = [*BOXES, np.array([0, 0, ROOM[2] / 2, *ROOM, 0])]
    for owner, box in enumerate(solids):
        axes = box_frame(box)
        for axis, side in itertools.product(range(3), (-1, 1)):
            corner = box[:3] + side * axes[axis] * box[3 + axis] / 2
            slope = axes[axis] @ ray
            if abs(slope) < 1e-9:
                continue
            depth = axes[axis] @ (corner - origin) / slope
            local = axes @ (origin + depth * ray - box[:3])
            others = [k for k in range(3) if k != axis]
            on_face = all(abs(local[k]) <= box[3 + k] / 2 + 1e-9 for k in others)
            if on_face and 1e-9 < depth < best[0]:
                best = (depth, owner if owner < len(BOXES) else -1)
    return best


@pytest.fixture(scope="module")
def hits():
    extrinsic = cameras()
    rays = raycast.pixel_rays(extrinsic, raycast.pinhole(1.5, 12, 12), 12, 12)
    return extrinsic, rays, raycast.cast(BOXES, ROOM, raycast.camera_centres(extrinsic), rays)


def test_first_hit_is_that_of_every_face_tried(hits):
    extrinsic, rays, found = hits
    origins = raycast.camera_centres(extrinsic)
    for view, index in itertools.product(range(3), range(144)):
        depth, owner = first_hit(origins[view], rays[view, index])
        assert found.depth[view, index] == pytest.approx(depth, abs=2e-6)
        surface = found.surface[view, index]
        assert (surface if surface < len(BOXES) else -1) == owner
    # Every box, the floor, the ceiling and several walls are seen.
    assert {0, 1, 2, 3, 4, 5} <= set(found.surface.ravel().tolist())


def test_points_lie_on_faces_with_these_normals(hits):
    _, rays, found = hits
    for index in np.ndindex(found.depth.shape):
        surface, point, normal = found.surface[index], found.point[index], found.normal[index]
        assert normal @ rays[index] < 0
        if surface < len(BOXES):
            axes = box_frame(BOXES[surface])
            local = axes @ (point - BOXES[surface][:3])
            axis = np.abs(axes @ normal).argmax()
            assert abs(abs(local[axis]) - BOXES[surface][3 + axis] / 2) < 2e-6
            assert axes[axis] @ normal * local[axis] > 0  # outwards
            plane = [local[1 if axis == 0 else 0], local[1 if axis == 2 else 2]]
        else:
            wall = [(2, 0), (2, 1), (0, 0), (0, 1), (1, 0), (1, 1)][surface - len(BOXES)]
            axis, side = wall
            bounds = (0, ROOM[2]) if axis == 2 else (-ROOM[axis] / 2, ROOM[axis] / 2)
            assert point[axis] == pytest.approx(bounds[side], abs=2e-6)
            plane = [point[1 if axis == 0 else 0], point[1 if axis == 2 else 2]]
        np.testing.assert_allclose(found.plane[index], plane, atol=2e-6)


def test_depth_unprojects_to_the_point_that_projects_to_the_pixel(hits):
    extrinsic, _, found = hits
    intrinsic = raycast.pinhole(1.5, 12, 12)
    for view, (rotation, shift) in enumerate((e[:, :3], e[:, 3]) for e in extrinsic):
        camera = found.point[view] @ rotation.T + shift
        np.testing.assert_allclose(camera[:, 2], found.depth[view], atol=2e-6)
        pixel = camera @ intrinsic.T
        pixel = pixel[:, :2] / pixel[:, 2:]
        v, u = np.divmod(np.arange(144), 12)
        np.testing.assert_allclose(pixel, np.stack([u, v], 1), atol=2e-5)


def test_cameras_are_opencv():
    pose = raycast.camera_poses(np.array([1.0, 2.0, 1.5]), np.pi / 2, 0.0)  # looks along +y
    assert np.linalg.det(pose[:, :3]) == pytest.approx(1)
    right, above, ahead = pose @ [2, 2, 1.5, 1], pose @ [1, 2, 2.5, 1], pose @ [1, 4, 1.5, 1]
    np.testing.assert_allclose(right, [1, 0, 0], atol=1e-12)
    np.testing.assert_allclose(above, [0, -1, 0], atol=1e-12)
    np.testing.assert_allclose(ahead, [0, 0, 2], atol=1e-12)
    np.testing.assert_allclose(raycast.camera_centres(pose[None]), [[1, 2, 1.5]], atol=1e-12)
    # The edge of the image, half a pixel outside the last centre, is at half the field of view.
    edge = np.linalg.inv(raycast.pinhole(1.4, 8, 8)) @ [7.5, 3.5, 1]
    np.testing.assert_allclose(edge, [np.tan(0.7), 0, 1], atol=1e-12)


def test_room_without_boxes():
    extrinsic = cameras()
    rays = raycast.pixel_rays(extrinsic, raycast.pinhole(1.5, 4, 4), 4, 4)
    found = raycast.cast(BOXES[:0], ROOM, raycast.camera_centres(extrinsic), rays)
    assert np.isfinite(found.depth).all() and (found.surface < 6).all()


def test_order_of_boxes_changes_only_the_index(hits):
    extrinsic, rays, found = hits
    order = np.array([2, 0, 3, 1])
    other = raycast.cast(BOXES[order], ROOM, raycast.camera_centres(extrinsic), rays)
    for name in ("depth", "normal", "point", "plane"):
        np.testing.assert_array_equal(getattr(other, name), getattr(found, name))
    np.testing.assert_array_equal(np.append(order, range(4, 10))[other.surface], found.surface)


def looks(pattern):
    surfaces = len(BOXES) + raycast.STRUCTURES
    colour = np.random.default_rng(0).uniform(0.2, 0.9, (surfaces, 3))
    pattern = np.tile(np.array(pattern, float), (surfaces, 1))
    return raycast.Appearance(colour, pattern, np.full(surfaces, 0.5), np.zeros((surfaces, 2)))


def test_slopes_are_derivatives_of_the_luminance(hits):
    found = raycast.Hits(
        *(getattr(hits[2], field.name) for field in dataclasses.fields(raycast.Hits)[:-1]),
        hits[2].plane.astype(np.float64),
    )
    appearance = looks((0.2, 0.1, 0.15))
    _, slopes = raycast.shade(found, appearance)
    step = 1e-5
    for axis in range(2):
        shifted = [
            raycast.shade(
                raycast.Hits(
                    found.depth,
                    found.surface,
                    found.normal,
                    found.point,
                    found.plane + sign * step * np.eye(2)[axis],
                ),
                appearance,
            )[0]
            for sign in (-1, 1)
        ]
        change = raycast.luminance(shifted[1] - shifted[0]) / (2 * step)
        unclipped = (shifted[0] < 1).all(-1) & (shifted[1] < 1).all(-1)
        wanted = np.abs(change) / 10
        np.testing.assert_allclose(slopes[unclipped][:, axis], wanted[unclipped], atol=1e-6)
    plain, none = raycast.shade(found, looks((0, 0, 0)))
    assert not none.any() and plain.min() >= 0 and plain.max() <= 1


def corners(box):
    """Returns the corners of the footprint as complex numbers."""
    square = np.array([1 + 1j, -1 + 1j, -1 - 1j, 1 - 1j])
    local = square.real * box[3] / 2 + 1j * square.imag * box[4] / 2
    return complex(box[0], box[1]) + local * np.exp(1j * box[6])


def polygon_distance(a, b):
    """Returns the distance of two convex polygons of complex corners, 0 if they overlap."""

    def contains(polygon, point):
        sides = [
            np.imag(np.conj(polygon[(k + 1) % 4] - polygon[k]) * (point - polygon[k]))
            for k in range(4)
        ]
        return min(sides) >= 0

    def to_segment(point, start, end):
        share = np.real((point - start) * np.conj(end - start)) / abs(end - start) ** 2
        return abs(point - (start + min(max(share, 0), 1) * (end - start)))

    def cross(p, q, r, s):
        def side(x, y, z):
            return np.imag(np.conj(y - x) * (z - x))

        return side(p, q, r) * side(p, q, s) < 0 and side(r, s, p) * side(r, s, q) < 0

    if any(contains(a, p) for p in b) or any(contains(b, p) for p in a):
        return 0.0
    best = np.inf
    for i, j in itertools.product(range(4), range(4)):
        p, q, r, s = a[i], a[(i + 1) % 4], b[j], b[(j + 1) % 4]
        if cross(p, q, r, s):
            return 0.0
        best = min(best, to_segment(p, r, s), to_segment(r, p, q))
    return best


place = st.floats(-1.5, 1.5)
edge = st.floats(0.2, 2.0)
box = st.tuples(place, place, place, edge, edge, edge, st.floats(-4, 4)).map(np.array)


@settings(deadline=None, max_examples=200)
@given(box, box)
def test_gap_is_the_distance_of_the_two_solids(a, b):
    level = polygon_distance(corners(a), corners(b))
    high = max(abs(a[2] - b[2]) - (a[5] + b[5]) / 2, 0)
    assert box_gaps(a[None], b[None])[0, 0] == pytest.approx(np.hypot(level, high), abs=1e-6)


def test_gaps_of_crossing_and_standing_boxes():
    cross = np.array([[0, 0, 0.5, 3, 0.3, 1, 0], [0, 0, 0.5, 3, 0.3, 1, np.pi / 2]])
    np.testing.assert_array_equal(footprint_gaps(cross, cross), np.zeros((2, 2)))
    assert box_gaps(BOXES, BOXES)[1, 2] == 0  # stands on it
    many = box_gaps(BOXES[:3], BOXES)
    assert many.shape == (3, 4)
    np.testing.assert_allclose(many[:, :3], many[:, :3].T, atol=1e-12)
