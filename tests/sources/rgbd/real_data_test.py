"""Real RGB-D folders: views agree with each other. Skipped without the data."""

import functools
import itertools

import numpy as np
import pytest
from PIL import Image

from geode_jax.exports import Export, validate
from geode_jax.sources.rgbd.export import make_rgbd_export
from geode_jax.sources.rgbd.folder import open_folder

REAL = {  # options, frames, pairs that overlap (None: all do), largest median error of depth
    "open3d_livingroom1": ({}, 43, None, 0.003),
    "slambook2_rgbd/ch5": ({"intrinsic": (518.0, 519.0, 325.5, 253.5)}, 5, None, 0.03),
    # A negative focal length: the camera's y axis points up and the world is mirrored. Without
    # regard to that, the median error is 0.17.
    "slambook2_rgbd/ch12": (
        {"intrinsic": (481.2, -480.0, 319.5, 239.5), "depth_scale": 5000.0},
        5,
        ({0, 1}, {3, 4}),
        0.03,
    ),
}


@pytest.mark.parametrize("name", REAL)
def test_real_views_agree_with_each_other(data_root, tmp_path, name):
    """Points of a view, projected into another view, have the depth that is measured there."""
    options, count, overlapping, tolerance = REAL[name]
    if not (data_root / name).is_dir():
        pytest.skip(f"real data: no folder {data_root / name}")
    summary = make_rgbd_export(
        data_root / name,
        tmp_path / "out",
        scenes_per_frame=1,
        questions_per_scene=6,
        image_side=32,
        progress=False,
        **options,
    )
    assert summary["frames"] == {"found": count, "thinned_out": 0, "used": count, "dropped": {}}
    assert summary["warnings"] == validate(tmp_path / "out")["warnings"] == []
    source = open_folder(data_root / name, **options)
    poses = np.array([np.linalg.inv(source.read_pose(n))[:3] for n in source.names])
    stored = functools.cache(
        lambda n: np.asarray(Image.open(next((source.folder / "depth").glob(f"{n}.*"))))
    )
    export, errors = Export(tmp_path / "out"), []
    for scene_id in export.scene_ids():
        arrays = export.read_scene(scene_id)
        extrinsic = arrays["camera/extrinsic"].astype(np.float64)
        rotation = extrinsic[:, :, :3]
        identity = np.tile(np.eye(3), (len(rotation), 1, 1))
        np.testing.assert_allclose(rotation @ rotation.swapaxes(1, 2), identity, atol=1e-6)
        assert (np.linalg.det(rotation) > 0).all()
        frames = np.abs(poses[:, None] - extrinsic).max((2, 3)).argmin(0)
        for a, b in itertools.permutations(range(len(rotation)), 2):
            if overlapping is not None and {frames[a], frames[b]} not in overlapping:
                continue
            measured = stored(source.names[frames[b]]) / source.depth_scale
            points = arrays["vggt/points"][a][arrays["vggt/depth"][a] > 0]
            seen = points @ rotation[b].T + extrinsic[b, :, 3]
            seen = seen[seen[:, 2] > 0.1]
            u, v, _ = np.round(source.depth_intrinsic @ (seen / seen[:, 2:]).T).astype(int)
            inside = (u >= 0) & (u < measured.shape[1]) & (v >= 0) & (v < measured.shape[0])
            there = measured[v[inside], u[inside]]
            error = np.abs(seen[inside, 2] / np.where(there > 0, there, np.nan) - 1)
            assert (there > 0).sum() > 40
            errors.append(np.nanmedian(error))
    assert len(errors) >= 4
    assert np.median(errors) < tolerance
