"""The wheel, installed outside the checkout, trains and answers (make test-slow, test-smoke)."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import geode_jax

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parents[2]
TINY = (
    "data.rooms_scenes=12 data.scenes_per_batch=2 data.questions_per_scene=4 "
    "data.rows_per_scene=2 model.width=32 model.layers=2 model.heads=2 model.mlp_width=64 "
    "model.cross_layers=(0,) model.heads_width=16 model.queries=4 model.detection_layers=1 "
    "train.steps=3 train.eval_every=3 train.checkpoint_every=3 "
    "eval.val_scenes=1 eval.test_scenes=1 eval.examples=1"
)


def output_of(*command: str | Path, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel of the files of this checkout, built from a copy that is a git repository."""
    folder = tmp_path_factory.mktemp("wheel")
    listed = output_of("git", "ls-files", "-co", "--exclude-standard", cwd=REPOSITORY)
    for name in listed.splitlines():
        source, copy = REPOSITORY / name, folder / "checkout" / name
        if os.path.lexists(source):
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, copy, follow_symlinks=False)
    git = ("git", "-c", "user.name=test", "-c", "user.email=test@localhost")
    for words in (("init", "-q"), ("add", "-A"), ("commit", "-qm", "test")):
        output_of(*git, *words, cwd=folder / "checkout")
    pip = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation")
    output_of(*pip, "--wheel-dir", folder, ".", cwd=folder / "checkout")
    (found,) = folder.glob("*.whl")
    return found


def test_the_wheel_has_the_configurations_the_types_and_the_commit(wheel):
    commit = output_of("git", "rev-parse", "HEAD", cwd=wheel.parent / "checkout").strip()
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        assert archive.read("geode_jax/COMMIT").decode().strip() == commit[:12]
    assert {"geode_jax/configs/hidden_cot.py", "geode_jax/configs/common.py"} <= names
    assert {"geode_jax/py.typed", "geode_jax/plan/targets/h100.txtpb"} <= names
    assert all(name.startswith("geode_jax") for name in names)


def test_an_installed_wheel_trains_and_answers_outside_the_checkout(wheel, tmp_path):
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    pip = (sys.executable, "-m", "pip", "install", "--no-deps", "--target", site)
    output_of(*pip, wheel, cwd=elsewhere)
    own = {"PYTHONPATH": str(site)}

    def command(*words: str) -> str:
        return output_of(site / "bin" / "geode-jax", *words, cwd=elsewhere, **own)

    version = command("--version").strip()
    assert version.startswith(f"geode_jax {geode_jax.__version__} (commit ")
    imported = output_of(
        *(sys.executable, "-c", "import geode_jax.configs.geode as m; print(m.__file__)"),
        cwd=elsewhere,
        **own,
    )
    assert Path(imported.strip()).is_relative_to(site)

    overrides = [f"--config.{change}" for change in TINY.split()]
    command("train", "hidden_cot", "--workdir", "x", *overrides)
    scene = command("scenes", "--workdir", "x", "--split", "test").splitlines()[0]
    predictions = (elsewhere / "x" / "predictions.jsonl").read_text().splitlines()
    expected = next(p for p in map(json.loads, predictions) if p["scene_id"] == scene)
    answer = command("ask", "--workdir", "x", "--scene", scene, "--question", expected["question"])
    assert answer == expected["prediction"] + "\n"
    assert version in (elsewhere / "x" / "summary.json").read_text()
    assert {path.name for path in elsewhere.iterdir()} == {"x", "data"}
