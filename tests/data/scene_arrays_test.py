"""Scene arrays, compared with plain loops over pixels and with the inverse geometry."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from geode_jax import exports
from geode_jax.data.scene_arrays import (
    SceneShapes,
    batch_rows,
    empty_rows,
    export_sizes,
    patch_majority,
    patch_mean,
    scene_tensors,
)
from geode_jax.errors import UserError
from geode_jax.exports import files
from tests.helpers.exports import (
    CELL,
    GRID,
    IMAGE,
    POINT_WIDTH,
    TOKEN_WIDTH,
    tiny_scene,
    write_geode_export,
    write_tiny_export,
)

SHAPES = SceneShapes(
    views=3, grid=GRID, token_width=TOKEN_WIDTH, depth_ratio=2, boxes=5, categories=5, features=7,
    depth_bins=6,
)  # fmt: skip
WITH_IMAGES = SceneShapes(
    views=3, grid=GRID, token_width=0, depth_ratio=2, boxes=5, vision="images", image=IMAGE,
    points=6, point_width=POINT_WIDTH, point_frames=True,
)  # fmt: skip


def with_scene(export, *tensors, name="other"):
    """Returns the export with one more scene."""
    manifest = export.manifest
    entry = exports.write_scene(export.folder, name, *tensors, split="val", manifest=manifest)
    manifest["scenes"].append(entry)
    files.write_json(export.folder / "manifest.json", manifest)
    return exports.Export(export.folder)


@pytest.fixture
def scene():
    arrays, teacher = tiny_scene(np.random.default_rng(3), views=2, boxes=4)
    return arrays | {f"teacher/{name}": array for name, array in teacher.items()}


def test_depth_is_averaged_over_known_pixels_only(scene):
    rows = batch_rows(scene, SHAPES)
    gh, gw = GRID
    for v in range(2):
        for p in range(gh * gw):
            y, x = divmod(p, gw)
            cell = scene["vggt/depth"][v, y * CELL : (y + 1) * CELL, x * CELL : (x + 1) * CELL]
            np.testing.assert_allclose(
                rows["depth_hint_SVP"][v, p], cell[cell > 0].mean(), rtol=1e-6
            )
        for y in range(gh * 2):
            for x in range(gw * 2):
                cell = scene["target/depth"][v, y * 2 : y * 2 + 2, x * 2 : x * 2 + 2]
                mean = cell[cell > 0].mean() if (cell > 0).any() else 0
                np.testing.assert_allclose(rows["target_depth_SVhw"][v, y, x], mean, rtol=1e-6)
    assert (rows["depth_hint_SVP"][2] == 0).all() and (rows["target_depth_SVhw"][2] == 0).all()


def test_weights_of_depths_are_means_over_the_known_pixels(scene):
    random = np.random.default_rng(0)
    weight = random.random(scene["target/depth"].shape).astype(np.float32)
    rows = batch_rows(scene | {"target/depth_weight": weight}, SHAPES)
    cell = (slice(None), slice(2, 4), slice(4, 6))
    known = scene["target/depth"][cell] > 0
    total = np.where(known, weight[cell], 0).sum((1, 2)) / np.maximum(known.sum((1, 2)), 1)
    np.testing.assert_allclose(rows["target_depth_weight_SVhw"][:2, 1, 2], total, rtol=1e-6)
    assert (batch_rows(scene, SHAPES)["target_depth_weight_SVhw"] == 1).all()


def test_a_point_projects_back_to_the_pixel_it_was_seen_at(scene):
    rows = batch_rows(scene, SHAPES)
    for v in range(2):
        pose, camera = scene["camera/extrinsic"][v], scene["camera/intrinsic"][v]
        for p in np.flatnonzero(rows["points_mask_SVP"][v]):
            y, x = divmod(int(p), GRID[1])
            seen = pose[:, :3] @ rows["points_SVP3"][v, p] + pose[:, 3]
            pixel = (camera @ seen / seen[2])[:2]
            # Even cells have no centre pixel; the one after the centre is taken.
            expected = [x * CELL + CELL // 2, y * CELL + CELL // 2]
            np.testing.assert_allclose(pixel, expected, atol=1e-4)
            depth = scene["vggt/depth"][v, expected[1], expected[0]]
            np.testing.assert_allclose(seen[2], depth, rtol=1e-5)
            on_grid = rows["intrinsic_SV33"][v] @ seen / seen[2]
            # The patch's centre is at (x, y) of the grid; the pixel is half a pixel off.
            np.testing.assert_allclose(on_grid[:2], [x + 0.5 / CELL, y + 0.5 / CELL], atol=1e-5)
    known = scene["vggt/depth"][:, CELL // 2 :: CELL, CELL // 2 :: CELL] > 0
    assert (rows["points_mask_SVP"][:2] == known.reshape(2, -1)).all()
    assert not rows["points_mask_SVP"][2].any()


def test_stored_points_win_over_unprojected_ones(scene):
    h, w = GRID[0] * CELL, GRID[1] * CELL
    points = np.random.default_rng(0).normal(size=(2, h, w, 3)).astype(np.float16)
    rows = batch_rows(scene | {"vggt/points": points}, SHAPES)
    mask = rows["points_mask_SVP"][:2]
    chosen = points[:, CELL // 2 :: CELL, CELL // 2 :: CELL].reshape(2, -1, 3)
    assert (rows["points_SVP3"][:2][mask] == chosen[mask]).all() and mask.any() and not mask.all()
    assert (rows["points_SVP3"][:2][~mask] == 0).all()


def test_camera_tokens_are_padded_and_masked(scene):
    shapes = dataclasses.replace(SHAPES, camera_width=TOKEN_WIDTH)
    tokens = np.random.default_rng(0).normal(size=(2, TOKEN_WIDTH)).astype(np.float32)
    rows = batch_rows(scene | {"vggt/camera_tokens": tokens}, shapes)
    np.testing.assert_array_equal(rows["camera_SVC"], [*tokens, np.zeros(TOKEN_WIDTH)])
    assert rows["camera_mask_S"]
    rows = batch_rows(scene, shapes)
    assert rows["camera_SVC"].shape == (3, TOKEN_WIDTH) and not rows["camera_mask_S"]
    assert batch_rows(scene, SHAPES)["camera_SVC"].shape == (3, 0)


def test_padding_views_can_be_inverted_and_are_masked(scene):
    rows = batch_rows(scene, SHAPES)
    assert rows["view_mask_SV"].tolist() == [True, True, False]
    assert (rows["extrinsic_SV34"][2] == np.eye(3, 4)).all() and (
        rows["intrinsic_SV33"][2] == np.eye(3)
    ).all()
    assert (rows["extrinsic_SV34"][:2] == scene["camera/extrinsic"]).all()
    assert (rows["vision_SVPC"][:2] == scene["vggt/tokens"]).all() and (
        rows["vision_SVPC"][2] == 0
    ).all()


def test_boxes_are_padded_or_marked_as_not_all(scene):
    rows = batch_rows(scene, SHAPES)
    assert (rows["target_boxes_SN7"][:4] == scene["target/boxes"]).all()
    assert rows["target_labels_SN"].tolist() == [*scene["target/labels"], -1]
    assert rows["boxes_known_S"]
    few = SceneShapes(**(SHAPES.__dict__ | {"boxes": 3}))
    assert not batch_rows(scene, few)["boxes_known_S"]
    none = {"target/boxes": np.zeros((0, 7), np.float32), "target/labels": np.zeros(0, np.int32)}
    rows = batch_rows(scene | none, SHAPES)
    assert rows["boxes_known_S"] and (rows["target_labels_SN"] == -1).all()


def test_teacher_arrays_reach_the_patch_grid(scene):
    rows = batch_rows(scene, SHAPES)
    assert (rows["teacher_features_SVPF"][:2] == scene["teacher/features"].reshape(2, 6, 7)).all()
    cells = scene["teacher/depth_bins"].reshape(2, 2, 2, 3, 2, 6).mean(axis=(2, 4))
    np.testing.assert_allclose(
        rows["teacher_depth_bins_SVPZ"][:2], cells.reshape(2, 6, 6), atol=1e-6
    )
    np.testing.assert_allclose(rows["teacher_depth_bins_SVPZ"][:2].sum(-1), 1, atol=1e-6)
    assert (rows["teacher_detection_SNc"][:4] == scene["teacher/detection_probs"]).all()
    for name in ("features", "depth_bins", "detection"):
        assert rows[f"teacher_{name}_mask_S"]


def test_absent_arrays_keep_the_shapes_and_clear_the_masks(scene):
    full = batch_rows(scene, SHAPES)
    bare = batch_rows({"vggt/tokens": scene["vggt/tokens"]}, SHAPES)
    for name, row in full.items():
        assert (bare[name].shape, bare[name].dtype) == (row.shape, row.dtype), name
        assert np.isfinite(row).all(), name
    for name in (
        "points_mask_SVP",
        "boxes_known_S",
        "teacher_features_mask_S",
        "teacher_depth_bins_mask_S",
    ):
        assert not bare[name].any()
    assert not bare["teacher_detection_mask_S"] and (bare["target_segmentation_SVP"] == -2).all()
    assert (bare["target_depth_SVhw"] == 0).all() and (bare["depth_hint_SVP"] == 0).all()
    empty = empty_rows(SHAPES)
    assert empty["view_mask_SV"].tolist() == [True, False, False]
    assert (full["target_segmentation_SVP"][:2] >= -1).all()  # known: a category, or none (-1)
    assert (full["target_segmentation_SVP"][2] == -2).all()  # a padding view
    without_teacher = SceneShapes(
        **(SHAPES.__dict__ | dict(categories=0, features=0, depth_bins=0))
    )
    bare = batch_rows({"vggt/tokens": scene["vggt/tokens"]}, without_teacher)
    assert bare["teacher_features_SVPF"].shape == (3, 6, 0)


def test_the_teachers_features_can_be_the_vision(scene):
    shapes = dataclasses.replace(SHAPES, vision="teacher/features", token_width=7)
    rows = batch_rows(scene, shapes)
    np.testing.assert_array_equal(
        rows["vision_SVPC"][:2], scene["teacher/features"].reshape(2, 6, 7)
    )
    np.testing.assert_array_equal(rows["vision_SVPC"], rows["teacher_features_SVPF"])
    for sizes in (shapes, SHAPES):
        empty = empty_rows(sizes)
        assert (
            empty["vision_SVPC"].shape == (3, 6, sizes.token_width)
            and not empty["vision_SVPC"].any()
        )
        masks = [name for name in empty if "_mask_" in name or "_known_" in name]
        assert [name for name in masks if empty[name].any()] == ["view_mask_SV"]


def test_images_and_points_are_padded_and_masked(geode_export):
    sizes = export_sizes(geode_export, "images")
    assert (sizes.views, sizes.image, sizes.points, sizes.point_width) == (3, IMAGE, 6, POINT_WIDTH)
    assert sizes.point_frames
    names = scene_tensors("images")
    assert not {"vggt/tokens", "vggt/camera_tokens"} & set(names)
    for i, scene_id in enumerate(geode_export.scene_ids()):
        tensors = geode_export.read_scene(scene_id, names)
        rows = batch_rows(tensors, WITH_IMAGES)
        views, points = 1 + i % 3, (3 + i % 4) * (i > 0)
        assert rows["view_mask_SV"].sum() == views and rows["vision_SVPC"].shape == (3, 6, 0)
        assert rows["image_SVhw3"].dtype == np.uint8 and rows["image_SVhw3"].shape == (3, *IMAGE, 3)
        np.testing.assert_array_equal(rows["image_SVhw3"][:views], tensors["images"])
        assert not rows["image_SVhw3"][views:].any()
        assert rows["point_mask_SJ"].tolist() == [n < points for n in range(6)]
        frames = [n % views if n < points else -1 for n in range(6)]
        assert rows["point_frame_SJ"].tolist() == frames
        for name, key in (("point_SJC", "sonata/features"), ("coord_SJ3", "sonata/coord")):
            assert rows[name].dtype == np.float32 and not rows[name][points:].any()
            if points:
                np.testing.assert_array_equal(rows[name][:points], tensors[key])
        assert rows["depth_hint_SVP"][:views].any() and rows["boxes_known_S"]
        empty = empty_rows(WITH_IMAGES)
        for name, row in rows.items():
            assert (empty[name].shape, empty[name].dtype) == (row.shape, row.dtype), name
        assert empty["view_mask_SV"].tolist() == [True, False, False]
        masks = [name for name in empty if "_mask_" in name or "_known_" in name]
        assert [name for name in masks if empty[name].any()] == ["view_mask_SV"]


def test_points_without_places_are_none(geode_export):
    tensors = geode_export.read_scene("scene001", ["images", "sonata/features"])
    rows = batch_rows(tensors, WITH_IMAGES)
    assert not rows["point_mask_SJ"].any() and not rows["point_SJC"].any()


@pytest.mark.parametrize("vision", ["vggt/tokens", "teacher/features"])
def test_the_student_sees_neither_images_nor_points(scene, vision):
    images = {"images": np.ones((2, *IMAGE, 3), np.uint8), "sonata/coord": np.ones((4, 3))}
    shapes = dataclasses.replace(SHAPES, vision=vision, token_width=scene[vision].shape[-1])
    rows = batch_rows(scene | images, shapes)
    assert rows["image_SVhw3"].shape == (3, 0, 0, 3) and rows["point_mask_SJ"].shape == (0,)
    assert rows["point_SJC"].shape == (0, 0) and rows["coord_SJ3"].shape == (0, 3)
    images = {"images", "sonata/features", "sonata/coord", "sonata/frame"}
    assert not images & set(scene_tensors(vision))


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        (
            "internvit/tokens",
            (1, 5, 8),
            r"tensor internvit/tokens: a view is \(5, 8\), \(6, 8\) in",
        ),
        ("sonata/features", (2, 3), "tensor sonata/features: width 3, 4 in earlier scenes"),
    ],
)
def test_tokens_or_points_of_different_size_are_refused(tmp_path, name, shape, message):
    export = write_geode_export(tmp_path / "export", train=2, val=0)
    export = with_scene(export, {"internvit/tokens": np.ones((1, 6, 8), np.float32)}, name="a")
    export = with_scene(export, {name: np.ones(shape, np.float32)})
    with pytest.raises(UserError, match=f"scene other: {message}"):
        export_sizes(export, "internvit/tokens")
    assert export_sizes(export).image == (0, 0)  # the student reads no images


def test_target_depth_serves_as_geometry_where_vggt_gave_none(scene):
    del scene["vggt/depth"]
    rows = batch_rows(scene, SHAPES)
    assert (rows["depth_hint_SVP"] == 0).all()  # the model must not see the target
    assert rows["points_mask_SVP"].any()


@given(
    st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.integers(1, 4), st.integers(0, 999)
)
def test_pooling_of_any_size_against_loops(h, w, rows, columns, seed):
    random = np.random.default_rng(seed)
    labels = random.integers(-1, 3, (1, h, w))
    values = random.uniform(0.1, 1, (1, h, w)) * (random.random((1, h, w)) < 0.7)
    mean = patch_mean(values, (rows, columns))[0]
    majority = patch_majority(labels, (rows, columns))[0]
    for i in range(rows):
        for j in range(columns):
            # A pixel belongs to the cell that its centre lies in.
            ys = [y for y in range(h) if int((y + 0.5) * rows / h) == i]
            xs = [x for x in range(w) if int((x + 0.5) * columns / w) == j]
            if not ys or not xs:
                continue  # more cells than pixels: tested below
            cell = values[0][np.ix_(ys, xs)]
            expected = cell[cell > 0].mean() if (cell > 0).any() else 0
            if rows <= h and columns <= w:
                np.testing.assert_allclose(mean[i, j], expected, rtol=1e-5)
                votes = labels[0][np.ix_(ys, xs)].reshape(-1).tolist()
                most = max(map(votes.count, votes))
                assert votes.count(majority[i, j]) == most
                assert majority[i, j] >= 0 or {x for x in votes if votes.count(x) == most} == {-1}


def test_more_cells_than_pixels_repeats_the_nearest():
    values = np.array([[[1.0, 2.0]]])
    assert patch_mean(values, (2, 4))[0].tolist() == [[1, 1, 2, 2], [1, 1, 2, 2]]
    assert patch_majority(values.astype(int), (2, 4))[0].tolist() == [[1, 1, 2, 2], [1, 1, 2, 2]]


def test_export_sizes_come_from_the_headers(tiny_export, tmp_path):
    sizes = export_sizes(tiny_export)
    assert (sizes.views, sizes.features, sizes.depth_bins) == (3, 7, 6)
    assert sizes.box_counts == {f"scene{i:03}": (3 + i % 4) * (i > 0) for i in range(10)}
    assert sizes.has_detection_probs
    export = write_tiny_export(tmp_path / "export", train=5, val=0)
    for entry in export.manifest["scenes"][1:2]:
        (export.folder / "scenes" / f"{entry['id']}.safetensors").write_bytes(b"garbage")
    assert "scene001" in export_sizes(export).box_counts


def test_teachers_of_different_width_are_refused(tmp_path):
    export = write_tiny_export(tmp_path / "export", train=5, val=0)
    arrays, teacher = tiny_scene(np.random.default_rng(0), 2, 3)
    teacher["features"] = teacher["features"][..., :4]
    export = with_scene(export, arrays, teacher)
    with pytest.raises(UserError, match="scene other: tensor teacher/features: width 4"):
        export_sizes(export)
