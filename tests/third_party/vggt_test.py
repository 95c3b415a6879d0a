"""VGGT's exporter, around a small torch model with VGGT's interfaces and known answers."""

import contextlib
import hashlib
import itertools
import json
import os
import struct
import sys
import types

import numpy as np
import pytest
from PIL import Image

from geode_jax.exports import Export, validate

H, W = 28, 56
GRID = (2, 4)


def save_picture(path, view: int, size=(W, H)):
    random = np.random.default_rng(view)
    pixels = random.integers(0, 256, (size[1], size[0], 3)).astype(np.uint8)
    pixels[0, 0, 0] = view
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def root(tmp_path):
    """Three scenes of 12, 3 and 3 views, in folders of `color/N.png`."""
    for scene, views in (("room0", 12), ("room1", 3), ("room2", 3)):
        for view in range(views):
            save_picture(tmp_path / "root" / scene / "color" / f"{view}.png", view)
    return tmp_path / "root"


@pytest.fixture
def export(load, root, tmp_path):
    """The command, with its arguments before those given."""

    def export(*arguments, out="out"):
        given = ["--root", root, "--subfolder", "color", "--size", W, "--commit", "c0ffee"]
        given += ["--out", tmp_path / out, *arguments]
        return load("vggt/export_vggt.py").main([str(argument) for argument in given])

    return export


def own_passes(load, root, scene, views):
    """What the model itself says in one pass, and the pictures."""
    import torch
    from vggt.models.vggt import VGGT

    pictures = [np.asarray(Image.open(root / scene / "color" / f"{v}.png")) for v in views]
    made = load("vggt/export_vggt.py").reconstruct(torch, VGGT(), np.stack(pictures))
    return made, np.stack(pictures)


def test_what_is_written_is_what_the_model_says(load, export, root, tmp_path):
    assert export("--views", 6) == 0
    summary = validate(tmp_path / "out")
    assert summary["scenes"] == 3 and summary["producer"]["commit"] == "c0ffee"
    found = Export(tmp_path / "out")
    assert found.manifest["scale"] == "scene" and found.patch_grid == GRID
    assert "crop" in found.manifest["notes"] and found.token_width == 8
    arrays = found.read_scene("room0")
    made, pictures = own_passes(load, root, "room0", [0, 2, 4, 6, 8, 10])
    np.testing.assert_array_equal(arrays["images"], pictures)
    tokens = np.asarray(arrays["vggt/tokens"], np.float32)
    np.testing.assert_allclose(tokens, made["tokens"].reshape(6, 8, 8), rtol=2**-8)
    camera = np.asarray(arrays["vggt/camera_tokens"], np.float32)
    np.testing.assert_allclose(camera, made["camera_tokens"], rtol=2**-8)
    for name in ("depth", "depth_conf", "points", "points_conf"):
        np.testing.assert_allclose(arrays[f"vggt/{name}"], made[name], rtol=2**-10, atol=1e-3)
    np.testing.assert_array_equal(arrays["camera/extrinsic"], made["extrinsic"])
    np.testing.assert_allclose(arrays["camera/intrinsic"], made["intrinsic"], rtol=1e-6)


def unprojected(arrays):
    """World points of the stored depth by the stored cameras."""
    depth = np.asarray(arrays["vggt/depth"], np.float64)
    _, h, w = depth.shape
    pixel = np.stack([*np.meshgrid(np.arange(w), np.arange(h)), np.ones((h, w))], -1)
    rays = np.einsum("vij,hwj->vhwi", np.linalg.inv(arrays["camera/intrinsic"]), pixel)
    pose = arrays["camera/extrinsic"].astype(np.float64)
    seen = rays * depth[..., None] - pose[:, None, None, :, 3]
    return np.einsum("vji,vhwj->vhwi", pose[:, :, :3], seen)


def test_chunks_are_brought_into_the_first_ones_frame_and_scale(export, tmp_path, capsys):
    assert export() == 0
    assert export("--chunk", 5, "--overlap", 2, out="chunks") == 0
    assert "misfit of chunks at most 0.000" in capsys.readouterr().out
    whole, parts = (Export(tmp_path / name) for name in ("out", "chunks"))
    one, many = whole.read_scene("room0"), parts.read_scene("room0")
    assert "tokens of later chunks" in parts.manifest["notes"]
    for name in ("vggt/depth", "vggt/points", "camera/extrinsic"):
        np.testing.assert_allclose(many[name], one[name], atol=3e-3, err_msg=name)
    np.testing.assert_allclose(unprojected(many), many["vggt/points"], atol=1e-2)


def test_chunks_that_do_not_fit_are_refused(load, export, tmp_path, capsys, monkeypatch):
    module = load("vggt/export_vggt.py")
    once = module.reconstruct
    random = np.random.default_rng(0)

    def wrong(*args):
        made = once(*args)
        return {**made, "points": random.normal(size=made["points"].shape).astype(np.float32)}

    monkeypatch.setattr(module, "reconstruct", wrong)
    assert export("--chunk", 5, "--overlap", 2) == 1
    line = "scene room0: views 3 to 4 do not fit between two chunks (misfit"
    assert line in capsys.readouterr().err
    assert not (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.parametrize(("pool", "pixels"), [(False, 2), (True, 4), (True, 28)])
def test_pooled_tokens_and_other_sizes_stay_consistent(load, export, root, tmp_path, pool, pixels):
    assert export("--pixels", pixels, "--views", 3, *["--pool"] * pool) == 0
    found = Export(tmp_path / "out")
    arrays = found.read_scene("room1")
    made, _ = own_passes(load, root, "room1", range(3))
    tokens = made["tokens"]
    if pool:
        assert found.patch_grid == (1, 2)
        tokens = tokens.reshape(3, 1, 2, 2, 2, 8).mean((2, 4))
    stored = np.asarray(arrays["vggt/tokens"], np.float32)
    np.testing.assert_allclose(stored, tokens.reshape(3, -1, 8), rtol=2**-7, atol=1e-6)
    assert arrays["vggt/depth"].shape[1] == found.patch_grid[0] * pixels
    # A pixel of the smaller map is one of the larger, at most half of its own width away.
    ratio = H // arrays["vggt/depth"].shape[1]
    centre = ratio // 2
    np.testing.assert_array_equal(
        arrays["vggt/points"], made["points"][:, centre::ratio, centre::ratio].astype(np.float16)
    )
    for axis, full in ((0, W), (1, H)):
        intrinsic = arrays["camera/intrinsic"][0, axis]
        u = (centre + 0.5) / ratio - 0.5
        ray = (u - intrinsic[2]) / intrinsic[axis]
        wanted = made["intrinsic"][0, axis]
        assert ray == pytest.approx((centre - wanted[2]) / wanted[axis], abs=1e-5), full


def test_an_odd_grid_is_pooled_by_equal_areas(load):
    area_mean = load("vggt/export_vggt.py").views.area_mean
    tokens = np.random.default_rng(0).normal(size=(2, 3, 5, 4)).astype(np.float32)
    fine = tokens.repeat(2, 1).repeat(2, 2)  # 6 x 10: halves of tokens are whole cells
    wanted = np.stack([fine.reshape(2, 1, 6, 2, 5, 4).mean((2, 4))]).reshape(2, 1, 2, 4)
    np.testing.assert_allclose(area_mean(tokens, (1, 2)), wanted, atol=1e-6)


def test_padding_has_no_depth(export, root, tmp_path):
    for view in range(2):
        save_picture(root / "room1" / "color" / f"{view}.png", view, size=(20, 40))
    for path in (root / "room1" / "color" / "2.png", *(root / "room0" / "color").iterdir()):
        path.unlink()
    (root / "room0" / "color").rmdir()
    assert export("--preprocess", "pad") == 0
    found = Export(tmp_path / "out")
    assert found.scene_ids() == ["room1", "room2"] and found.patch_grid == (4, 4)
    depth, images = (found.read_scene("room1")[name] for name in ("vggt/depth", "images"))
    assert images.shape == (2, 56, 56, 3)
    assert (images[:, :, :14] == 255).all() and (depth[:, :, :14] == 0).all()
    assert (depth[:, :, 14:42] > 0).all()
    wide = found.read_scene("room2")["vggt/depth"]
    assert (wide[:, :14] == 0).all() and (wide[:, 14:42] > 0).all()


def test_shards_fill_one_export_and_a_killed_one_goes_on(
    load, export, root, tmp_path, capsys, monkeypatch
):
    records = [
        {"id": f"q{i}", "scene_id": f"room{i}", "kind": "k", "question": "?", "answer": "a"}
        for i in range(3)
    ]
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(json.dumps(record) + "\n" for record in records))
    splits = tmp_path / "splits.txt"
    splits.write_bytes(b"\xef\xbb\xbfroom1\tval\r\n")
    arguments = ("--questions", questions, "--splits", splits)
    module = load("vggt/export_vggt.py")
    once = module.reconstruct_long
    monkeypatch.setattr(module, "reconstruct_long", lambda *_: exec("raise KeyboardInterrupt"))
    with pytest.raises(KeyboardInterrupt):
        export("--shard", "1/2", *arguments)
    monkeypatch.setattr(module, "reconstruct_long", once)
    assert export("--shard", "0/2", *arguments) == 0
    assert export("--merge", *arguments) == 1
    assert "1 of 3 scenes are not made: room1 " in capsys.readouterr().err
    made_before = (tmp_path / "out" / "scenes" / "room0.safetensors").stat().st_mtime_ns
    assert export("--shard", "0/2", *arguments) == 0
    assert "2 of 2 scenes were made before" in capsys.readouterr().out
    assert export("--shard", "1/2", *arguments) == 0
    changed = next(path for path in (root / "room2").rglob("*") if path.is_file())
    os.utime(changed, ns=(1, 1))
    assert export("--merge", *arguments) == 1
    assert "1 of 3 scenes are not made: room2 " in capsys.readouterr().err
    assert export("--shard", "0/2", *arguments) == 0
    assert "1 scenes are made anew" in capsys.readouterr().out
    assert export("--merge", *arguments) == 0
    assert (tmp_path / "out" / "scenes" / "room0.safetensors").stat().st_mtime_ns == made_before
    summary = validate(tmp_path / "out")
    assert summary["splits"] == {"train": 2, "val": 1} and summary["questions"] == {"k": 3}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "manifest.json",
        "questions.jsonl",
        "scenes",
    ]
    # The same bytes as one process writes.
    assert export(*arguments, out="alone") == 0
    for name in ("scenes/room1.safetensors", "questions.jsonl"):
        assert (tmp_path / "alone" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_pictures_are_those_that_a_person_sees(export, root, tmp_path, capsys):
    """A flag, transparency, 16 bits, a name in capitals; what a Mac leaves beside is no picture."""
    folder, exif = root / "room1" / "color", Image.Exif()
    exif[0x0112] = 6
    seen = [np.asarray(Image.open(folder / f"{n}.png")) for n in range(3)]
    turned = np.ascontiguousarray(seen[0].swapaxes(0, 1)[::-1])
    Image.fromarray(turned).save(folder / "0.PNG", exif=exif)
    grey = seen[1][..., 0].astype(np.uint16) * 256 + 255
    Image.fromarray(grey).save(folder / "1.png")
    clear = np.concatenate([seen[2], np.zeros((H, W, 1), np.uint8)], -1)
    Image.fromarray(clear).save(folder / "2.png")
    (folder / "0.png").unlink()
    (folder / "._2.png").write_bytes(b"Mac OS X")
    assert export() == 0
    images = Export(tmp_path / "out").read_scene("room1")["images"]
    np.testing.assert_array_equal(images[0], seen[0])
    np.testing.assert_array_equal(images[1], np.repeat(seen[1][..., :1], 3, -1))
    assert (images[2] == 255).all()
    (folder / "3.HEIC").write_bytes(b"")
    assert export(out="again") == 1
    assert "3.HEIC: pictures of this kind are not read" in capsys.readouterr().err


def test_a_broken_scene_costs_itself_alone_and_is_counted(export, root, tmp_path, capsys):
    (root / "room1" / "color" / "1.png").write_bytes(b"no picture")
    questions = tmp_path / "q.jsonl"
    record = {"id": "q", "scene_id": "room1", "kind": "k", "question": "?", "answer": "a"}
    questions.write_text(json.dumps(record) + "\n")
    assert export("--questions", questions) == 1
    error = capsys.readouterr().err
    assert "scene room1: " in error and "1.png: no picture" in error
    assert export("--questions", questions, "--merge", "--skip-missing") == 0
    assert "left out: 1 scenes that are not made, 1 questions" in capsys.readouterr().out
    assert Export(tmp_path / "out").scene_ids() == ["room0", "room2"]


def test_another_header_does_not_go_on_an_export(export, capsys):
    assert export("--shard", "0/2") == 0
    assert export("--shard", "1/2", "--views", 5) == 1
    assert "unfinished export of another producer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--shard", "2/2"], "--shard: '2/2' is not I/N"),
        (["--overlap", 0], "needs 0 < --overlap < --chunk"),
        (["--weights", "somebody/else"], "--licence: is needed for the weights somebody/else"),
        (["--subfolder", "rgb"], "0 scenes with 0 different names"),
        (["--scene", "nowhere"], "nowhere/color: no such folder or video"),
        (["--contract", "nowhere"], "nowhere/__init__.py: no such file"),
        (["--size", 50], "--size: 50 is no multiple of the patches' 14 pixels"),
        (["--splits", "nowhere.txt"], "nowhere.txt: cannot be read: No such file"),
    ],
)
def test_bad_input_is_one_line(export, capsys, arguments, line):
    assert export(*arguments) == 1
    error = capsys.readouterr().err.strip()
    assert line in error and error.startswith("export_vggt: ") and "\n" not in error


def only(monkeypatch, package: str, module) -> None:
    """Of the packages that decode videos this one alone is installed, as `module`."""
    for name in ("cv2", "av", "imageio", "imageio.v3"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, package, module)


def leaves_a_pipe_open(test):
    """imageio, where it is installed, does so with ffmpeg's."""
    for warning in ("ResourceWarning", "pytest.PytestUnraisableExceptionWarning"):
        test = pytest.mark.filterwarnings(f"ignore::{warning}")(test)
    return test


@leaves_a_pipe_open
def test_videos_are_decoded_by_what_is_there(load, export, tmp_path, monkeypatch, capsys):
    video = tmp_path / "walk.mp4"
    video.write_bytes(b"none of these can read it")
    module = load("vggt/export_vggt.py").reading
    with pytest.raises(module.job.InputError, match="cannot be decoded") as error:
        module.video_frames(video, 4)
    assert "\n" not in str(error.value)
    frames = [np.full((H, W, 3), i, np.uint8) for i in range(10)]
    v3 = types.SimpleNamespace(imiter=lambda path, **_: iter(frames))
    only(monkeypatch, "imageio", types.SimpleNamespace(v3=v3))
    monkeypatch.setitem(sys.modules, "imageio.v3", v3)
    assert [int(frame[0, 0, 0]) for frame in module.video_frames(video, 4)] == [0, 2, 5, 7]
    assert export("--scene", video, "--views", 4) == 0
    assert Export(tmp_path / "out").read_scene("walk")["images"].shape == (4, H, W, 3)


PICTURE = np.kron([[255, 0, 0], [80, 160, 0]], np.ones((16, 16))).astype(np.uint8)
"""A grey picture that looks different however it is turned."""
TURNED = {0: (1, 0, 0, 1), 90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}
"""Degrees clockwise -> a, b, c, d of the matrix that an mp4 shows its pictures with."""


def write_video(path, degrees: int) -> None:
    """Three grey frames, shown turned clockwise."""
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as video:
        stream = video.add_stream("mpeg4", rate=10)
        stream.height, stream.width = PICTURE.shape
        stream.pix_fmt = "yuv420p"
        for _ in range(3):
            frame = av.VideoFrame.from_ndarray(np.repeat(PICTURE[..., None], 3, -1), "rgb24")
            video.mux(stream.encode(frame))
        video.mux(stream.encode())
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 44  # ISO 14496-12, 8.3.2: rows a b u, c d v, x y w
    for entry, value in zip((0, 1, 3, 4), TURNED[degrees], strict=True):
        data[matrix + 4 * entry : matrix + 4 * entry + 4] = struct.pack(">i", value << 16)
    path.write_bytes(data)


@leaves_a_pipe_open
@pytest.mark.parametrize(
    ("decoder", "package"), [("opencv", "cv2"), ("pyav", "av"), ("imageio", "imageio_ffmpeg")]
)
def test_every_decoder_turns_frames_as_the_file_says(load, tmp_path, decoder, package):
    pytest.importorskip(package)
    decode = getattr(load("vggt/export_vggt.py").reading, f"_{decoder}_frames")
    for degrees in TURNED:
        write_video(tmp_path / "v.mp4", degrees)
        frames = list(decode(tmp_path / "v.mp4"))
        assert len(frames) == 3
        for frame in frames:
            shown = np.rot90(PICTURE, -degrees // 90).astype(int)
            assert frame.shape == (*shown.shape, 3)
            assert np.abs(frame - shown[..., None]).mean() < 8


class Known:
    """Stands in for what PyAV and OpenCV give of a video."""

    CAP_PROP_ORIENTATION_AUTO, CAP_PROP_ORIENTATION_META = "auto", "meta"

    def __init__(self, rotation: int, turns: bool = True):
        self.rotation, self.turns, self.auto = rotation, turns, False

    def open(self, path):
        return contextlib.nullcontext(self)

    def decode(self, video):
        return iter([self, self])

    def to_ndarray(self, format):
        assert format == "rgb24"
        return np.repeat(PICTURE[..., None], 3, -1)

    def VideoCapture(self, path):
        self.left = 2
        return self

    def set(self, name, value):
        self.auto = self.turns and bool(value)
        return self.turns

    def get(self, name):
        return {"auto": float(self.auto), "meta": float(self.rotation % 360)}[name]

    def read(self):
        self.left -= 1
        quarters = self.rotation // 90 if self.auto else 0
        return self.left >= 0, np.rot90(self.to_ndarray("rgb24"), quarters)


def test_what_cannot_be_turned_is_refused(load, monkeypatch):
    module = load("vggt/export_vggt.py").reading
    for package, rotation in itertools.product(("av", "cv2"), (0, 90, -90, -180)):
        only(monkeypatch, package, Known(rotation))
        frames = module.video_frames("v.mp4", 4)
        assert len(frames) == 2
        np.testing.assert_array_equal(frames[1][..., 0], np.rot90(PICTURE, rotation // 90))
    only(monkeypatch, "av", Known(45))
    with pytest.raises(module.job.InputError, match="turned by no quarter"):
        module.video_frames("v.mp4", 4)
    only(monkeypatch, "cv2", Known(90, turns=False))
    with pytest.raises(module.job.InputError, match="does not turn frames"):
        module.video_frames("v.mp4", 4)
    only(monkeypatch, "cv2", Known(0, turns=False))
    assert len(module.video_frames("v.mp4", 4)) == 2


def test_weights_that_would_run_code_are_refused(export, tmp_path, capsys):
    import torch

    trap = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return open, (str(trap), "w")

    for name in ("weights.pt", "weights.safetensors"):
        torch.save({"a": Evil()}, tmp_path / name)
        assert export("--weights", tmp_path / name, "--licence", "l") == 1
        assert f"{name}: no weights: " in capsys.readouterr().err
    assert not trap.exists()


def test_weights_of_a_file_are_those_used(export, tmp_path, capsys):
    import torch
    from vggt.models.vggt import VGGT

    model = VGGT()
    torch.nn.init.zeros_(model.aggregator.embed.weight)
    torch.save(model.state_dict(), tmp_path / "w.pt")
    assert export("--weights", tmp_path / "w.pt", "--licence", "ours") == 0
    tokens = np.asarray(Export(tmp_path / "out").read_scene("room1")["vggt/tokens"], np.float32)
    assert (tokens == tokens[0, 0]).all()  # the bias alone
    digest = hashlib.sha256((tmp_path / "w.pt").read_bytes()).hexdigest()
    producer = Export(tmp_path / "out").manifest["producer"]
    assert producer["weights"] == f"w.pt sha256 {digest}" and producer["licence"] == "ours"
    assert export("--weights", "facebook/VGGT-1B") == 1
    assert "out: is an export already; it is not overwritten" in capsys.readouterr().err
