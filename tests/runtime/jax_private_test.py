"""Releases of JAX that have moved the private parts."""

import importlib
import sys

import jax
import pytest

from geode_jax.errors import UserError
from geode_jax.runtime import jax_private


@pytest.fixture
def moved(monkeypatch):
    """The module as a JAX without these parts imports it."""
    for name in ("jax._src.distributed", "jax._src.clusters.cloud_tpu_cluster"):
        monkeypatch.setitem(sys.modules, name, None)
    yield importlib.reload(jax_private)
    monkeypatch.undo()
    importlib.reload(jax_private)


def test_one_process_needs_no_private_part(moved):
    assert moved.process_group() == (None, 0, 1)
    moved.TPU_DEVICES = ()
    assert moved.on_tpu_cluster() is False


def test_several_processes_are_refused_in_one_line(moved, monkeypatch):
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    for needs in (moved.check_process_group, moved.process_group):
        with pytest.raises(UserError, match=r"^processes: jax .*global_state, .* tested with$"):
            needs()


def test_a_tpu_host_is_refused_in_one_line(moved, tmp_path):
    (tmp_path / "accel0").touch()
    moved.TPU_DEVICES = (str(tmp_path / "accel[0-9]*"),)
    with pytest.raises(UserError, match=r"cloud_tpu_cluster.* give --coordinator_address"):
        moved.on_tpu_cluster()


def test_this_jax_has_the_private_parts():
    jax_private.check_process_group()
    assert jax_private.on_tpu_cluster() is False
