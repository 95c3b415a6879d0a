"""Sonata's exporter, around a small torch encoder with Sonata's interfaces."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from geode_jax.data.pipeline import Pipeline
from geode_jax.data.settings import PipelineConfig
from geode_jax.data.tokens import train_tokenizer
from geode_jax.exports import Export, validate
from geode_jax.exports.prompts import prompt
from geode_jax.sources.datasets import Request
from geode_jax.sources.datasets.prepare import prepare
from tests.sources.datasets.scannet_test import write_scan

CONTRACT = Path(__file__).resolve().parents[2] / "geode_jax" / "exports"
VOXEL = 0.02


@pytest.fixture
def weights(upstream, tmp_path):
    """A checkpoint of nine channels, with the options that upstream's has."""
    return save_weights(tmp_path / "sonata.pth", 9)


def save_weights(path, channels):
    import torch
    from sonata.model import PointTransformerV3

    config = {"in_channels": channels, "shuffle_orders": True, "enable_flash": True}
    model = PointTransformerV3(**{**config, "enable_flash": False})
    torch.save({"config": config, "state_dict": model.state_dict()}, path)
    return path


@pytest.fixture
def export(load, weights, tmp_path):
    """The command on `base`, with its arguments before those given."""

    def export(*arguments, base="base", out="out"):
        given = ["--export", tmp_path / base, "--out", tmp_path / out, "--commit", "c0ffee"]
        given += ["--weights", weights, "--unsure", 0, *arguments]
        return load("sonata/export_sonata.py").main([str(argument) for argument in given])

    return export


def unprojected(arrays):
    """World points, colours (by nearest pixel) and views of the known depths, one by one."""
    points, colours, views = [], [], []
    depth = np.asarray(arrays["vggt/depth"], np.float64)
    for view, row, column in zip(*np.nonzero(depth), strict=True):
        ray = np.linalg.solve(arrays["camera/intrinsic"][view], [column, row, 1])
        pose = arrays["camera/extrinsic"][view].astype(np.float64)
        points.append(pose[:, :3].T @ (ray * depth[view, row, column] - pose[:, 3]))
        colours.append(arrays["images"][view, 2 * row + 1, 2 * column + 1])
        views.append(view)
    return np.array(points), np.array(colours), np.array(views)


def chosen_one_by_one(points):
    """{voxel: index of the point nearest to its centre}, in the voxels' order."""
    best = {}
    grid = np.floor(points / VOXEL).astype(int)
    off = ((points / VOXEL - grid - 0.5) ** 2).sum(-1)
    for i, voxel in enumerate(map(tuple, grid - grid.min(0))):
        if voxel not in best or off[i] < off[best[voxel]]:
            best[voxel] = i
    return dict(sorted(best.items()))


def test_a_metric_export_keeps_its_world_and_gets_tokens(load, export, write_base, tmp_path):
    import torch

    base = Export(write_base(tmp_path / "base"))
    assert export() == 0
    assert validate(tmp_path / "out")["scenes"] == 2
    found = Export(tmp_path / "out")
    assert found.manifest["scale"] == "metric" and list(found.questions()) == list(base.questions())
    assert "world kept" in found.manifest["notes"] and "base." in found.manifest["notes"]
    old, new = base.read_scene("a"), found.read_scene("a")
    for name in old:
        np.testing.assert_array_equal(new[name], old[name], err_msg=name)

    points, colours, views = unprojected(old)
    module = load("sonata/export_sonata.py")
    frames = module.job.load_contract(CONTRACT).frames
    moved = frames.to_sonata_frame(points, up=(0, 0, 1), metres_per_unit=1.0).points(points)
    chosen = chosen_one_by_one(moved)
    index, grid = np.array(list(chosen.values())), np.array(list(chosen))
    # Colour alone of what is fed besides: the normals have a test of their own.
    model = module.load_model(torch, str(tmp_path / "sonata.pth"), "cpu")
    cloud = module.cloud_of(old, "depth", 0)
    fed = np.concatenate([moved[index], colours[index] / 255, cloud.normal[index]], -1)
    with torch.inference_mode():
        point = model(
            {
                "coord": torch.tensor(fed[:, :3]).float(),
                "grid_coord": torch.tensor(grid),
                "feat": torch.tensor(fed).float(),
                "offset": torch.tensor([len(fed)]),
            }
        )
    np.testing.assert_allclose(new["sonata/features"], point["feat"], atol=1e-4)
    # Tokens are cells of 4 voxels; their places are in the export's own world.
    cells = sorted({tuple(voxel) for voxel in (grid // 4).tolist()})
    assert len(cells) == len(new["sonata/coord"])
    members = {cell: [] for cell in cells}
    for i, voxel in zip(index, (grid // 4).tolist(), strict=True):
        members[tuple(voxel)].append(i)
    for token, cell in enumerate(cells):
        low, high = points[members[cell]].min(0), points[members[cell]].max(0)
        coord = new["sonata/coord"][token]
        assert (coord > low - 1e-5).all() and (coord < high + 1e-5).all()
        votes = Counter(views[members[cell]].tolist())
        most = max(votes.values())
        assert new["sonata/frame"][token] == min(v for v, n in votes.items() if n == most)


def test_a_scene_without_scale_is_moved_as_a_whole(load, export, write_base, tmp_path):
    base = Export(write_base(tmp_path / "base", scale="scene"))
    assert export("--height", 2.5) == 0
    validate(tmp_path / "out")
    found = Export(tmp_path / "out")
    assert found.manifest["scale"] == "scene" and "2.5 m from floor" in found.manifest["notes"]
    old, new = base.read_scene("a"), found.read_scene("a")
    before, _, _ = unprojected(old)
    after, _, _ = unprojected(new)
    # Up is against the first camera's y; the floor is at 0, the middle 98 % are 2.5 m high.
    low, high = np.quantile(after, [0.01, 0.99], axis=0)
    assert low[2] == pytest.approx(0, abs=2e-3) and high[2] == pytest.approx(2.5, abs=5e-3)
    np.testing.assert_allclose(low[:2], -high[:2], atol=2e-3)
    scale = np.linalg.norm(after[1:] - after[:-1]) / np.linalg.norm(before[1:] - before[:-1])
    np.testing.assert_allclose(
        after[:, 2] - after[0, 2], -scale * (before - before[0])[:, 1], atol=5e-3
    )
    inside = (new["sonata/coord"] > after.min(0) - 0.01) & (
        new["sonata/coord"] < after.max(0) + 0.01
    )
    assert inside.all()


def test_two_runs_and_shards_give_the_same_bytes(export, write_base, tmp_path):
    write_base(tmp_path / "base")
    assert export() == 0 and export(out="again") == 0
    for shard in ("1/2", "0/2"):
        assert export("--shard", shard, out="shards") == 0
    assert export("--merge", out="shards") == 0
    names = ("scenes/a.safetensors", "scenes/b.safetensors", "questions.jsonl")
    for name in names:
        data = (tmp_path / "out" / name).read_bytes()
        assert data == (tmp_path / "again" / name).read_bytes()
        assert data == (tmp_path / "shards" / name).read_bytes()


def test_geodes_batches_have_the_points(export, write_base, tmp_path):
    write_base(tmp_path / "base", boxes=False)
    assert export() == 0
    found = Export(tmp_path / "out")
    tokenizer = train_tokenizer([prompt(record) for record in found.questions()], [], 2)
    config = PipelineConfig(
        export=str(found.folder),
        scenes_per_batch=1,
        questions_per_scene=2,
        question_length=24,
        answer_length=8,
        max_boxes=1,
        rows_per_scene=2,
        row_length=60,
        vision="images",
    )
    batch = Pipeline(found, tokenizer, config, "train").batch(0)
    arrays = found.read_scene("a")
    count = len(arrays["sonata/coord"])
    assert batch.point_mask_SJ.sum() == count
    np.testing.assert_array_equal(batch.point_frame_SJ[0, :count], arrays["sonata/frame"])
    np.testing.assert_array_equal(batch.coord_SJ3[0, :count], arrays["sonata/coord"])


@pytest.fixture(scope="module")
def scanned(upstream, tmp_path_factory) -> Path:
    """Two scans in ScanNet's layout as an export, with true boxes and questions about them."""
    folder = tmp_path_factory.mktemp("scannet")
    for n in range(2):
        write_scan(folder / "in" / "scans", f"scene{n:04d}_00", seed=n)
    prepare("scannet", Request(folder / "in", folder / "base", views=6))
    return folder / "base"


@pytest.mark.parametrize("points", ["depth", "points", "target"])
def test_points_of_vggt_or_the_sensor_lie_on_the_boxes(
    load, export, scanned, tmp_path, monkeypatch, points
):
    """ScanNet, then VGGT, then Sonata: tokens, true boxes and points in one metric world."""
    monkeypatch.setenv("FAKE_VGGT_TRUTH", json.dumps({"export": str(scanned), "wrong": 0.1}))
    given = ["--export", scanned, "--out", tmp_path / "base", "--size", 112, "--commit", "c"]
    assert load("vggt/export_vggt.py").main([str(x) for x in given]) == 0
    assert export("--points", points) == 0
    found, base = Export(tmp_path / "out"), Export(scanned)
    assert validate(found.folder)["alignment"] == validate(tmp_path / "base")["alignment"]
    assert not found.manifest["tokens_contain_depth"] and found.manifest["scale"] == "metric"
    assert list(found.questions()) == list(base.questions())
    for scene in found.scene_ids():
        arrays, old = found.read_scene(scene), base.read_scene(scene)
        boxes = arrays["target/boxes"]
        np.testing.assert_array_equal(boxes, old["target/boxes"])
        # The encoder's cells are 8 cm, and a token's place is the mean of its points.
        coord = arrays["sonata/coord"].astype(np.float64)
        off = np.abs(coord[:, None] - boxes[None, :, :3]) - boxes[None, :, 3:6] / 2
        on = np.abs(off.max(-1)) < 0.14  # the surface of an axis-aligned box
        assert on.any(0).all()
        low, high = np.array([-2.5, -2, 0]), np.array([2.5, 2, 2.6])  # the walls of every scan
        wall = np.minimum(np.abs(coord - low), np.abs(coord - high)).min(-1) < 0.14
        whole = on.any(1) | wall
        # Pixels of wrong depths are off in a cloud of depths.
        assert whole.mean() > (0.85 if points == "depth" else 0.99)


def test_all_that_would_shuffle_is_fixed(load, weights):
    import torch

    model = load("sonata/export_sonata.py").load_model(torch, str(weights), "cpu")
    flags = [
        module.shuffle_orders for module in model.modules() if hasattr(module, "shuffle_orders")
    ]
    assert flags == [False] * 3 and not model.training


def test_missing_colour_is_said_and_zeros_must_be_asked_for(export, write_base, tmp_path, capsys):
    write_base(tmp_path / "base", images=False)
    assert export() == 1
    assert (
        "scene a: the points have no colour: --colour zeros feeds zeros" in capsys.readouterr().err
    )
    assert export("--colour", "zeros", out="zeros") == 0
    assert "colour zeros, normals given" in Export(tmp_path / "zeros").manifest["notes"]


def test_six_channels_need_no_normals(export, write_base, tmp_path):
    write_base(tmp_path / "base")
    six = save_weights(tmp_path / "six.pth", 6)
    assert export("--weights", six) == 0
    five = save_weights(tmp_path / "five.pth", 5)
    assert export("--weights", five, out="five") == 1


def test_normals_of_a_plane_look_at_the_camera(load):
    module = load("sonata/export_sonata.py")
    v, u = np.meshgrid(np.arange(6.0), np.arange(8.0), indexing="ij")
    plane = np.stack([u, v, 10 + 0.5 * u - 0.25 * v], -1)[None]
    known = np.ones((1, 6, 8), bool)
    known[0, 2, 3] = False
    normal = module.image_normals(plane, known, np.zeros((1, 3)))
    expected = np.array([0.5, -0.25, -1]) / np.linalg.norm([0.5, -0.25, -1])
    unknown = {(2, 3), (2, 2), (1, 3)}
    for row in range(6):
        for column in range(8):
            wanted = 0 if (row, column) in unknown else expected
            np.testing.assert_allclose(normal[0, row, column], wanted, atol=1e-12)


def write_ply(path, points, colours, kind):
    names = [("x", "double"), ("y", "double"), ("z", "double")]
    names += [(name, "uchar") for name in ("red", "green", "blue")]
    lines = ["ply", f"format {kind} 1.0", "comment made by a test", f"element vertex {len(points)}"]
    lines += [f"property {kind_} {name}" for name, kind_ in names]
    lines += ["element face 1", "property list uchar int vertex_indices", "end_header"]
    data = "\n".join(lines).encode() + b"\n"
    if kind == "ascii":
        for point, colour in zip(points, colours, strict=True):
            data += f"{' '.join(map(repr, point.tolist()))} {' '.join(map(str, colour))}\n".encode()
        data += b"3 0 1 2\n"
    else:
        order = "<" if "little" in kind else ">"
        rows = np.zeros(len(points), [("p", f"{order}f8", 3), ("c", "u1", 3)])
        rows["p"], rows["c"] = points, colours
        data += rows.tobytes() + b"\3" + bytes(12)
    path.write_bytes(data)


@pytest.mark.parametrize("kind", ["ascii", "binary_little_endian", "binary_big_endian"])
def test_scans_are_read_from_ply(load, tmp_path, kind):
    random = np.random.default_rng(0)
    points, colours = random.normal(size=(7, 3)), random.integers(0, 256, (7, 3))
    write_ply(tmp_path / "s.ply", points, colours, kind)
    module = load("sonata/export_sonata.py")
    cloud = module.read_scan(tmp_path / "s.ply")
    np.testing.assert_array_equal(cloud.points, points)
    np.testing.assert_array_equal(cloud.colour, colours)
    assert cloud.normal is None and cloud.view is None
    data = (tmp_path / "s.ply").read_bytes()
    header = data.index(b"end_header")
    for cut, line in ((header + 60, "no scan: "), (header - 5, "no scan: "), (0, "no scan: ")):
        (tmp_path / "cut.ply").write_bytes(data[:cut])
        with pytest.raises(module.job.InputError, match=line):
            module.read_scan(tmp_path / "cut.ply")


def test_a_scan_in_the_place_of_views(export, write_base, tmp_path, capsys):
    write_base(tmp_path / "base")
    random = np.random.default_rng(0)
    scans = tmp_path / "scans"
    scans.mkdir()
    for scene in "ab":
        points = random.uniform(0, 2, (500, 3))
        fields = {"points": points, "colour": 255 * points / 2, "normal": np.eye(3)[[2] * 500]}
        np.savez(scans / f"{scene}.npz", **fields)
    assert export("--scans", scans) == 0
    arrays = Export(tmp_path / "out").read_scene("b")
    assert "sonata/frame" not in arrays
    assert arrays["sonata/coord"].min() > 0 and arrays["sonata/coord"].max() < 2
    np.savez(scans / "a.npz", points=np.zeros((5, 3)))
    assert export("--scans", scans, out="bare") == 1
    assert "have no colour and no normal: --colour zeros" in capsys.readouterr().err
    (scans / "a.npz").unlink()
    assert export("--scans", scans, out="none") == 1
    assert "a.ply: no such file, nor .npz" in capsys.readouterr().err


def test_nothing_that_is_pickled_is_run(load, export, write_base, tmp_path, capsys):
    import pickle

    import torch

    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / "ran"), "w")

    write_base(tmp_path / "base")
    torch.save({"config": Evil(), "state_dict": {}}, tmp_path / "evil.pth")
    assert export("--weights", tmp_path / "evil.pth") == 1
    assert "evil.pth: no weights: " in capsys.readouterr().err
    module = load("sonata/export_sonata.py")
    np.savez(tmp_path / "a.npz", points=np.array([Evil()], dtype=object))
    (tmp_path / "b.npz").write_bytes(pickle.dumps(Evil()))
    (tmp_path / "c.ply").write_bytes(pickle.dumps(Evil()))
    for name in ("a.npz", "b.npz", "c.ply"):
        with pytest.raises(module.job.InputError):
            module.read_scan(tmp_path / name)
    assert not (tmp_path / "ran").exists()


def test_what_has_no_place_in_the_world_is_refused(export, write_base, tmp_path, capsys):
    write_base(tmp_path / "base", scale="scene", boxes=True)
    assert export() == 1
    assert "questions have boxes but no metric world" in capsys.readouterr().err
    write_base(tmp_path / "silent", scale="scene", boxes=True, questions=0)
    assert export(base="silent") == 1
    assert "target/boxes but no metric world" in capsys.readouterr().err
    assert export("--scans", tmp_path, base="silent", out="scans") == 1
    assert "no metric world that a scan could be in" in capsys.readouterr().err
    assert export("--points", "points", base="silent", out="points") == 1
    assert "no vggt/points, which --points points needs" in capsys.readouterr().err
    for arguments, rule in (
        (("--unsure", 1), "is no share below 1"),
        (("--height", 0), "--height: 0.0 is no length above 0"),
        (("--metres-per-unit", "nan"), "--metres-per-unit: nan is no length above 0"),
        (("--up", 0, 0, 0), "is no direction"),
    ):
        assert export(*arguments) == 1
        assert rule in capsys.readouterr().err
    write_base(tmp_path / "metric")
    assert export("--metres-per-unit", 2, base="metric") == 1
    assert "--metres-per-unit: " in capsys.readouterr().err
    assert export(base="nowhere") == 1
    assert "manifest.json: missing in" in capsys.readouterr().err


def test_the_least_confident_points_are_left_out(load, write_base, tmp_path):
    module = load("sonata/export_sonata.py")
    arrays = Export(write_base(tmp_path / "base")).read_scene("a")
    known = arrays["vggt/depth"] > 0
    sure = arrays["vggt/depth_conf"][known]
    kept = module.cloud_of(arrays, "depth", 0.25)
    assert len(kept.points) == (sure >= np.quantile(sure, 0.25)).sum() < known.sum()
    target = module.cloud_of(arrays, "target", 0.25)  # the true depth has no confidence
    assert len(target.points) == known.sum()
    assert np.unique(kept.view).tolist() == [0, 1, 2]
