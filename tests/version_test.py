"""The commit in result files: a stamp, git, or "unknown", never an error."""

import runpy
import shutil
import subprocess
from pathlib import Path

import geode_jax
from geode_jax import version

REPOSITORY = Path(__file__).resolve().parent.parent


def commit_of(folder: Path) -> str:
    """What a copy of the package in a folder finds."""
    (folder / "geode_jax").mkdir(exist_ok=True)
    copy = shutil.copy(REPOSITORY / "geode_jax" / "version.py", folder / "geode_jax")
    return runpy.run_path(copy)["commit"]()


def test_a_folder_without_git_and_without_a_stamp_is_unknown(tmp_path):
    assert commit_of(tmp_path) == "unknown"
    (tmp_path / ".git").mkdir()  # damaged: git refuses it
    assert commit_of(tmp_path) == "unknown"


def test_a_machine_without_git_is_unknown(tmp_path, monkeypatch):
    (tmp_path / ".git").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit_of(tmp_path) == "unknown"


def test_a_checkout_is_the_commit_and_whether_files_were_changed(tmp_path):
    (tmp_path / "file").write_text("1")
    git = ("git", "-c", "user.name=test", "-c", "user.email=test@localhost")
    for words in (("init", "-q"), ("add", "file"), ("commit", "-qm", "test"), ("tag", "v1")):
        subprocess.run([*git, *words], cwd=tmp_path, check=True)
    head = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=tmp_path, text=True)
    assert commit_of(tmp_path) == head[:12]
    (tmp_path / "file").write_text("2")
    assert commit_of(tmp_path) == f"{head[:12]}-dirty"


def test_a_stamp_is_read_before_git_is_asked(tmp_path):
    commit_of(tmp_path)
    (tmp_path / "geode_jax" / version.STAMP).write_text("c0ffee\n")
    assert commit_of(tmp_path) == "c0ffee"


def test_the_command_prints_version_and_commit(run):
    expected = f"geode_jax {geode_jax.__version__} (commit {version.commit()})\n"
    assert run("--version") == (0, expected, "")
    assert not version.software().endswith("(commit )")
