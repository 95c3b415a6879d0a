"""Checkpoints: round trip, retention, and a disk that fills up while saving."""

import contextlib
import resource
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from geode_jax.checkpoint import Checkpoints
from geode_jax.errors import UserError
from geode_jax.train_step import TrainState


def state(step: int, size: int = 4096) -> TrainState:
    rng = np.random.default_rng(step)
    return TrainState(
        step=jnp.asarray(step, jnp.int32),
        params={"w": jnp.asarray(rng.normal(size=size), jnp.float32)},
        frozen={},
        opt_state={"m": jnp.asarray(rng.normal(size=size), jnp.float32)},
    )


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_round_trip_keeps_the_latest_two_and_the_best(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(state(0)) is None
        assert checkpoints.restore_best(state(0)) is None
        for step in (1, 2, 3):
            checkpoints.save(state(step), {"step": step, "best": None})
        checkpoints.save_best(state(2), {"step": 2, "best": 0.25})
    assert sorted(p.name for p in (tmp_path / "checkpoints" / "latest").iterdir()) == ["2", "3"]
    with Checkpoints(tmp_path) as checkpoints:
        restored, position = checkpoints.restore(state(0))
        assert position == {"step": 3, "best": None}
        assert_equal(restored, state(3))
        best, position = checkpoints.restore_best(state(0))
        assert position == {"step": 2, "best": 0.25}
        assert_equal(best.params, state(2).params)
        assert_equal(best.opt_state, state(0).opt_state)


def test_another_model_is_refused_in_one_line(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state(1), {"step": 1})
        with pytest.raises(UserError, match=r"step 1 does not fit .* use another --workdir$"):
            checkpoints.restore(state(0, size=8))


@contextlib.contextmanager
def full_disk(limit: int):
    """No file may grow past `limit` bytes: what a full disk does to a writer."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_is_one_line_and_leaves_the_checkpoint_before(tmp_path):
    large = 1_000_000  # random numbers: compression cannot make them fit
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state(1, large), {"step": 1})
        checkpoints.finish()
        with full_disk(100_000), pytest.raises(UserError) as error:
            checkpoints.save(state(2, large), {"step": 2})
            checkpoints.finish()
    assert "could not be written" in str(error.value) and "\n" not in str(error.value)
    with Checkpoints(tmp_path) as checkpoints:
        restored, position = checkpoints.restore(state(0, large))
        assert position["step"] == 1
        assert_equal(restored, state(1, large))
