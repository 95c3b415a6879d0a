"""Launch scripts: the rehearsal run, the others parsed, and run with stand-ins for the tools."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jaxlib
import pytest
import yaml
from absl import flags

from configs import hidden_cot
from geode_jax import main  # noqa: F401 - defines the flags

REPOSITORY = Path(__file__).resolve().parent.parent
LAUNCH = REPOSITORY / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
LOCAL = [sys.executable, str(LAUNCH / "local.py")]


def local(*arguments: str, program: str, timeout: float = 60) -> subprocess.CompletedProcess:
    return subprocess.run(
        [*LOCAL, *arguments, "--", sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


# --- The rehearsal --------------------------------------------------------------------------------


def test_every_process_gets_its_flags_and_devices():
    program = "import os, sys; print(*sys.argv[1:], os.environ['XLA_FLAGS'].split()[-1])"
    done = local("--processes", "3", "--devices", "2", program=program)
    assert done.returncode == 0, done.stderr
    lines = sorted(done.stdout.splitlines())
    assert [line[:4] for line in lines] == ["[0] ", "[1] ", "[2] "]
    ports = set()
    for i, line in enumerate(lines):
        found = re.fullmatch(
            r"\[\d\] --coordinator_address=127\.0\.0\.1:(\d+) --num_processes=3 "
            rf"--process_id={i} --xla_force_host_platform_device_count=2",
            line,
        )
        assert found, line
        ports.add(found[1])
    assert len(ports) == 1


def test_the_code_is_that_of_the_first_that_failed():
    program = (
        "import sys, time; i = int(sys.argv[-1][-1]); time.sleep(0.5 * (1 - i)); sys.exit(4 - i)"
    )
    assert local(program=program).returncode == 3
    program = "import os, signal, sys; sys.argv[-1][-1] == '1' and os.kill(os.getpid(), 9)"
    assert local(program=program).returncode == 137


def test_who_does_not_notice_a_death_is_killed():
    program = "import sys, time; print('here', flush=True); sys.argv[-1][-1] == '0' and sys.exit(5); time.sleep(60)"  # noqa: E501
    began = time.monotonic()
    done = local("--grace", "1", program=program)
    assert done.returncode == 5 and "killed" in done.stderr
    assert 1 < time.monotonic() - began < 30


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_reach_all(number, tmp_path):
    program = (
        "import signal, sys, time\n"
        f"signal.signal({int(number)}, lambda *_: (print('heard', flush=True), sys.exit(143)))\n"
        f"open(r'{tmp_path}/' + sys.argv[-1][-1], 'w').close()\n"
        "time.sleep(60)"
    )
    process = subprocess.Popen(
        [*LOCAL, "--", sys.executable, "-c", program], stdout=subprocess.PIPE, text=True
    )
    while len(list(tmp_path.iterdir())) < 2:
        time.sleep(0.02)
    process.send_signal(number)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 143
    assert sorted(output.splitlines()) == ["[0] heard", "[1] heard"]


def test_bars_are_shown_now_and_then():
    program = "print(*(f'\\r{i} of 9' for i in range(10)), end='\\nend\\nrest')"
    lines = local("--processes", "1", program=program).stdout.splitlines()
    assert lines[0] == "[0] 0 of 9 " and lines[-2:] == ["[0] end", "[0] rest"]
    assert len(lines) < 6


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "no command behind --"),
        (["--processes", "0", "--", "true"], "at least 1"),
        (["--devices", "0", "--", "true"], "at least 1"),
        (["--grace", "nan", "--", "true"], "not a number of seconds"),
        (["--grace", "-1", "--", "true"], "not a number of seconds"),
        (["--", "./no-such-program"], "No such file"),
    ],
)
def test_what_cannot_be_started_is_one_line(arguments, words):
    done = subprocess.run([*LOCAL, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and words in done.stderr.splitlines()[-1]


PROGRAM = """
import sys, jax, jax.numpy as jnp, numpy as np
from geode_jax.runtime import distributed
address, count, number = (argument.partition("=")[2] for argument in sys.argv[1:])
distributed.initialize(address, int(count), int(number))
mesh = jax.make_mesh((jax.device_count(),), ("x",))
spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
own = jax.make_array_from_callback((4,), spread, lambda i: np.arange(4.0)[i])
total = jax.jit(jnp.sum, out_shardings=jax.sharding.NamedSharding(mesh, jax.P()))(own)
print("sum", float(total), file=sys.stderr)
"""


@pytest.mark.slow
def test_processes_find_each_other():
    os.environ["PYTHONPATH"] = str(REPOSITORY)
    done = local("--devices", "2", program=PROGRAM, timeout=300)
    assert done.returncode == 0, done.stdout
    assert {"[0] sum 6.0", "[1] sum 6.0"} <= set(done.stdout.splitlines())


# --- Scripts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_sound(script):
    subprocess.run(["bash", "-n", script], check=True)
    text = script.read_text()
    assert text.startswith("#!/usr/bin/env bash\n") and "set -euo pipefail" in text
    if checker := shutil.which("shellcheck"):
        subprocess.run([checker, script], check=True)
    if script.suffix == ".sbatch" and (tester := shutil.which("sbatch")):
        subprocess.run([tester, "--test-only", script], check=True)


DIRECTIVES = {
    "job-name", "nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "exclusive", "time",
    "signal", "requeue", "open-mode", "output", "array", "gres", "mem",
}  # fmt: skip
"""Of those in sbatch's manual, the ones in use."""


def test_directives_are_sbatchs():
    for script in LAUNCH.glob("*.sbatch"):
        lines = [x for x in script.read_text().splitlines() if x.startswith("#SBATCH")]
        found = [re.fullmatch(r"#SBATCH --([a-z-]+)(?:=\S+)?", line) for line in lines]
        assert found and all(match and match[1] in DIRECTIVES for match in found)


def check_arguments(arguments: list[str]) -> None:
    """Asserts that flags and fields of the configuration exist."""
    for argument in arguments:
        match = re.match(r"--([\w.]+)=", argument)
        assert match, argument
        section, _, field = match[1].partition(".")
        if section == "config" and field:
            fields: Any = hidden_cot.get_config("full")
            for part in field.split("."):
                fields = fields[part]
        else:
            assert match[1] in flags.FLAGS, argument
    (config,) = (a.partition("=")[2] for a in arguments if a.startswith("--config="))
    file, _, argument = config.partition(":")
    assert (REPOSITORY / file).exists() and hidden_cot.get_config(argument)


def known_to_xla(flag: str) -> bool:
    (library,) = Path(jaxlib.__file__).parent.glob("libjax_common*")
    return flag.encode() in library.read_bytes()


def test_xla_knows_the_flags():
    texts = [
        path.read_text() for path in (*SCRIPTS, LAUNCH / "gke_jobset.yaml", LAUNCH / "README.md")
    ]
    found = {name for text in texts for name in re.findall(r"--(xla_gpu_\w+)", text)}
    assert found and all(known_to_xla(name) for name in found)
    assert not known_to_xla("xla_gpu_no_such_flag")


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """Stand-ins for cluster tools: each notes its arguments and prints and ends as it is told."""
    folder, log = tmp_path / "bin", tmp_path / "log"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def make(name: str, body: str = "") -> Path:
        path = folder / name
        path.write_text(
            f"#!{sys.executable}\nimport json, os, sys\n"
            f"print(json.dumps([{name!r}, *sys.argv[1:]]), file=open({str(log)!r}, 'a'))\n{body}\n"
        )
        path.chmod(0o755)
        return path

    make.said = lambda: [json.loads(line) for line in log.read_text().splitlines()]
    return make


@pytest.mark.parametrize("code", [0, 1, 143])
def test_slurm_queues_again_what_was_stopped(tools, tmp_path, code):
    tools("srun", f"sys.exit({code})")
    tools("scontrol")
    text = (LAUNCH / "slurm.sbatch").read_text()
    edited = [x for x in text.splitlines() if x.startswith(("ENVIRONMENT=", "TRAIN="))]
    assert len(edited) == 2
    environment = tmp_path / "env" / "bin"
    environment.mkdir(parents=True)
    (environment / "activate").touch()
    script = tmp_path / "job.sbatch"
    script.write_text(text.replace(edited[0], f"ENVIRONMENT='{environment.parent}'"))
    done = subprocess.run(["bash", script], env=os.environ | {"SLURM_JOB_ID": "31"}, check=False)
    assert done.returncode == code
    srun, *more = tools.said()
    command = srun.index("geode_jax.main") + 1
    assert srun[command - 2 : command] == ["-m", "geode_jax.main"]
    check_arguments(srun[command:])
    assert more == ([["scontrol", "requeue", "31"]] if code == 143 else [])


def test_a_pod_is_started_again_until_it_is_done(tools, tmp_path):
    count = tmp_path / "count"
    tools(
        "gcloud",
        f"n = os.path.getsize({str(count)!r}) if os.path.exists({str(count)!r}) else 0\n"
        f"open({str(count)!r}, 'a').write('x')\n"
        "print(['geode ended: 143\\ngeode ended: 143', '', 'geode ended: 0\\ngeode ended: 0'][n])\n"
        "sys.exit(n == 1)",
    )
    command = [LAUNCH / "tpu_pod.sh", "pod", "zone", "train", "--workdir=a b", "--config=c"]
    environment = os.environ | {"RETRY_SECONDS": "0"}
    done = subprocess.run(command, env=environment, check=False, timeout=60)
    assert done.returncode == 0
    said = tools.said()
    assert len(said) == 3 and said[0] == said[2]
    assert "--worker=all" in said[0] and "'--workdir=a b' '--config=c'" in said[0][-1]


def test_a_pod_with_an_error_is_not_started_again(tools):
    tools("gcloud", "print('geode ended: 2\\ngeode ended: 1')")
    command = [LAUNCH / "tpu_pod.sh", "pod", "zone", "train", "--config=c"]
    assert subprocess.run(command, check=False, timeout=60).returncode == 2
    assert len(tools.said()) == 1
    done = subprocess.run([LAUNCH / "tpu_pod.sh"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "launch/tpu_pod.sh NAME ZONE setup" in done.stderr


def test_jobsets_restart_everything_and_hold_together():
    sets = list(yaml.safe_load_all((LAUNCH / "gke_jobset.yaml").read_text()))
    assert [s["kind"] for s in sets] == ["JobSet"] * 2
    for jobs in sets:
        assert jobs["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
        assert jobs["spec"]["failurePolicy"]["maxRestarts"] > 0
        (workers,) = jobs["spec"]["replicatedJobs"]
        job = workers["template"]["spec"]
        assert job["parallelism"] == job["completions"] and job["backoffLimit"] == 0
        pod = job["template"]["spec"]
        assert pod["restartPolicy"] == "Never" and pod["terminationGracePeriodSeconds"] >= 60
        (container,) = pod["containers"]
        assert container["command"] == ["python", "-m", "geode_jax.main"]
        check_arguments(container["args"])
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["volumes"]}
        named = dict(a.removeprefix("--").split("=", 1) for a in container["args"])
        if "num_processes" in named:
            name = jobs["metadata"]["name"]
            assert int(named["num_processes"]) == job["completions"] * workers["replicas"]
            host, port = named["coordinator_address"].split(":")
            assert host == f"{name}-{workers['name']}-0-0.{name}"
            assert int(port) in [p["containerPort"] for p in container["ports"]]
