"""`.sens` files, written from the description of the format without code of the package."""

import dataclasses
import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from geode_jax.errors import UserError
from geode_jax.sources.rgbd.folder import open_folder
from geode_jax.sources.rgbd.intrinsics import resized
from geode_jax.sources.rgbd.sens import open_sens
from geode_jax.sources.rgbd.sequence import Dropped

COLOR_SIZE, DEPTH_SIZE = (24, 16), (12, 8)
COLOR_K = np.array([[20, 0, 12.5, 0], [0, 21, 7.5, 0], [0, 0, 1, 0], [0, 0, 0, 1]], "f4")
DEPTH_K = np.array([[10, 0, 6, 0], [0, 10.5, 3.5, 0], [0, 0, 1, 0], [0, 0, 0, 1]], "f4")
LOST = np.full((4, 4), -np.inf, "f4")


def encoded(image: np.ndarray, kind: str) -> bytes:
    """Returns a picture [h, w, 3] as JPEG or PNG bytes."""
    out = io.BytesIO()
    Image.fromarray(image).save(out, kind)
    return out.getvalue()


def sens_bytes(
    frames,
    *,
    color_k=COLOR_K,
    depth_k=DEPTH_K,
    sizes=(*COLOR_SIZE, *DEPTH_SIZE),
    color=2,
    depth=1,
    version=4,
    shift=1000.0,
    count=None,
) -> bytes:
    """Returns a file of (pose [4, 4], colour bytes, depth bytes) and two inertial records."""
    eye = np.eye(4, dtype="<f4").tobytes()
    parts = [
        struct.pack("<IQ", version, 6) + b"sensor",
        color_k.astype("<f4").tobytes() + eye + depth_k.astype("<f4").tobytes() + eye,
        struct.pack(
            "<ii4IfQ", color, depth, *sizes, shift, len(frames) if count is None else count
        ),
    ]
    for n, (pose, color_bytes, depth_bytes) in enumerate(frames):
        parts.append(np.asarray(pose, "<f4").tobytes())
        parts.append(struct.pack("<4Q", 33 * n, 33 * n + 1, len(color_bytes), len(depth_bytes)))
        parts += [color_bytes, depth_bytes]
    return b"".join([*parts, struct.pack("<Q", 2), bytes(160)])


def pose_of(n: int) -> np.ndarray:
    """Returns a pose for each frame: a quarter turn about z and a step."""
    cos, sin = [(1, 0), (0, 1), (-1, 0), (0, -1)][n % 4]
    pose = np.eye(4)
    pose[:2, :2], pose[:3, 3] = [[cos, -sin], [sin, cos]], [n, 0.5 * n, 1.5]
    return pose


def three_frames(kind: str = "JPEG", pack=zlib.compress):
    """Returns (frames, the pictures as PIL decodes them, the stored depths)."""
    rng = np.random.default_rng(0)
    frames, pictures, depths = [], [], []
    for n in range(3):
        picture = encoded(rng.integers(0, 256, (*COLOR_SIZE[::-1], 3), np.uint8), kind)
        depth = rng.integers(0, 5000, DEPTH_SIZE[::-1]).astype("<u2")
        depth[0, :2] = 0, 65535
        frames.append((LOST if n == 1 else pose_of(n), picture, pack(depth.tobytes())))
        pictures.append(np.asarray(Image.open(io.BytesIO(picture))))
        depths.append(depth)
    return frames, pictures, depths


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        open_sens(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("kind", "color", "depth", "pack"),
    [("JPEG", 2, 1, zlib.compress), ("PNG", 1, 0, bytes)],
    ids=["jpeg and zlib", "png and raw"],
)
def test_frames_are_read_exactly_and_in_any_order(tmp_path, kind, color, depth, pack):
    frames, pictures, depths = three_frames(kind, pack)
    sens = open_sens(write(tmp_path / "a.sens", sens_bytes(frames, color=color, depth=depth)))
    assert (sens.sensor, sens.names) == ("sensor", ("0", "1", "2"))
    for n in (2, 0, 1, 2):
        np.testing.assert_array_equal(np.asarray(sens.read_color(str(n))), pictures[n])
        np.testing.assert_array_equal(sens.read_stored_depth(str(n)), depths[n])
        metres = sens.read_depth(str(n))
        assert metres.dtype == np.float32 and metres[0, :2].tolist() == [0, 0]
        np.testing.assert_allclose(metres[1:], depths[n][1:] / 1000, rtol=1e-6)
    for n in (0, 2):
        np.testing.assert_allclose(sens.read_pose(str(n)), pose_of(n), atol=1e-6)
    with pytest.raises(Dropped, match="not finite"):
        sens.read_pose("1")


def test_real_frames_are_the_same_from_a_file_and_from_folders(tmp_path, data_root):
    folder = open_folder(data_root / "open3d_livingroom1")
    names, frames, size = folder.names[:3], [], folder.read_color(folder.names[0]).size
    for name in names:
        (picture,) = (folder.folder / "color").glob(f"{name}.*")
        with Image.open(folder.folder / "depth" / f"{name}.png") as image:
            depth = np.asarray(image).astype("<u2")
        pose = np.loadtxt(folder.folder / "pose" / f"{name}.txt")
        frames.append((pose, picture.read_bytes(), zlib.compress(depth.tobytes())))
    kind = 1 if picture.suffix == ".png" else 2
    matrix = np.eye(4)
    matrix[:3, :3] = folder.depth_intrinsic
    sizes = (*size, *folder.depth_size)
    data = sens_bytes(frames, color_k=matrix, depth_k=matrix, sizes=sizes, color=kind)
    sens = open_sens(write(tmp_path / "a.sens", data))
    assert (sens.color_size, sens.depth_size) == (size, folder.depth_size)
    for n, name in enumerate(names):
        np.testing.assert_array_equal(sens.read_depth(str(n)), folder.read_depth(name))
        np.testing.assert_array_equal(sens.read_color(str(n)), folder.read_color(name))
        np.testing.assert_allclose(sens.read_pose(str(n)), folder.read_pose(name), atol=1e-6)


def test_depth_is_metres_by_the_files_own_shift(tmp_path):
    frames, _, depths = three_frames()
    sens = open_sens(write(tmp_path / "a.sens", sens_bytes(frames, shift=5000.0)))
    np.testing.assert_allclose(sens.read_depth("0")[1:], depths[0][1:] / 5000, rtol=1e-6)


def test_intrinsics_belong_to_their_images_and_go_to_the_depths_size(tmp_path):
    sens = open_sens(write(tmp_path / "a.sens", sens_bytes(three_frames()[0])))
    np.testing.assert_allclose(sens.color_intrinsic, COLOR_K[:3, :3])
    np.testing.assert_allclose(sens.depth_intrinsic, DEPTH_K[:3, :3])
    # Half as large: the focal length halves, the pixel's edge (centre + 1/2) halves.
    scaled = resized(sens.color_intrinsic, sens.color_size, sens.depth_size)
    wanted = [[10, 0, (12.5 + 0.5) / 2 - 0.5], [0, 10.5, (7.5 + 0.5) / 2 - 0.5], [0, 0, 1]]
    np.testing.assert_allclose(scaled, wanted)


def test_intrinsics_that_are_for_larger_pictures_are_scaled(tmp_path):
    frames, _, _ = three_frames()
    sens = open_sens(write(tmp_path / "a.sens", sens_bytes(frames, sizes=DEPTH_SIZE * 2)))
    wanted = resized(COLOR_K[:3, :3], COLOR_SIZE, DEPTH_SIZE)
    np.testing.assert_allclose(sens.color_intrinsic, wanted)
    np.testing.assert_allclose(sens.depth_intrinsic, DEPTH_K[:3, :3])
    (note,) = sens.notes
    assert note.endswith("a.sens: colour: is for pictures of 24 x 16, these are 12 x 8: scaled")
    aside = COLOR_K.copy()
    aside[0, 2] += 6
    rule = "colour: the centre 18.5, 7.5 is at 0.79, 0.50 of the sides of pictures of 24 x 16"
    assert rule in refusal(write(tmp_path / "b.sens", sens_bytes(frames, color_k=aside)))


def test_a_truncated_file_is_refused_with_the_frame(tmp_path):
    frames, _, _ = three_frames()
    whole = sens_bytes(frames)
    inertial = 8 + 160
    last = len(whole) - inertial
    first_two = sens_bytes(frames[:2], count=3)[:-inertial]
    path = tmp_path / "a.sens"
    open_sens(write(path, whole[:last]))  # lost inertial data do not matter
    for cut in (last - 1, len(first_two) + 50, len(first_two)):
        assert refusal(write(path, whole[:cut])).endswith("truncated in frame 2 of 3")
    for cut in (0, 3, 11, 15, 100, 300):
        assert "truncated in the header" in refusal(write(path, whole[:cut]))


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"version": 3}, "version 3 of .sens; 4 is read"),
        ({"color": 0}, "colour is compressed as raw; read are jpeg and png"),
        ({"color": -1}, "colour is compressed as unknown"),
        ({"depth": 2}, "depth is compressed as occi_ushort; read are zlib_ushort and raw_ushort"),
        ({"depth": 77}, "depth is compressed as 77"),
        ({"shift": 0.0}, "depth_shift 0.0 is no number"),
        ({"shift": float("nan")}, "depth_shift nan"),
        ({"sizes": (0, 16, 12, 8)}, "images of"),
        ({"depth_k": -DEPTH_K}, "are no camera"),
        ({"color_k": np.full((4, 4), np.nan, "f4")}, "are no camera"),
        ({"count": 2**63}, f"truncated in frame 3 of {2**63}"),
    ],
)
def test_what_is_not_read_is_refused_by_name(tmp_path, changes, rule):
    frames, _, _ = three_frames()
    assert rule in refusal(write(tmp_path / "a.sens", sens_bytes(frames, **changes)[:-168]))


def test_a_file_of_something_else_is_refused(tmp_path):
    assert "no such file" in refusal(tmp_path / "none.sens").lower()
    assert "version" in refusal(write(tmp_path / "a.sens", b"\x80\x04cposix\nsystem\n(X"))


def test_damaged_frames_are_dropped_with_the_reason(tmp_path):
    frames, _, _ = three_frames()
    pose, picture, depth = frames[0]
    other = encoded(np.zeros((5, 5, 3), np.uint8), "JPEG")
    png = encoded(np.zeros((*COLOR_SIZE[::-1], 3), np.uint8), "PNG")
    bomb = zlib.compress(bytes(1 << 20))
    empty = zlib.compress(bytes(2 * DEPTH_SIZE[0] * DEPTH_SIZE[1]))
    cases = [
        (picture[:100], depth, "unreadable colour"),
        (other, depth, "colour image of another size"),
        (png, depth, "unreadable colour"),  # not the codec of the header
        (b"", depth, "unreadable colour"),
        (picture, depth[:-9] + b"???", "depth image"),
        (picture, b"", "depth image of another size"),
        (picture, bomb, "depth image of another size"),
        (picture, empty, "no depth"),
    ]
    data = sens_bytes([(pose, color, depth) for color, depth, _ in cases])
    sens = open_sens(write(tmp_path / "a.sens", data))
    for name, (_, _, reason) in zip(sens.names, cases, strict=True):
        read = sens.read_color if "colour" in reason else sens.read_depth
        with pytest.raises(Dropped, match=reason):
            read(name)


@given(st.data())
def test_no_damage_raises_anything_but_one_line(tmp_path_factory, data):
    frames, _, _ = three_frames()
    damaged = bytearray(sens_bytes(frames))
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, 500))] = data.draw(st.integers(0, 255))
    del damaged[data.draw(st.integers(0, len(damaged))) :]
    path = write(tmp_path_factory.mktemp("damaged") / "a.sens", bytes(damaged))
    try:
        sens = open_sens(path)
    except UserError as error:
        assert "\n" not in str(error)
        return
    for name in sens.names:
        for read in (sens.read_color, sens.read_depth, sens.read_pose):
            try:
                read(name)
            except Dropped:
                continue


def test_a_reader_holds_no_file_open(tmp_path):
    sens = open_sens(write(tmp_path / "a.sens", sens_bytes(three_frames()[0])))
    assert not any(hasattr(value, "fileno") for value in vars(sens).values())
    moved = dataclasses.replace(sens, path=sens.path.rename(tmp_path / "b.sens"))
    assert moved.read_depth("0").shape == DEPTH_SIZE[::-1]
