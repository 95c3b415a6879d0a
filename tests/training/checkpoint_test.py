"""Checkpoints: round trip, retention, and a disk that fills up while saving."""

import dataclasses
import gc
import logging
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from geode_jax.errors import UserError
from geode_jax.training import checkpoint
from geode_jax.training.checkpoint import Checkpoints
from geode_jax.training.checkpoint_files import fingerprint
from geode_jax.training.step import TrainState
from tests.helpers.full_disk import full_disk
from tests.helpers.own_process import output_of


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


def overwrite(file):
    data = bytearray(file.read_bytes())
    middle = slice(len(data) // 3, 2 * len(data) // 3)
    data[middle] = bytes(255 - x for x in data[middle])
    file.write_bytes(data)


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def pipe(file):
    file.unlink()
    os.mkfifo(file)


def device(file):
    file.unlink()
    file.symlink_to("/dev/zero")


WHICH = ("largest", "manifest.ocdbt", "_METADATA", "_CHECKPOINT_METADATA")


@pytest.mark.parametrize("damage", [overwrite, cut, Path.unlink, pipe, device])
@pytest.mark.parametrize("which", WHICH)
def test_a_damaged_checkpoint_is_put_aside_for_the_one_before(tmp_path, capsys, damage, which):
    with Checkpoints(tmp_path) as checkpoints:
        for step in (1, 2):
            checkpoints.save(state(step), {"step": step})
    latest = tmp_path / "checkpoints" / "latest"
    files = [p for p in (latest / "2").rglob("*") if p.is_file()]
    if which == "largest":
        chosen = [max(files, key=lambda p: p.stat().st_size)]
    else:
        chosen = [p for p in files if p.name == which]
    assert chosen
    for file in chosen:
        damage(file)
    if damage in (pipe, device):
        with pytest.raises(UserError, match="not a regular file"):
            checkpoint.load_model(latest / "2", {"params": state(0).params})
    with Checkpoints(tmp_path) as checkpoints:
        restored, position = checkpoints.restore(state(0))
        assert_equal(restored, state(position["step"]))
        if position["step"] == 2:
            assert which != "largest"  # what is not needed to read it may be damaged
            return
        printed = capsys.readouterr().out
        assert f"{latest / '2'}: damaged" in printed and "going on from step 1" in printed
        checkpoints.save(state(2), {"step": 2})
    assert {p.name for p in latest.iterdir()} == {"1", "2", "damaged_2"}
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(state(0))[1]["step"] == 2


def test_what_a_kill_left_of_a_deleted_checkpoint_is_no_damage(tmp_path, capsys):
    with Checkpoints(tmp_path) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(state(step), {"step": step})
            checkpoints.save_best(state(step), {"step": step})
    folder = tmp_path / "checkpoints"
    for old in (folder / "latest" / "1", folder / "best" / "2"):
        (old / "state").mkdir(parents=True)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(state(0))[1]["step"] == 3
        assert checkpoints.restore_best(state(0))[1]["step"] == 3
    assert "damaged" not in capsys.readouterr().out
    assert {p.name for p in folder.glob("*/*")} == {"2", "3"}


def test_values_that_changed_on_disk_are_noticed(tmp_path, monkeypatch):
    """The fingerprint finds changes that the file format does not."""
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state(1), {"step": 1})
        other = state(2)
        other.params["w"] = other.params["w"].at[7].add(1e-6)
        monkeypatch.setattr(checkpoint, "fingerprint", lambda _, own=fingerprint: own(state(2)))
        checkpoints.save(other, {"step": 2})
        checkpoints.finish()
        monkeypatch.undo()
        assert checkpoints.restore(state(0))[1]["step"] == 1


def test_no_run_starts_from_scratch_where_all_checkpoints_are_damaged(tmp_path, capfd, caplog):
    """The error is one line, without those of the many reads that Orbax abandons."""
    many = dataclasses.replace(state(1), params={f"w{i}": jnp.full(9, i) for i in range(40)})
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(many, {"step": 1})
    folder = tmp_path / "checkpoints" / "latest" / "1"
    for file in folder.rglob("d/*"):
        overwrite(file)
    with (
        Checkpoints(tmp_path) as checkpoints,
        pytest.raises(UserError, match="every checkpoint is damaged"),
    ):
        checkpoints.restore(many)
    assert folder.exists()
    gc.collect()
    printed = capfd.readouterr()
    assert not printed.err and not caplog.records
    assert len(printed.out.splitlines()) == 1


def test_absl_logs_the_messages_of_other_libraries_as_before(tmp_path):
    printed = output_of("tests.training.logger_run", str(tmp_path)).splitlines()
    assert printed == ["a message of another library", str(logging.INFO)]


def test_a_device_that_is_not_there_is_no_damage(tmp_path):
    code = (
        "from pathlib import Path; from geode_jax.training.checkpoint_files import read_metadata; "
        f"read_metadata(Path({str(tmp_path)!r}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "JAX_PLATFORMS": "nonsense"},
        capture_output=True,
        text=True,
    )
    said = done.stderr.strip().splitlines()[-1]
    assert "JAX_PLATFORMS=nonsense: no such device" in said and "damaged" not in said
