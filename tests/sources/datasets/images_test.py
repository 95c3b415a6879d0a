"""Folders of pictures with nerfstudio's cameras, of which every number is worked out by hand."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from geode_jax.errors import UserError
from geode_jax.exports import Export, validate
from geode_jax.sources.datasets import Request, images
from geode_jax.sources.datasets.prepare import prepare
from tests.helpers.videos import write_video

LENS = {"fl_x": 30, "fl_y": 32, "cx": 20, "cy": 10, "w": 40, "h": 20}
GAZES = {
    # Standing at (1, 2, 3), z up: OpenGL's right, up and back of a camera that looks along +x,
    # as columns.
    "10.png": [[0, 0, -1, 1], [-1, 0, 0, 2], [0, 1, 0, 3], [0, 0, 0, 1]],
    # Straight down, the top of the picture towards +y.
    "9.JPG": [[1, 0, 0, 1], [0, 1, 0, 2], [0, 0, 1, 3], [0, 0, 0, 1]],
}


def write_scene(folder: Path, transforms: dict | None = None, names=("9.JPG", "10.png")) -> Path:
    """Writes pictures of one grey each, 10 times their number, twice as large as `LENS` says."""
    folder.mkdir(parents=True)
    for name in names:
        grey = 10 * int(name.split(".")[0])
        Image.new("RGB", (80, 40), (grey,) * 3).save(folder / name)
    if transforms is not None:
        (folder / "transforms.json").write_text(json.dumps(transforms))
    return folder


def transforms(**change) -> dict:
    frames = [
        {"file_path": f"images/{name}", "transform_matrix": pose} for name, pose in GAZES.items()
    ]
    return {**LENS, "k1": 0.0, "camera_model": "PINHOLE", "frames": frames} | change


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(images, "IMAGE_SIDE", 16)


def prepared(tmp_path: Path, **kwargs):
    report = prepare("images", Request(tmp_path / "in", tmp_path / "out", **kwargs))
    return Export(tmp_path / "out"), report


def test_pictures_come_in_natural_order_with_the_cameras_of_their_file(tmp_path):
    write_scene(tmp_path / "in" / "kitchen", transforms())
    export, report = prepared(tmp_path, patch_grid=(4, 8), metric=True)
    assert validate(export.folder)["scenes"] == 1 and export.manifest["scale"] == "metric"
    scene = export.read_scene("kitchen")
    assert sorted(scene) == ["camera/extrinsic", "camera/intrinsic", "images"]
    assert scene["images"].shape == (2, 16, 16, 3)
    np.testing.assert_allclose(scene["images"].mean((1, 2, 3)), [90, 100], atol=1)
    down, ahead = scene["camera/extrinsic"]
    # In the camera that looks down, a point below is ahead, one towards +y is up (y is down).
    np.testing.assert_allclose(down @ [1, 2, 1, 1], [0, 0, 2], atol=1e-6)
    np.testing.assert_allclose(down @ [2, 5, 1, 1], [1, -3, 2], atol=1e-6)
    # In the one that looks along +x, +y is at the left and the floor is below.
    np.testing.assert_allclose(ahead @ [5, 3, 0, 1], [-1, 3, 4], atol=1e-6)
    # Maps have 16 x 8 pixels for 40 x 20: all scaled by 0.4, and 20 is the middle of 40.
    wanted = [[12, 0, 7.5], [0, 12.8, 3.5], [0, 0, 1]]
    np.testing.assert_allclose(scene["camera/intrinsic"], [wanted, wanted], atol=1e-5)
    assert export.manifest["questions"]["count"] == 0 and not report.dropped


def test_single_pictures_and_videos_are_scenes_named_by_their_paths(tmp_path):
    root = tmp_path / "in"
    write_scene(root / "llava_pretrain" / "00453")
    write_video(root / "cooking" / "pot.mp4", 33)
    (root / "odd name.png").write_bytes((root / "llava_pretrain" / "00453" / "10.png").read_bytes())
    export, report = prepared(tmp_path, parts=("files",), views=4, split="70/15/15")
    assert set(export.scene_ids()) == {
        "llava_pretrain_00453_9", "llava_pretrain_00453_10", "cooking_pot",
    }  # fmt: skip
    assert report.dropped == {"file: its name has other characters than letters, digits, . _ -": 1}
    found = export.read_scene("llava_pretrain_00453_10")["images"]
    assert found.shape == (1, 16, 16, 3) and abs(found.mean() - 100) < 1
    video = export.read_scene("cooking_pot")
    assert video["frame_index"].tolist() == [0, 10, 21, 32] and len(video["images"]) == 4
    write_scene(root / "cooking_pot", names=("9.JPG",))
    (root / "cooking_pot.png").write_bytes((root / "odd name.png").read_bytes())
    with pytest.raises(UserError, match=r"cooking_pot.png: would be the scene cooking_pot"):
        prepare("images", Request(root, tmp_path / "b", parts=("files",)))
    with pytest.raises(UserError, match="--part: rooms is not one of folders, files"):
        prepare("images", Request(root, tmp_path / "b", parts=("rooms",)))


def test_without_cameras_the_scale_is_the_scenes(tmp_path):
    write_scene(tmp_path / "in" / "a" / "images", names=[f"{n}.png" for n in range(12)])
    broken = tmp_path / "in" / "a" / "images" / "2.png"
    broken.write_bytes(broken.read_bytes()[:40])
    (tmp_path / "in" / "a" / "images" / "3.HEIC").write_bytes(b"")
    (tmp_path / "in" / "notes").mkdir()
    export, report = prepared(tmp_path, views=3)
    assert export.manifest["scale"] == "scene"
    scene = export.read_scene("a")
    assert sorted(scene) == ["images"]
    # Of 0-3, 4-7 and 8-11 the third each; 2 is broken, so 1 replaces it.
    assert scene["images"].mean((1, 2, 3)).round().tolist() == [10, 60, 100]
    assert report.dropped == {
        "picture: .heic is not read": 1,
        "picture: cannot be read": 1,
        "picture: not among the 3 views": 8,
    }


def test_pictures_and_cameras_without_each_other_are_counted(tmp_path):
    change = transforms()
    change["frames"][0]["file_path"] = "7.png"
    change["frames"].append({"file_path": "8.png", "transform_matrix": np.zeros((4, 4)).tolist()})
    write_scene(tmp_path / "in" / "a", change)
    export, report = prepared(tmp_path)
    assert len(export.read_scene("a")["images"]) == 1
    assert report.dropped == {
        "camera: pose not rigid": 1,
        "camera: its picture does not exist": 1,
        "picture: has no camera in transforms.json": 1,
    }


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        ("{", "not JSON"),
        ({}, "no frames"),
        (transforms(frames=[{}]), "frame 1: must have a file_path"),
        (transforms(frames=2 * transforms()["frames"]), "frame 3: '10.png' is the picture of anot"),
        (transforms(k1=0.1), "frame 1: the pictures are distorted"),
        (transforms(fl_x=None), "frame 1: must have a number fl_x"),
        (transforms(w=40.5), "w and h must be numbers of pixels"),
        (transforms(cx=4), "centre 3.5, 9.5 is at"),
        (transforms(frames=[{"file_path": "9.JPG", "transform_matrix": [[1]]}]), "4 x 4 numbers"),
        (transforms(w=20, cx=10), "1 picture: of another shape|2 picture: of another shape"),
    ],
)
def test_a_scene_with_damaged_cameras_is_refused_in_one_line(tmp_path, content, rule):
    folder = write_scene(tmp_path / "in" / "a")
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "transforms.json").write_text(text)
    with pytest.raises(UserError, match=rule) as caught:
        prepared(tmp_path)
    assert "\n" not in str(caught.value)


def test_what_the_layout_does_not_know_is_refused(tmp_path):
    with pytest.raises(UserError, match="no scene: "):
        prepared(tmp_path)
    write_scene(tmp_path / "in" / "a")
    with pytest.raises(UserError, match=r"--metric: .*in/a has no transforms.json"):
        prepared(tmp_path, metric=True)
    with pytest.raises(UserError, match="--metric: is about the cameras of images, not of scannet"):
        prepare("scannet", Request(tmp_path / "in", tmp_path / "out", metric=True))
    write_scene(tmp_path / "in" / "my room")
    with pytest.raises(UserError, match=r"my room: the name of a scene may have letters"):
        prepared(tmp_path)
