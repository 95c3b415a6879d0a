"""A folder outside the checkout with a configuration, a loss and a reader, as docs/how-to shows."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from geode_jax.errors import UserError
from geode_jax.exports import Export
from geode_jax.runs.config_file import read_settings
from geode_jax.runs.shipped import SHIPPED, config_names, find_config
from geode_jax.runs.systems import SYSTEMS
from tests.helpers.runs import tiny_rooms

REPOSITORY = Path(__file__).resolve().parents[2]
PAGE = REPOSITORY / "docs" / "how-to" / "own_folder.md"
TINY = (
    "data.scenes_per_batch=2 data.questions_per_scene=4 data.rows_per_scene=2 data.row_length=96 "
    "model.width=32 model.layers=2 model.heads=2 model.mlp_width=64 model.cross_layers=(0,) "
    "model.heads_width=16 model.queries=4 model.detection_layers=1 "
    "train.steps=2 train.eval_every=2 train.checkpoint_every=2 "
    "eval.val_scenes=1 eval.test_scenes=1 eval.examples=1"
)


@pytest.fixture
def folder(tmp_path) -> Path:
    """The files of the page, in a folder of their own."""
    code = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(code) == 3
    for text in code:
        (tmp_path / text.split('"""')[1].partition(":")[0]).write_text(text)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        *("my_config.py", "my_losses.py", "my_reader.py")
    ]
    return tmp_path


def run_in(folder: Path, *words: str | Path) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


def test_the_reader_the_configuration_and_the_loss_of_a_folder_work_together(folder):
    scenes = Export(tiny_rooms(folder / "my_rooms")).scene_ids("train")
    (folder / "my_questions").mkdir()
    records = [{"scene": scene, "q": "What is this?", "a": "a room"} for scene in scenes]
    (folder / "my_questions" / "questions.json").write_text(json.dumps(records))
    run_in(folder, "my_reader.py", "my_rooms", "my_questions", "my_export")
    questions = list(Export(folder / "my_export").questions())
    assert [q["answer"] for q in questions[-len(scenes) :]] == ["a room"] * len(scenes)

    overrides = [f"--config.{change}" for change in TINY.split()]
    command = ("-m", "geode_jax.cli.command")
    run_in(folder, *command, "train", "./my_config.py", "--workdir", "run", *overrides)
    assert json.loads((folder / "run" / "config.json").read_text())["model"]["thinking_tokens"] == 4
    assert "depth_reg/smooth" in (folder / "run" / "metrics.jsonl").read_text()
    assert "depth_reg/smooth" not in (REPOSITORY / "geode_jax/objectives/losses.py").read_text()
    (folder / "my_config.py").unlink()
    (folder / "my_losses.py").unlink()
    scene = run_in(folder, *command, "scenes", "--workdir", "run", "--split", "test").split()[0]
    ask = ("ask", "--workdir", "run", "--scene", scene, "--question", "What is this?")
    assert run_in(folder, *command, *ask).endswith("\n")


def test_a_path_makes_its_folder_importable_and_a_name_does_not(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "mine.py").write_text("")
    assert find_config(f"{tmp_path}/mine.py:a=1") == f"{tmp_path}/mine.py:a=1"
    assert sys.path[0] == str(tmp_path)
    before = list(sys.path)
    assert find_config("hidden_cot:thinking=0") == f"{SHIPPED}/hidden_cot.py:thinking=0"
    assert find_config("configs/hidden_cot.py" if Path("configs").is_dir() else "hidden_cot")
    assert sys.path == before


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import nothere", "config: mine.py:1: ModuleNotFoundError: No module named 'nothere'"),
        ("import beside", "config: beside.py:2: ZeroDivisionError: division by zero"),
        ("def config(arg):\n    return 1", "config: mine.py: has no function get_config"),
        ("def get_config(arg=''):\n    return x", "config: mine.py:2: NameError: name 'x' is not"),
        (
            "from geode_jax.configs import hidden_cot\n"
            "def get_config(arg=''):\n    hidden_cot.get_config(arg).model.depth = 1",
            'config: mine.py:3: no such field: Key "depth" does not exist',
        ),
    ],
)
def test_an_error_in_a_configuration_names_its_line(tmp_path, monkeypatch, text, said):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "mine.py").write_text(text)
    (tmp_path / "beside.py").write_text("\n1 / 0")
    with pytest.raises(UserError, match=f"^{re.escape(said)}"):
        read_settings(f"{tmp_path}/mine.py")


@pytest.mark.parametrize("text", ["hidden_coat", "nowhere/hidden_cot.py", "common", ""])
def test_what_is_neither_a_name_nor_a_file_is_refused_with_the_names(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="geode_joint, geode_pretrain, hidden_cot"):
        find_config(text)


def test_the_shipped_configurations_import_each_other_as_installed_ones_do():
    assert config_names() == sorted(SYSTEMS)  # a configuration a system, and no helper module
    for path in SHIPPED.glob("*.py"):
        assert not re.search(r"^(from|import) configs\b", path.read_text(), re.MULTILINE), path
