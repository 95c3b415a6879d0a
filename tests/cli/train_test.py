"""The training command: what the user can mend is one line and exit status 2."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from geode_jax.runtime.devices import find_devices

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIG = """
import ml_collections


def get_config(arg=""):
    if arg == "broken":
        return {}["field"]
    if arg == "bad":
        raise ValueError("first line\\nlast line")
    if arg == "ends":
        raise GeneratorExit
    return ml_collections.ConfigDict({"system": "test", "train": {"steps": 5}, "size": (1, 2)})
"""


def start(*arguments, module: str = "geode_jax.main") -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", module, *map(str, arguments)],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def error_of(*arguments, **options) -> str:
    """The one line a refused command ends with."""
    child = start(*arguments, **options)
    _, err = child.communicate(timeout=120)
    assert child.returncode == 2, err
    lines = err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), err
    return lines[0]


@pytest.fixture
def config(tmp_path) -> Path:
    path = tmp_path / "config.py"
    path.write_text(CONFIG)
    return path


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "--config: missing; name a file, or one of geode_align"),
        (["--config=hidden_coat"], "hidden_coat: no such file, and not one of geode_align"),
        (["--config=nowhere.py"], "nowhere.py"),
        (["--config=/dev/zero"], "/dev/zero: not a regular file"),
        (["--config=/dev/zero:full"], "/dev/zero: not a regular file"),
        ([os.fsdecode(b"--workdir=St\xfchle")], r"St\udcfchle: not UTF-8"),
        (["--config=nowhere.py", "--config.train.steps=1"], "nowhere.py"),
        (["--config={config}:broken"], "KeyError: 'field'"),
        (["--config={config}:bad"], "last line"),
        (["--config={config}:ends"], "GeneratorExit"),
        (["--config={config}", "--config.train.steps=many"], "--config.train.steps=many"),
        (["--config={config}", "--config.train.stepz=1"], 'Did you mean "steps"'),
        (["--config={config}", "--stepz=1"], "stepz"),
    ],
)
def test_a_bad_command_line_is_one_line(config, arguments, complaint):
    assert complaint in error_of(*(argument.format(config=config) for argument in arguments))


def test_a_positional_argument_is_refused(config):
    assert "unexpected argument 'train'" in error_of("train", f"--config={config}")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["{config}", "--config.train.stepz=1"], 'Did you mean "steps"'),
        (["{config}", "--num_processes=two"], "num_processes"),
        (["hidden_cot:thinking=3"], "thinking=3: not one of 0, 2, 4, 8, 16"),
    ],
)
def test_the_command_geode_jax_train_refuses_the_same(config, arguments, complaint):
    words = ("train", *(argument.format(config=config) for argument in arguments))
    assert complaint in error_of(*words, module="geode_jax.cli.command")


def test_geode_jax_train_passes_its_arguments_on(run, monkeypatch):
    passed = []
    monkeypatch.setattr("geode_jax.cli.flags.run", passed.append)
    words = ("train", "--config.seed=1", "my.py:full", "--config.mesh=(1,1,1)", "--profile")
    assert run(*words, "--workdir", "w", "--process_id", "1")[0] == 0
    assert passed[0][1:] == [
        *("--config=my.py:full", "--config.seed=1", "--config.mesh=(1,1,1)"),
        *("--workdir=w", "--process_id=1", "--profile"),
    ]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("train",), "CONFIG[:ARGUMENTS]"),
        (("train", "--config=hidden_cot"), "CONFIG[:ARGUMENTS]"),
        (("train", "hidden_cot", "--stepz=1"), "--stepz=1"),
        (("ask", "--workdir=w", "--scene=s", "--config.seed=1"), "--config.seed=1"),
    ],
)
def test_geode_jax_train_needs_a_configuration_and_known_flags(run, words, complaint):
    status, out, err = run(*words)
    assert (status, out) == (2, "") and complaint in err


def test_a_name_and_a_path_are_the_same_run_with_the_same_folder():
    """Reads both command lines in new processes: the flags of absl belong to a process."""
    code = (
        "import sys; from geode_jax.cli import flags; flags.read_flags(sys.argv); "
        "print(flags.run_folder(), flags.CONFIG.value.to_json())"
    )
    lines = [
        subprocess.run(
            [sys.executable, "-c", code, f"--config={text}", "--config.train.steps=7"],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for text in ("hidden_cot:thinking=0", "configs/hidden_cot.py:thinking=0")
    ]
    assert lines[0] == lines[1]
    assert lines[0].startswith("runs/hidden_cot-thinking=0 {") and '"steps": 7' in lines[0]


def test_every_command_has_a_sentence_and_an_example(run):
    names = re.findall(r"^    (\w+)", run("--help")[1], re.MULTILINE)
    assert {"train", "stages", "ask", "plan"} <= set(names)
    for name in names:
        status, out, _ = run(name, "--help")
        description, _, example = out.partition("\n\n")[2].partition("\nexamples:\n")
        first = description.partition("\n")[0]
        assert status == 0 and first[0].isupper() and first.endswith("."), name
        assert f"  geode-jax {name} " in example, name


def test_the_help_of_absl_is_no_error():
    command = [sys.executable, "-m", "geode_jax.main", "--help"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert "--workdir" in done.stdout and not done.stderr


def test_help_imports_no_slow_library():
    slow = "{'jax', 'flax', 'transformers', 'ml_collections', 'grain'}"
    code = (
        "import sys; from geode_jax.cli.command import main\n"
        "try: main(['train', '--help'])\n"
        f"except SystemExit: sys.exit(bool({slow} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([":thinking=3"], "thinking=3: not one of 0, 2, 4, 8, 16"),
        (["", "--config.data.export=nowhere"], "missing in nowhere"),
        (["", "--config.model.dtype=float31"], "model.dtype: float31"),
        ([":rgbd=nowhere"], "nowhere: no such folder"),
        ([":rgbd="], "config: rgbd=: has no value"),  # an unset variable of the shell
        (["", "--config.data.scenes_per_batch=0"], "data.scenes_per_batch: 0 is not at least 1"),
    ],
)
def test_a_bad_value_is_one_line_and_leaves_no_run(tmp_path, arguments, complaint):
    arg, *fields = arguments
    workdir, data = tmp_path / "run", tmp_path / "data"
    places = (f"--workdir={workdir}", f"--config.data.root={data}")
    config = f"--config=configs/hidden_cot.py{arg}"
    assert complaint in error_of(config, *fields, *places)
    assert not (workdir / "config.json").exists()
    assert not data.exists()


@pytest.mark.parametrize("platform", ["cuda", "nonsense"])
def test_a_device_that_is_not_there_is_one_line(tmp_path, monkeypatch, platform):
    if find_devices()[0].platform == "gpu":
        pytest.skip("it is there")
    monkeypatch.setenv("JAX_PLATFORMS", platform)
    places = (f"--workdir={tmp_path / 'run'}", "--config.data.export=nowhere")
    said = error_of("--config=configs/hidden_cot.py", *places)
    assert said.startswith(f"error: JAX_PLATFORMS={platform}: no such device")


def test_ctrl_c_is_no_traceback(tmp_path):
    data = tmp_path / "data"
    child = start(
        "--config=configs/hidden_cot.py", f"--workdir={tmp_path}", f"--config.data.root={data}"
    )
    deadline = time.monotonic() + 120
    while not data.exists():  # it makes rooms first
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(child.pid, signal.SIGINT)
    try:
        out, err = child.communicate(timeout=60)
    finally:
        child.kill()
    assert child.returncode == 130
    assert "Traceback" not in err
    assert out.splitlines()[-1].startswith("stopped by Ctrl-C before its end, nothing is lost")
