"""VGGT on a metric export, around a model whose geometry is true in a similar world."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from geode_jax.exports import Export, ExportWriter, format_summary, validate
from geode_jax.sources.rgbd.export import make_rgbd_export
from tests.third_party.conftest import scene_arrays

HERE = Path(__file__).resolve().parent
SCRIPT = HERE.parents[1] / "third_party" / "vggt" / "export_vggt.py"


@pytest.fixture
def export(load, tmp_path, monkeypatch):
    """The command on an export, with a VGGT that knows the truth of `truth`."""

    def export(*arguments, base="base", out="out", truth=None, **model):
        truth = {"export": str(tmp_path / (truth or base)), **model}
        monkeypatch.setenv("FAKE_VGGT_TRUTH", json.dumps(truth))
        given = ["--export", tmp_path / base, "--out", tmp_path / out, "--size", 56]
        given += ["--commit", "c0ffee", *arguments]
        return load("vggt/export_vggt.py").main([str(argument) for argument in given])

    return export


def true_points(arrays):
    """World points of the true depth by the true cameras, one by one; where they are known."""
    depth = np.asarray(arrays["target/depth"], np.float64)
    points = np.zeros((*depth.shape, 3))
    for view, row, column in zip(*np.nonzero(depth), strict=True):
        ray = np.linalg.solve(arrays["camera/intrinsic"][view].astype(float), [column, row, 1])
        pose = arrays["camera/extrinsic"][view].astype(np.float64)
        points[view, row, column] = pose[:, :3].T @ (ray * depth[view, row, column] - pose[:, 3])
    return points, depth > 0


def without(source: Path, folder: Path, *names: str, scenes=None) -> Path:
    """Writes an export again without some tensors of some scenes (None: of all)."""
    old = Export(source)
    with ExportWriter(folder, **old.header()) as writer:
        for entry in old.manifest["scenes"]:
            arrays = old.read_scene(entry["id"])
            if scenes is None or entry["id"] in scenes:
                arrays = {n: a for n, a in arrays.items() if n not in names}
            writer.add_scene(entry["id"], arrays, split=entry["split"])
        writer.add_questions(old.questions())
    return folder


def living_room(data_root: Path, tmp_path: Path) -> str:
    """Writes `base`, scenes of ten views of the real RGB-D sequence, and returns what is true."""
    options = {"views_per_scene": 10, "scenes_per_frame": 1, "questions_per_scene": 1}
    options |= {"image_side": 64, "max_frames": 17, "progress": False}
    make_rgbd_export(data_root / "open3d_livingroom1", tmp_path / "base", **options)
    return "base"


def office(data_root: Path, tmp_path: Path) -> str:
    """Writes `base`, 17 real pictures of TUM, which come without depth, and returns what is true.

    The poses and the depth are invented.
    """
    pictures = [Image.open(path) for path in sorted((data_root / "tum_fr3_office_17").iterdir())]
    arrays = scene_arrays(np.random.default_rng(0), views=len(pictures), side=12)
    arrays["images"] = np.stack([np.asarray(p.convert("RGB").resize((64, 48))) for p in pictures])
    about = {"project": "p", "commit": "c", "weights": "w", "licence": "l"}
    header = {"dtype": "float16", "scale": "metric", "token_width": 4, "patch_grid": (2, 2)}
    header |= {"tokens_contain_depth": True, "categories": []}
    with ExportWriter(tmp_path / "true", producer=about, **header) as writer:
        writer.add_scene("office", arrays, split="train")
    kept = ("target/depth", "vggt/depth_conf")  # `vggt/depth` gives the size of the maps
    without(tmp_path / "true", tmp_path / "base", *kept)
    return "true"


@pytest.mark.parametrize(
    ("name", "write"), [("open3d_livingroom1", living_room), ("tum_fr3_office_17", office)]
)
@pytest.mark.parametrize(("wrong", "metres"), [(0.0, 0.01), (0.1, 0.03)])
def test_real_views_come_back_to_the_metric_world(
    data_root, export, tmp_path, name, write, wrong, metres
):
    """Within 1 cm and 0.5 degrees; with a tenth of wrong views and of wrong depths, 3 cm."""
    if not (data_root / name).is_dir():
        pytest.skip(f"real data: no folder {data_root / name}")
    true = Export(tmp_path / write(data_root, tmp_path))
    assert export(truth=true.folder.name, wrong=wrong) == 0
    base, found = Export(tmp_path / "base"), Export(tmp_path / "out")
    aligned = validate(found.folder)["alignment"]
    assert list(aligned) == base.scene_ids()
    for scene, residuals in aligned.items():
        new = found.read_scene(scene)
        points, known = true_points(true.read_scene(scene))
        kept = (np.asarray(new["vggt/depth"]) > 0).any((1, 2))
        lost = max(1, round(wrong * len(kept))) if wrong else 0
        assert residuals["kept"] == kept.sum() == len(kept) - lost
        far = np.linalg.norm(new["vggt/points"] - points, axis=-1)[kept][known[kept]]
        assert far.max() < metres, scene
        assert residuals["centres_m"] < metres and residuals["rotations_deg"] < 0.5
        old = base.read_scene(scene)["camera/extrinsic"]
        np.testing.assert_array_equal(new["camera/extrinsic"], old)


def test_what_the_export_has_stays_and_what_vggt_makes_is_added(export, write_base, tmp_path):
    import torch
    from vggt.models.vggt import VGGT

    base = Export(write_base(tmp_path / "base", views=6))
    assert export() == 0
    found = Export(tmp_path / "out")
    header, producer = found.manifest, found.manifest["producer"]
    assert header["scale"] == "metric" and header["tokens_contain_depth"] is False
    assert found.patch_grid == base.patch_grid and found.token_width == 8
    assert producer["project"] == "p" and producer["weights"] == "facebook/VGGT-1B"
    assert producer["licence"] == "l; VGGT: CC-BY-NC-4.0 (weights)"
    assert list(found.questions()) == list(base.questions())
    old, new = base.read_scene("a"), found.read_scene("a")
    changed = {"vggt/tokens", "vggt/camera_tokens", "vggt/depth", "vggt/depth_conf"}
    changed |= {"vggt/points", "vggt/points_conf"}
    assert new.keys() == old.keys() | changed
    for name in old.keys() - changed:
        np.testing.assert_array_equal(new[name], old[name], err_msg=name)
    known = old["target/depth"] > 0
    np.testing.assert_allclose(new["vggt/depth"][known], old["target/depth"][known], rtol=1e-4)
    np.testing.assert_array_equal(new["vggt/depth_conf"], np.where(known, 3, 1))
    # The tokens of 4 x 4 patches (56 pixels of 14), as means over the export's 2 x 2.
    resized = [np.asarray(Image.fromarray(p).resize((56, 56), 3)) for p in old["images"]]
    images = torch.tensor(np.stack(resized)).permute(0, 3, 1, 2).float()[None] / 255
    with torch.inference_mode():
        layers, start = VGGT().aggregator(images)
    tokens = layers[-1][0, :, start:].reshape(6, 2, 2, 2, 2, 8).mean((2, 4)).reshape(6, 4, 8)
    np.testing.assert_allclose(
        np.asarray(new["vggt/tokens"], np.float32), tokens, rtol=2**-7, atol=1e-3
    )


def test_squeezed_pictures_are_shown_in_their_own_shape(load, write_base, tmp_path):
    """A 4:3 camera, whose pictures were squeezed into a square, as ScanNet's are."""
    onto = load("vggt/export_vggt.py").onto
    arrays = Export(write_base(tmp_path / "base")).read_scene("a")
    arrays["camera/intrinsic"][:, 1, 1] *= 4 / 3  # of 12 x 12 pixels: the height is 3/4
    assert onto.pictures_of(arrays, (12, 12), 56, 14).shape == (3, 42, 56, 3)
    arrays["camera/intrinsic"][:, 0, 0] *= 2
    assert onto.pictures_of(arrays, (12, 12), 56, 14).shape == (3, 56, 42, 3)


def test_without_true_depth_vggts_own_is_the_target(export, write_base, tmp_path):
    base = write_base(tmp_path / "whole", views=6)
    without(base, tmp_path / "base", "target/depth", "vggt/depth", "vggt/depth_conf", scenes=["a"])
    assert export(truth="whole") == 0
    found, summary = Export(tmp_path / "out"), validate(tmp_path / "out")
    assert "depth targets are VGGT's own, weighted, in 1 scenes" in format_summary(summary)
    assert [e["depth_target"] for e in summary["alignment"].values()] == ["vggt", "sensor"]
    assert "depth_relative" not in summary["alignment"]["a"]
    arrays, true = found.read_scene("a"), Export(base).read_scene("a")["target/depth"]
    known = true > 0
    assert arrays["target/depth"].shape == (6, 24, 24)  # the pictures', to which nothing else is
    assert "target/depth_weight" not in found.read_scene("b")
    weight = arrays["target/depth_weight"]
    # Confidence 3 is 1 + exp(log 2): the sigmoid of log 2 is 2/3. Confidence 1 is none at all.
    np.testing.assert_allclose(
        weight, np.where(known, 2 / 3, 0).repeat(2, 1).repeat(2, 2), atol=1e-6
    )


def test_a_scene_that_does_not_fit_costs_itself_alone(export, write_base, tmp_path, capsys):
    write_base(tmp_path / "base", views=6)
    assert export(random=["a"]) == 1
    error = capsys.readouterr().err
    (line,) = [x for x in error.splitlines() if "scene a: " in x]  # after the progress bar
    assert "scene a: VGGT's world does not fit: " in line and "--max-residual is 0.25 m" in line
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert export("--skip-missing", random=["a"]) == 1  # made before: only the bad one is tried
    assert Export(tmp_path / "out").scene_ids() == ["b"]
    assert validate(tmp_path / "out")["alignment"]["b"]["residual_m"] < 0.01
    text = format_summary(validate(tmp_path / "out"))
    assert "aligned to the metric world: 1 scenes, 1 by cameras" in text
    assert "displacement: median" in text and "in b" in text


def test_pictures_alone_get_vggts_own_world(load, tmp_path, monkeypatch):
    monkeypatch.delenv("FAKE_VGGT_TRUTH", raising=False)
    random = np.random.default_rng(0)
    pictures = random.integers(0, 256, (3, 20, 30, 3), np.uint8)
    about = {"project": "p", "commit": "c", "weights": "none", "licence": "l"}
    options = {"token_width": 9, "patch_grid": (2, 2), "tokens_contain_depth": False}
    with ExportWriter(tmp_path / "base", producer=about, scale="scene", dtype="float16",
                      categories=[], notes="videos.", **options) as writer:  # fmt: skip
        writer.add_scene("a", {"images": pictures}, split="test")
    given = ["--export", tmp_path / "base", "--out", tmp_path / "out", "--size", 56]
    given += ["--commit", "c0ffee", "--weights", "w", "--licence", "l"]
    assert load("vggt/export_vggt.py").main(list(map(str, given))) == 0
    out = Export(tmp_path / "out")
    validate(out.folder)
    assert out.manifest["scale"] == "scene" and out.manifest["token_width"] == 8
    arrays = out.read_scene("a")
    np.testing.assert_array_equal(arrays["images"], pictures)
    assert arrays["vggt/tokens"].shape == (3, 4, 8) and arrays["vggt/depth"].shape == (3, 8, 8)
    assert np.abs(arrays["camera/extrinsic"][0] - np.eye(3, 4)).max() < 1e-6
    assert "notes of the export before" in out.manifest["notes"].lower()


def test_a_process_of_its_own_knows_the_truth_by_its_environment(export, write_base, tmp_path):
    write_base(tmp_path / "base", views=6)
    assert export() == 0
    truth = json.dumps({"export": str(tmp_path / "base")})
    environment = {**os.environ, "PYTHONPATH": str(HERE / "fakes"), "FAKE_VGGT_TRUTH": truth}
    command = [sys.executable, SCRIPT, "--export", tmp_path / "base", "--out", tmp_path / "own"]
    command += ["--size", "56", "--commit", "c0ffee"]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    for name in ("scenes/a.safetensors", "questions.jsonl"):
        assert (tmp_path / "own" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "change", "line"),
    [
        (["--views", 5], {}, "--views: is not for --export"),
        (["--max-residual", 0], {}, "--max-residual: 0.0 is no length above 0"),
        ([], {"scale": "scene"}, "scene a: the scene has camera/extrinsic in a world without"),
        ([], {"images": False}, "scene a: the scene has no images, which --export needs"),
    ],
)
def test_bad_input_is_one_line(export, write_base, tmp_path, capsys, arguments, change, line):
    write_base(tmp_path / "base", **change)
    shutil.copytree(write_base(tmp_path / "truth"), tmp_path / "kept")
    assert export(*arguments, truth="truth") == 1
    lines = [x for x in capsys.readouterr().err.splitlines() if line in x]
    assert len(lines) == 1
