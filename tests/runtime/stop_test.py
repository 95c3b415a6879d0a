"""SIGTERM and Ctrl-C: obeyed while the main thread is away, deferred while something is unsaved."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = """
import gc, hashlib, signal, sys, threading, time
from geode_jax.runtime import stop as stopping
from geode_jax.cli.reported import reported
stopping.GRACE_SECONDS = 0.3

def away():
    "As XLA's compiler does: a minute without a Python instruction, and without Python's lock."
    hashlib.pbkdf2_hmac("sha256", b"", b"", 200_000_000)

def python():
    while True:
        time.sleep(0.01)

def collecting():
    "A signal within a callback of the garbage collector, whose exceptions Python drops."
    gc.callbacks.append(lambda *_: [time.sleep(0.01) for _ in range(200) if not stop.signum])
    gc.collect()
    python()

def unsaved():
    stop.unsaved = True
    with stop.deferred():
        while not stop.signum:
            time.sleep(0.01)
        time.sleep(1)
        print("saving", flush=True)
        stop.unsaved = False
        raise stopping.Stopped(stop.signum, "at step 7, saved")

with reported(), stopping.Stop() as stop:
    threading.Timer(0.2, lambda: print("ready", flush=True)).start()
    try:
        globals()[sys.argv[1]]()
    except stopping.Stopped as stopped:
        print(stopped.line, flush=True)
        raise
"""


@pytest.mark.parametrize(
    ("doing", "number", "code", "said"),
    [
        ("away", signal.SIGTERM, 143, "stopped by SIGTERM before its end, nothing is lost; "),
        ("python", signal.SIGINT, 130, "stopped by Ctrl-C before its end, nothing is lost; "),
        ("collecting", signal.SIGINT, 130, "stopped by Ctrl-C before its end, nothing is lost; "),
        ("unsaved", signal.SIGINT, 130, "saving\nstopped by Ctrl-C at step 7, saved; "),
    ],
)
def test_a_signal_ends_the_process_with_one_line(doing, number, code, said):
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT, doing],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).resolve().parents[2],
    ) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        asked = time.monotonic()
        out, err = process.communicate(timeout=50)
    assert time.monotonic() - asked < 10
    assert (process.returncode, err) == (code, "")
    assert out == said + "the same command resumes\n"
