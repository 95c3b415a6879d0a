"""Frames of videos: which are seen, upright, and no video that is not whole."""

import sys

import numpy as np
import pytest

from geode_jax.exports import UserError
from geode_jax.exports.videos import read_frames, uniform_indices
from tests.helpers.videos import number_of, write_video


def of_the_harness(count: int, frames: int) -> list[int]:
    """lmms-eval's rule in whole numbers: i (count - 1) / (frames - 1), rounded down."""
    return [i * (count - 1) // max(1, frames - 1) for i in range(frames)]


@pytest.mark.parametrize("count", [1, 31, 32, 33, 301])
@pytest.mark.parametrize("frames", [8, 32, 128])
def test_indices_are_those_of_the_harness(count, frames):
    found = uniform_indices(count, frames).tolist()
    assert (
        found
        == of_the_harness(count, frames)
        == np.linspace(0, count - 1, frames).astype(int).tolist()
    )
    assert found[0] == 0 and found[-1] == count - 1


@pytest.mark.parametrize("count", [1, 31, 33, 51])
def test_frames_are_those_of_the_indices(tmp_path, count):
    frames, indices = read_frames(write_video(tmp_path / "v.mp4", count), 8)
    assert indices.tolist() == of_the_harness(count, 8)
    assert [number_of(frame, count) for frame in frames] == indices.tolist()


def test_a_variable_frame_rate_changes_nothing(tmp_path):
    times = np.cumsum([0, *np.random.default_rng(0).integers(1, 90, 30)]).tolist()
    frames, indices = read_frames(write_video(tmp_path / "v.mp4", 31, times=times), 16)
    assert [number_of(frame, 31) for frame in frames] == indices.tolist() == of_the_harness(31, 16)


@pytest.mark.parametrize("turned", [90, 180, 270])
def test_frames_are_turned_by_the_flag(tmp_path, turned):
    frames, indices = read_frames(write_video(tmp_path / "v.mp4", 33, turned=turned), 4)
    assert indices.tolist() == of_the_harness(33, 4)
    plain, _ = read_frames(write_video(tmp_path / "p.mp4", 33), 4)
    for frame, stored in zip(frames, plain, strict=True):
        np.testing.assert_array_equal(frame, np.rot90(stored, -turned // 90))


def test_what_is_no_whole_video_is_one_line(tmp_path, monkeypatch):
    path = write_video(tmp_path / "v.mp4", 40, size=(96, 64))
    data = path.read_bytes()
    moov = data.index(b"moov") - 4
    assert moov > len(data) // 2  # the index is at the end, as cameras write it
    for name, content, rule in (
        ("cut.mp4", data[: len(data) // 2], "no whole video"),
        ("text.mp4", b"not a video", "no whole video"),
        ("empty.mp4", b"", "no whole video"),
        ("damaged.mp4", data[:2000] + bytes(moov - 2500) + data[moov - 500 :], "no whole video"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=rule) as caught:
            read_frames(tmp_path / name, 8)
        assert "\n" not in str(caught.value) and name in str(caught.value)
    with pytest.raises(UserError, match="no such file"):
        read_frames(tmp_path / "none.mp4", 8)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match="needs PyAV: pip install av"):
        read_frames(path, 8)
