"""Locks: one holder, named to the next; gone with its process; waited for where that is wanted."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from geode_jax.errors import UserError
from geode_jax.runtime.lock import LOCK, beside, locked

HOLD = """
import sys, time
from pathlib import Path
from geode_jax.runtime.lock import locked
with locked(Path(sys.argv[1]), "run", must=True):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds a lock."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / LOCK)],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).resolve().parents[2],
    )
    assert process.stdout.readline() == b"held\n"
    with process:
        yield process
        process.kill()


def test_the_second_is_told_who_is_first_and_gets_it_when_that_is_killed(tmp_path, holder):
    told = rf"^run: process {holder.pid} on \S+, since \d{{4}}-.* is at work on it$"
    for _ in range(2):  # asking does not take it away
        with pytest.raises(UserError, match=told), locked(tmp_path / LOCK, "run", must=True):
            pass
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    with (
        locked(tmp_path / LOCK, "run", must=True),
        pytest.raises(UserError, match="at work on it already"),
        locked(tmp_path / LOCK, "run"),
    ):
        pass
    assert f"process {os.getpid()} " in (tmp_path / LOCK).read_text()


def test_who_may_wait_waits(tmp_path, holder, capsys):
    threading.Timer(0.5, holder.kill).start()
    with locked(tmp_path / LOCK, "cache", wait=True):
        assert f"cache: waiting for process {holder.pid} on " in capsys.readouterr().err


def test_a_folder_without_a_place_for_the_lock(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    where = beside(tmp_path / "file" / "out")
    assert where == tmp_path / "file" / ".out.lock"
    with pytest.raises(UserError, match="cannot be written"), locked(where, "run", must=True):
        pass
    with locked(where, "export"):
        assert "export: goes without a lock: " in capsys.readouterr().err
