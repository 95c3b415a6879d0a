"""The user's cache: where it is, and processes that have no home or may not write there."""

import os
import pwd
from pathlib import Path

import pytest

from geode_jax.runtime.user_cache import NO_HOME, name_a_home, user_cache


@pytest.fixture
def without_home(monkeypatch, tmp_path):
    """As in a container whose user the system does not know; the working folder is empty."""

    def unknown(uid):
        raise KeyError(uid)

    monkeypatch.setenv("HOME", "")  # restored after the test
    monkeypatch.delenv("HOME")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.chdir(tmp_path)


def test_the_cache_is_below_the_home_or_where_the_variable_says(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert user_cache("xla") == tmp_path / ".cache" / "geode_jax" / "xla"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    assert user_cache("xla") == tmp_path / "other" / "geode_jax" / "xla"
    assert (tmp_path / "other" / "geode_jax" / "xla").is_dir()


def test_a_process_without_a_home_has_no_cache_and_makes_no_folder(without_home, tmp_path):
    assert os.path.expanduser("~") == "~"
    name_a_home()
    assert os.environ["HOME"] == NO_HOME
    if os.getuid():  # root may make that folder
        assert user_cache("xla") is None
    assert not list(tmp_path.iterdir())


def test_where_nothing_can_be_written_there_is_no_cache(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert user_cache("xla") is None


def test_a_home_that_is_there_stays(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    name_a_home()
    assert Path(os.environ["HOME"]) == tmp_path
