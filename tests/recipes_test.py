"""The recipes of launch/recipes: their plans, what they say is missing, and the rehearsal."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from geode_jax.exports import Export
from geode_jax.objectives.losses import TERMS
from tests.docs_test import LOADS_CONFIGS, check_command
from tests.rehearsal.raw import BENCHMARK
from tests.rehearsal.run import RECIPES, REPOSITORY, facts, run

FOLDER = REPOSITORY / "launch" / "recipes"


def planned(recipe: str, tmp_path: Path, *options: str) -> subprocess.CompletedProcess:
    own = {"RAW": str(tmp_path / "raw"), "OUT": str(tmp_path / "out"), "GEODE": "geode-jax"}
    return subprocess.run(
        ["bash", FOLDER / f"{recipe}.sh", *options],
        capture_output=True, text=True, check=False, env=os.environ | own,
    )  # fmt: skip


@LOADS_CONFIGS
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_dry_run_shows_every_command_and_runs_none(recipe, tmp_path, monkeypatch, capsys):
    done = planned(recipe, tmp_path, "--dry-run")
    assert done.returncode == 0 and not list(tmp_path.iterdir())
    steps = re.findall(
        r"^== (\d+)\. .* \(to do\)\n   disk: .+\n   (.+)$", done.stdout, re.MULTILINE
    )
    assert [int(number) for number, _ in steps] == list(range(1, len(steps) + 1))
    used = set()
    for _, line in steps:
        words = shlex.split(line)
        if words[0] == "bash":  # a command whose output is a file
            words = words[words.index("geode-jax") :]
        if words[0] == "geode-jax":
            used.add(words[1])
            check_command(words, monkeypatch, capsys)
        else:
            # An exporter, in an environment of its own, which knows the options.
            script = Path(words[1])
            text = script.read_text() + (script.parent.parent / "export_job.py").read_text()
            options = {word for word in words if word.startswith("--")}
            assert all(f'"{option}"' in text for option in options)
    assert {"prepare", "merge", "train", "convert"} <= used
    names = re.findall(r"^missing: (\S+): .+: .+$", done.stderr, re.MULTILINE)
    text = (FOLDER / f"{recipe}.sh").read_text()
    inputs = re.findall(r"^(?:input|required) (\S+) ", text, re.MULTILINE)
    assert sorted(names) == sorted(inputs)


@pytest.mark.parametrize("recipe", RECIPES)
def test_missing_inputs_end_a_recipe_before_its_first_step(recipe, tmp_path):
    done = planned(recipe, tmp_path)
    assert done.returncode == 2 and not done.stdout and not list(tmp_path.iterdir())
    wanted = r"^error: \d+ inputs are missing; the recipe cannot do without .*vggt"
    assert re.search(wanted, done.stderr, re.M)
    assert re.search(wanted, planned(recipe, tmp_path, "--without-missing").stderr, re.M)
    done = planned(recipe, tmp_path, "--nonsense")
    assert done.returncode == 2 and "Edit two lines" in done.stderr


def test_a_recipe_goes_on_without_what_it_can_spare(tmp_path):
    for name in ("vggt/.venv/bin/python", "tokenizer/tokenizer.json"):
        (tmp_path / "raw" / name).mkdir(parents=True)
    done = planned("hidden_cot", tmp_path, "--without-missing")
    assert done.returncode == 2 and "error: there is no scene to train on" in done.stderr
    (tmp_path / "raw" / "scannet" / "scans").mkdir(parents=True)
    done = planned("hidden_cot", tmp_path)
    assert "4 inputs are missing; --without-missing goes on without them" in done.stderr
    done = planned("hidden_cot", tmp_path, "--without-missing", "--dry-run")
    assert done.returncode == 0
    assert "--source' 'scannet'" in done.stdout and "3d-front" not in done.stdout
    assert "LLaVA-3D's answers" not in done.stdout
    assert "--config.eval.reference=truth" in done.stdout


def test_the_hours_of_a_dry_run_are_those_of_the_plan(tmp_path):
    facts = '{"chip_hours": 12.345, "topology": "h100:1x8", "steps": 50, "scenes_per_batch": 8}'
    program = tmp_path / "geode"
    program.write_text(
        f"#!/bin/sh\ncase \"$*\" in *vision*) echo no compiler >&2; exit 2;; esac\necho '{facts}'\n"
    )
    program.chmod(0o755)
    environment = os.environ | {"RAW": str(tmp_path), "OUT": str(tmp_path), "GEODE": str(program)}
    done = subprocess.run(
        ["bash", FOLDER / "hidden_cot.sh", "--dry-run", "--topology=h100:1x8"],
        capture_output=True, text=True, check=True, env=environment,
    )  # fmt: skip
    assert "at least 12.3 on h100:1x8, for 50 steps of 8 scenes" in done.stdout
    assert done.stdout.count("GPU hours: not planned") == 1 and "no compiler" in done.stderr


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, data_root):
    from tests.rehearsal.raw import write_raw

    folder = tmp_path_factory.mktemp("rehearsal") / "raw"
    write_raw(folder, data_root)
    return folder


@pytest.mark.slow
def test_hidden_cot_from_raw_data_to_the_student(inputs, tmp_path):
    """Every term of eq. 2 learns from what the exporters write."""
    assert run("hidden_cot", inputs, tmp_path) == 0
    found = facts("hidden_cot", tmp_path)
    assert set(found["counts"]) >= set(TERMS) and min(found["counts"].values()) > 0
    assert list(found["scores"]) == ["model", "blind", "vision_removed", "frequency"]
    assert found["weights"]


@pytest.mark.slow
def test_geode_from_raw_data_to_the_score_of_vsi_bench(inputs, tmp_path):
    assert run("geode", inputs, tmp_path) == 0
    found = facts("geode", tmp_path)
    for result in found["scores"].values():
        assert result["questions"] == 30 and not result["scores"]["model"]["missing"]
    columns = list(found["scores"]["model"]["scores"])
    assert columns == ["model", "blind", "vision_removed", "frequency", "random"]
    assert found["weights"]
    # Rooms of the benchmark are on disk, and none was trained on.
    learned = Export(tmp_path / "stage2-vlm3r").scene_ids("train")
    assert not set(BENCHMARK) & set(learned)
