"""Scenes, their arrays and the export: determinism, geometry, no category in the tokens."""

import dataclasses
import itertools
import subprocess
import sys

import numpy as np
import pytest

from geode_jax import exports
from geode_jax.geometry.upright_boxes import box_gaps, footprints
from geode_jax.sources.questions import margins, relations
from geode_jax.sources.questions.seen_room import pair_relations
from geode_jax.sources.rooms import arrays as rooms_arrays
from geode_jax.sources.rooms import export as rooms
from geode_jax.sources.rooms import layout, raycast
from geode_jax.sources.rooms import scene as rooms_scene
from geode_jax.sources.rooms.arrays import (
    VOXEL_EDGE,
    point_tokens,
    scene_arrays,
    soft_depth_bins,
    teacher_arrays,
)
from geode_jax.sources.rooms.scene import (
    MIN_OBJECTS,
    MIN_VISIBLE_PIXELS,
    make_and_observe,
    make_scene,
    observe,
    scene_from_id,
)
from geode_jax.targets import depth_bin_centres

SEED = 3


@pytest.fixture(scope="module")
def made():
    """Returns a few scenes and their views."""
    return [make_and_observe(SEED, index) for index in range(12)]


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rooms") / "export"
    rooms.make_rooms(folder, scenes=10, seed=SEED, workers=1, progress=False)
    return exports.Export(folder)


def test_export_does_not_depend_on_the_number_of_workers(export, tmp_path):
    rooms.make_rooms(tmp_path / "two", scenes=10, seed=SEED, workers=2, progress=False)
    other = exports.Export(tmp_path / "two")
    for key in ("scenes", "questions", "categories", "producer"):
        assert other.manifest[key] == export.manifest[key]
    questions = (export.folder / "questions.jsonl", other.folder / "questions.jsonl")
    assert questions[0].read_bytes() == questions[1].read_bytes()


def test_a_scene_depends_on_seed_and_index_only(export, made):
    again = make_scene(SEED, 7)
    assert again.scene_id == "room_s3_000007"
    np.testing.assert_array_equal(again.boxes, made[7][0].boxes)
    np.testing.assert_array_equal(scene_from_id("room_s3_000007").extrinsic, again.extrinsic)
    stored = export.read_scene("room_s3_000007", ["target/boxes"])["target/boxes"]
    np.testing.assert_array_equal(stored, again.boxes[made[7][1].visible].astype(np.float32))
    assert not np.array_equal(make_scene(SEED + 1, 7).room, again.room)
    for wrong in ("room_s3_7", "room_3_000007", "scene0000_00", "room_s3_000007x"):
        with pytest.raises(ValueError, match="not an id of a room"):
            scene_from_id(wrong)


def test_export_is_valid_and_split_by_scene(export):
    summary = exports.validate(export.folder)
    assert summary["dropped"] == summary["warnings"] == []
    assert summary["splits"] == {"train": 8, "val": 2, "test": 1}
    assert {row["scenes"] for row in summary["tensors"]} == {11}
    assert export.scene_ids("test") == [f"room_s{SEED + rooms.TEST_SEED_OFFSET}_000000"]
    assert export.manifest["tokens_contain_depth"] is True


@pytest.mark.parametrize(
    ("scenes", "counts"),
    [(1, (1, 0, 0)), (2, (1, 1, 0)), (4, (3, 1, 1)), (100, (80, 20, 6)), (8000, (6400, 1600, 500))],
)
def test_split_sizes(scenes, counts):
    plan = rooms.plan_splits(scenes, 0, None)
    splits = [split for *_, split in plan]
    assert tuple(splits.count(name) for name in ("train", "val", "test")) == counts
    assert len({place[:2] for place in plan}) == len(plan)


def test_bad_numbers_are_refused(tmp_path):
    with pytest.raises(ValueError, match="scenes"):
        rooms.make_rooms(tmp_path / "none", scenes=0)
    with pytest.raises(ValueError, match="images"):
        rooms.make_rooms(tmp_path / "none", scenes=1, images=-1)
    with pytest.raises(ValueError, match="seed"):
        rooms.make_rooms(tmp_path / "none", scenes=1, seed=rooms.TEST_SEED_OFFSET)
    assert not (tmp_path / "none").exists()


def test_workers_import_no_jax():
    code = "import sys, geode_jax.sources.rooms.export; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_rooms_hold_their_objects_apart(made):
    for scene, _ in made:
        boxes, room = scene.boxes, scene.room
        assert room[:2].min() >= 3 - 1e-3 and room[:2].max() <= 8 + 1e-3
        assert 2.4 <= room[2] <= 3.2 and MIN_OBJECTS <= len(boxes) <= 10
        assert (boxes[:, 3:6] >= 0.37).all() and (boxes[:, 3] >= boxes[:, 4]).all()
        corners = footprints(boxes)
        assert np.abs(corners.real).max() < room[0] / 2 and np.abs(corners.imag).max() < room[1] / 2
        assert (boxes[:, 2] - boxes[:, 5] / 2 > -1e-9).all()
        assert (boxes[:, 2] + boxes[:, 5] / 2 < room[2]).all()
        gaps = box_gaps(boxes, boxes)
        planned = {frozenset(pair) for pair in scene.pairs}
        for a, b in itertools.combinations(range(len(boxes)), 2):
            if frozenset((a, b)) in planned:
                gap = gaps[a, b]
                assert gap <= margins.MAX_CONTACT_GAP or gap >= margins.MIN_SEPARATION
            else:
                assert gaps[a, b] > layout.CLEARANCE - 0.005
            # Boxes that touch do not overlap: shrunk by 2 mm they have a gap.
            small = boxes[[a, b]] - [0, 0, 0, 0.002, 0.002, 0.002, 0]
            assert box_gaps(small[:1], small[1:])[0, 0] > 0


def test_cameras_stand_in_the_room_and_in_no_object(made):
    for scene, _ in made:
        for eye in raycast.camera_centres(scene.extrinsic):
            assert (np.abs(eye[:2]) < scene.room[:2] / 2).all() and 1.3 <= eye[2] <= 1.7
            probe = np.array([[*eye, 0.01, 0.01, 0.01, 0]])
            assert box_gaps(probe, scene.boxes).min() > 0.15
        assert np.deg2rad(75) <= scene.fov <= np.deg2rad(95)


def test_targets_hold_the_visible_objects_only(made):
    hidden = 0
    for scene, seen in made:
        arrays, teacher = scene_arrays(scene, seen), teacher_arrays(scene, seen)
        counts = np.bincount(seen.pixels.surface.ravel(), minlength=len(scene.boxes))
        np.testing.assert_array_equal(seen.rays.sum(0), counts[: len(scene.boxes)])
        assert (counts[: len(scene.boxes)][seen.visible] >= MIN_VISIBLE_PIXELS).all()
        hidden += (~seen.visible).sum()
        assert len(arrays["target/boxes"]) == seen.visible.sum() == len(arrays["target/labels"])
        assert (teacher["detection_probs"].argmax(-1) == arrays["target/labels"]).all()
    assert hidden > 0


def test_arrays_are_those_of_one_camera(made):
    scene, seen = made[0]
    arrays, teacher = scene_arrays(scene, seen), teacher_arrays(scene, seen)
    side = 2 * rooms_scene.GRID
    picture = rooms_scene.render(scene, side, side)
    np.testing.assert_allclose(picture["depth"], arrays["target/depth"], atol=1e-5)
    category = np.array([item.category for item in scene.objects] + [-1])
    np.testing.assert_array_equal(category[picture["instance"]], arrays["target/segmentation"])
    # Unprojecting the depth map by the stored camera gives the points in the tokens.
    v, u = np.mgrid[:side, :side]
    pixels = np.stack([u, v, np.ones_like(u)], -1)
    tokens = arrays["vggt/tokens"].astype(np.float64).reshape(4, 8, 8, -1)
    for view in range(4):
        rays = pixels @ np.linalg.inv(arrays["camera/intrinsic"][view]).T
        rotation, shift = np.split(arrays["camera/extrinsic"][view], [3], axis=1)
        points = (rays * arrays["target/depth"][view, ..., None] - shift[:, 0]) @ rotation
        for row, column in itertools.product(range(2), range(2)):
            offset = 13 * (2 * row + column)
            in_tokens = tokens[view, :, :, offset : offset + 3] * 4
            np.testing.assert_allclose(in_tokens, points[row::2, column::2], atol=5e-3)
            depth = tokens[view, :, :, offset + 3] * 4
            wanted = arrays["target/depth"][view, row::2, column::2]
            np.testing.assert_allclose(depth, wanted, rtol=2e-3)
    share = teacher["features"].astype(np.float64)
    np.testing.assert_allclose(share.sum(-1), 1, atol=2e-3)
    labels = rooms_scene.render(scene, 32, 32)["instance"].reshape(4, 8, 4, 8, 4)
    outside = (labels < 0).mean((2, 4))
    np.testing.assert_allclose(share[..., -1], outside, atol=1e-3)


def test_depth_bins_spread_between_neighbours():
    centres = depth_bin_centres(16)
    assert centres[0] == pytest.approx(0.3) and centres[-1] == pytest.approx(10.0)
    np.testing.assert_allclose(np.diff(np.log(centres)), np.log(10 / 0.3) / 15)
    depth = np.array([0.1, 0.3, 1.234, 9.9, 12.0])
    bins = soft_depth_bins(depth, 16)
    np.testing.assert_allclose(bins.sum(-1), 1)
    assert ((bins > 0).sum(-1) <= 2).all()
    mean = np.exp(bins @ np.log(centres))
    np.testing.assert_allclose(mean, [0.3, 0.3, 1.234, 9.9, 10.0])


def test_tokens_know_neither_names_nor_numbers_of_objects(made):
    """The same room with other categories, in another order, gives the same tokens."""
    for scene, seen in made[:4]:
        order = np.random.default_rng(0).permutation(len(scene.objects))
        renamed = tuple(
            dataclasses.replace(scene.objects[n], category=(scene.objects[n].category + 5) % 16)
            for n in order
        )
        other = dataclasses.replace(scene, objects=renamed, pairs=(), scene_id="another")
        np.testing.assert_array_equal(
            rooms_arrays.tokens(observe(other)), rooms_arrays.tokens(seen)
        )
        # A colour does change the tokens.
        painted = tuple(dataclasses.replace(item, colour=(0, 0, 0)) for item in scene.objects)
        dark = observe(dataclasses.replace(scene, objects=painted))
        assert not np.array_equal(rooms_arrays.tokens(dark), rooms_arrays.tokens(seen))


def test_point_tokens_are_the_means_of_occupied_voxels(made):
    scene, seen = made[2]
    features, coord, frame = point_tokens(seen).values()
    assert features.dtype == np.float16 and features.shape == (len(coord), 10)
    points = seen.cells.point.reshape(-1, 3)
    normals = seen.cells.normal.reshape(-1, 3)
    own: dict[tuple, list[int]] = {}
    for i, point in enumerate(points):
        own.setdefault(tuple(int(np.floor(x / VOXEL_EDGE)) for x in point), []).append(i)
    assert len(own) == len(coord)
    tokens = zip(features.astype(np.float32), coord, frame, sorted(own), strict=True)
    for feature, place, view, voxel in tokens:
        rows = own[voxel]
        views = [row // (len(points) // layout.VIEWS) for row in rows]
        assert views.count(view) == max(map(views.count, views))
        np.testing.assert_allclose(place, points[rows].mean(0), atol=1e-5)
        np.testing.assert_allclose(feature[3:6], normals[rows].mean(0), atol=2e-3)
        np.testing.assert_allclose(np.expm1(feature[9]) * 8, len(rows), rtol=5e-3)
    # The frame that Sonata expects: the floor at 0, the room centred.
    assert coord[:, 2].min() > -1e-6 and coord[:, 2].max() < scene.room[2] + 1e-6
    assert (np.abs(coord[:, :2]) < scene.room[:2] / 2 + 1e-6).all()


def test_pair_relations_are_image_positions(made):
    scene, _ = made[1]
    found = pair_relations(scene.boxes, scene.extrinsic[0])
    pose = np.vstack([scene.extrinsic[0], [0, 0, 0, 1]])
    centres = (pose @ np.c_[scene.boxes[:, :3], np.ones(len(scene.boxes))].T).T
    tried = 0
    for a, b in itertools.permutations(range(len(centres)), 2):
        left, right, above, below = found[a, b]
        assert left + right == pytest.approx(1) and above + below == pytest.approx(1)
        if min(centres[a, 2], centres[b, 2]) <= 0.1:
            assert left == above == 0.5
            continue
        delta = centres[b, :2] / centres[b, 2] - centres[a, :2] / centres[a, 2]
        for value, way in ((left, delta[0]), (above, delta[1])):
            if abs(way) > 0.1:
                assert value == pytest.approx(float(way > 0), abs=0.01)
                tried += 1
    assert tried > 5
    np.testing.assert_allclose(np.diagonal(found[..., 0]), 0.5)


def test_size_priors_overlap():
    prior = layout.larger_prior()
    pairs = list(itertools.combinations(layout.NAMES, 2))
    assert all(prior[a, b] + prior[b, a] == pytest.approx(1) for a, b in pairs)
    least = relations.MIN_ANSWER_PROBABILITY
    fair = [pair for pair in pairs if least <= prior[pair] <= 1 - least]
    assert len(fair) > 0.75 * len(pairs)
    assert prior["bed", "trash can"] > 0.9


@pytest.mark.parametrize("side", [112, 32])
def test_images_on_request(tmp_path, monkeypatch, side):
    rendered, render = [], rooms_scene.render
    monkeypatch.setattr(rooms_scene, "render", lambda *args: rendered.append(args) or render(*args))
    rooms.make_rooms(tmp_path / "e", scenes=1, images=side, workers=1, progress=False)
    assert len(rendered) == (side != 32)  # pictures of 32 x 32 reuse the rays of the depth map
    export = exports.Export(tmp_path / "e")
    images = export.read_scene("room_s0_000000", ["images"])["images"]
    assert images.shape == (4, side, side, 3) and images.dtype == np.uint8
    picture = render(scene_from_id("room_s0_000000"), side, side)
    np.testing.assert_array_equal(picture["rgb"], images)
    assert picture["normals"].shape == (4, side, side, 3)
    assert images.std() > 10


def test_images_change_nothing_else(export, tmp_path):
    rooms.make_rooms(tmp_path / "e", scenes=2, seed=SEED, images=32, workers=1, progress=False)
    with_images = exports.Export(tmp_path / "e")
    scene_id = with_images.scene_ids("train")[0]
    tensors, plain = with_images.read_scene(scene_id), export.read_scene(scene_id)
    assert "images" not in plain
    assert tensors.keys() - plain.keys() == {"images"}
    for name, array in plain.items():
        np.testing.assert_array_equal(tensors[name], array)
