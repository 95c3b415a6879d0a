"""What every test shares: no network, one compilation cache, checked annotations, real data."""

import os
import signal
import time
from importlib.metadata import version
from pathlib import Path

import hypothesis
import pytest

from tests.helpers import annotations

REPOSITORY = Path(__file__).resolve().parent.parent
CACHE_DAYS = 7

# Before anything imports jax or transformers; processes that tests start inherit both.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
# Compiling is most of what small tests do; how fast tiny programs run is no matter.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
if version("jaxlib").startswith("0.10."):  # a newer XLA ends the process at a flag it lost
    quick = "--xla_cpu_use_fusion_emitters=false"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {quick}".strip()

annotations.install()

# A busy machine is no failure; in CI the same examples every time.
hypothesis.settings.register_profile("local", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")


def pytest_configure(config: pytest.Config) -> None:
    """Keeps compiled programs between runs: compiling is most of what small tests do."""
    # A shell's background job ignores Ctrl-C, and so would everything that tests start.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    cache = config.cache.mkdir("jax")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
    oldest = time.time() - CACHE_DAYS * 24 * 3600
    for entry in cache.iterdir():
        if entry.stat().st_mtime < oldest:
            entry.unlink(missing_ok=True)


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of real data, GEODE_JAX_DATA; a test that needs it is skipped without."""
    folder = Path(os.environ.get("GEODE_JAX_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"real data: no folder {folder} (set GEODE_JAX_DATA)")
    return folder


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """A finished run of three steps on twelve rooms (`tests.helpers.runs.TinyRun`); read only."""
    from tests.helpers.runs import make_tiny_run

    return make_tiny_run(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def geode_runs(tmp_path_factory):
    """Finished runs of GEODE's stages: pretrain, drm, joint (`helpers.runs.TinyRun`); read only."""
    from tests.helpers.runs import make_tiny_geode_runs

    return make_tiny_geode_runs(tmp_path_factory.mktemp("geode"))


@pytest.fixture(scope="session")
def geode_export(tmp_path_factory):
    """Four train and two val scenes of `write_geode_export`; read only."""
    from tests.helpers.exports import write_geode_export

    return write_geode_export(tmp_path_factory.mktemp("exports") / "geode")


@pytest.fixture(scope="session")
def tiny_export(tmp_path_factory):
    """Seven train and three val scenes; read only: whoever breaks files makes an own copy."""
    from tests.helpers.exports import write_tiny_export

    return write_tiny_export(tmp_path_factory.mktemp("exports") / "tiny")


@pytest.fixture
def run(capfd):
    """Runs a command: (exit status, stdout, stderr)."""
    from geode_jax.cli.command import main

    def call(*arguments) -> tuple[int, str, str]:
        status = 0
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as end:
            status = end.code
        return status, *capfd.readouterr()

    return call


@pytest.fixture(scope="session")
def torch():
    return pytest.importorskip("torch", reason="PyTorch, the reference implementation, is absent")
