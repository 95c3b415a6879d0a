"""What all exporters have in common: old Pythons, no package of ours, no pickle, one launcher."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from geode_jax.exports import validate

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted((ROOT / "third_party").rglob("*.py"))
STANDALONE = sorted((ROOT / "geode_jax" / "exports").glob("*.py"))


def calls(tree):
    """Every call `a.b(...)` as ("a.b", node)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


@pytest.mark.parametrize("path", [*SCRIPTS, *STANDALONE], ids=lambda path: path.stem)
def test_they_run_on_old_pythons_without_our_package_and_without_pickle(path):
    tree = ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 9))
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").split(".")[0])
    assert not imported & {"geode_jax", "jax", "pickle", "dill", "joblib"}
    assert not {name for name, _ in calls(tree)} & {"eval", "exec"}
    for name, node in calls(tree):
        options = {option.arg: ast.unparse(option.value) for option in node.keywords}
        if name == "torch.load":
            assert options["weights_only"] == "True"
        if name == "np.load":
            assert options["allow_pickle"] == "False"


def test_every_exporter_says_how_it_is_installed_and_licensed():
    folders = {path.parent for path in SCRIPTS if path.parent.name != "third_party"}
    assert {folder.name for folder in folders} == {"vggt", "sonata", "llava3d"}
    for folder in folders:
        text = (folder / "README.md").read_text(encoding="utf-8")
        for word in ("Commit", "Licence", "Install", "--out", "Size and time"):
            assert word in text, (folder.name, word)


RUN = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    bad = [m for m in sys.modules if m.split(".")[0] in ("geode_jax", "jax")]
    assert not bad, bad
    sys.exit(end.code)
"""


def test_a_process_of_its_own_imports_nothing_of_ours(upstream, tmp_path):
    pictures = tmp_path / "data" / "room"
    pictures.mkdir(parents=True)
    for i in range(2):
        Image.new("RGB", (28, 28), (i, 9, 9)).save(pictures / f"{i}.png")
    script = ROOT / "third_party" / "vggt" / "export_vggt.py"
    command = [sys.executable, "-c", RUN, script, "--scene", pictures, "--size", "28"]
    command += ["--out", tmp_path / "out", "--commit", "c", "--device", "cpu"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent / "fakes")}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert validate(tmp_path / "out")["scenes"] == 1


def test_splits_are_given_by_a_list_whose_every_entry_counts(load, tmp_path, capsys):
    job, table = load("vggt/export_vggt.py").job, tmp_path / "splits"
    scans = ("room0", "scene0001_00", "scene0001_01")
    for data in (
        b"\xef\xbb\xbfscene0001_00 val\r\nscene0001_01\tval\r\n",
        b"scene0001_00,val\n\n# and\nscene0001_01,val,\n",
        b'[["scene0001_00", "val"], ["scene0001_01", "val"]]',
    ):
        table.write_bytes(data)
        splits = job.splits_of(scans, "train", table)
        assert splits == {"room0": "train", "scene0001_00": "val", "scene0001_01": "val"}
    for text, rule in (
        ("room0 val\nRoom0 val\nroom test", "line 2: 'Room0' is no scene of this job, nor are 1"),
        ("room0 eval", "line 1: 'eval' is none of train, val, test"),
        ("scene0001_00 test", "scene0001_01, a scan of the same room, of train: list both"),
        ("room0", "line 1: must have 2 words"),
    ):
        table.write_text(text)
        with pytest.raises(ValueError, match=rule) as caught:
            job.splits_of(scans, "train", table)
        assert str(caught.value).startswith(str(table))
    table.write_text("Room0 val\n")
    with pytest.raises(ValueError, match=r"'Room0' is no scene .*no entry of the table is"):
        job.splits_of(scans, "train", table, allow_missing=True)
    table.write_text("room0 val\nRoom0 val\n")
    assert job.splits_of(scans, "train", table, allow_missing=True)["room0"] == "val"
    assert capsys.readouterr().err == f"{table}: 1 entries name no scene of this job\n"


def test_the_launcher_makes_every_shard_and_then_the_manifest(tmp_path):
    text = (ROOT / "launch" / "export_array.sbatch").read_text(encoding="utf-8")
    lines = text.splitlines()
    assert sum(line.startswith(("ENVIRONMENT=", "EXPORT=")) for line in lines) == 2
    bin_folder = tmp_path / "an env" / "bin"
    bin_folder.mkdir(parents=True)
    (bin_folder / "activate").write_text(f"export PATH='{bin_folder}':$PATH\n")
    log = tmp_path / "log"
    for name in ("python", "sbatch"):
        say = f"#!{sys.executable}\nimport json, sys\n"
        say += f"print(json.dumps(['{name}', *sys.argv[1:]]), file=open({str(log)!r}, 'a'))\n"
        (bin_folder / name).write_text(say)
        (bin_folder / name).chmod(0o755)
    changed = [
        f"ENVIRONMENT='{bin_folder.parent}'" if line.startswith("ENVIRONMENT=") else line
        for line in lines
    ]
    script = tmp_path / "job.sbatch"
    script.write_text("\n".join(changed) + "\n")
    subprocess.run(["bash", "-n", script], check=True)
    for task in (0, 7):
        names = {"TASK_ID": task, "TASK_MIN": 0, "TASK_MAX": 7, "JOB_ID": 31}
        environment = {f"SLURM_ARRAY_{name}": str(value) for name, value in names.items()}
        subprocess.run(["bash", script], env={**os.environ, **environment}, check=True)
    said = [json.loads(line) for line in log.read_text().splitlines()]
    assert [words[0] for words in said] == ["sbatch", "python", "python"]
    assert "--dependency=afterok:31" in said[0]
    assert [words[-2:] for words in said[1:]] == [["--shard", "0/8"], ["--shard", "7/8"]]
    log.unlink()
    subprocess.run(["bash", "-c", said[0][-1]], check=True)
    (merged,) = (json.loads(line) for line in log.read_text().splitlines())
    assert merged == [*said[1][:-2], "--merge"]
