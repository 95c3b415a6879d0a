"""Two processes of four devices are one of eight; one that dies ends both, and one goes on."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from geode_jax.errors import UserError
from geode_jax.exports import Export
from geode_jax.runtime import coordinator, distributed
from geode_jax.sources.rooms.export import make_rooms
from geode_jax.training.metrics import read_metrics

REPOSITORY = Path(__file__).resolve().parent.parent
STEPS, EPOCH = 12, 4
ENDS_WITHIN = 60  # seconds


@pytest.fixture(scope="module")
def export(tmp_path_factory) -> Path:
    """As many training scenes as four batches of eight: every fifth scene validates."""
    folder = tmp_path_factory.mktemp("processes") / "rooms"
    make_rooms(folder, scenes=10 * EPOCH, seed=0, test_scenes=2, workers=1, progress=False)
    return folder


_STARTED: list[subprocess.Popen] = []


@pytest.fixture(autouse=True)
def nothing_is_left_running():
    yield
    while _STARTED:
        process = _STARTED.pop()
        process.kill()
        process.wait()


def start(
    export: Path, workdir: Path, processes: int, mesh: str = "1x8x1"
) -> list[subprocess.Popen]:
    """A run of eight devices in all."""
    workdir.mkdir(exist_ok=True)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
    count = f" --xla_force_host_platform_device_count={8 // processes}"
    environment = os.environ | {
        "PYTHONPATH": str(REPOSITORY),
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", "") + count,
        "PJRT_NPROC": "32",  # as in mesh_test
    }
    started = []
    for i in range(processes):
        own = [address, str(processes), str(i)] if processes > 1 else []
        with (workdir / f"output_{i}").open("a") as log:
            command = [sys.executable, "-m", "tests.processes_run"]
            command += [str(export), str(workdir), str(STEPS), mesh, *own]
            started.append(
                subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=log, stderr=log)
            )
    _STARTED.extend(started)
    return started


def ended(processes: list[subprocess.Popen], workdir: Path) -> list[int]:
    codes = [process.wait(timeout=900) for process in processes]
    print(*(path.read_text()[-3000:] for path in sorted(workdir.glob("output_*"))), sep="\n")
    return codes


def wait_for_step(processes: list[subprocess.Popen], workdir: Path, step: int) -> None:
    while len(read_metrics(workdir / "metrics.jsonl")) < step:
        assert all(p.poll() is None for p in processes), ended(processes, workdir)
        time.sleep(0.02)


def losses(workdir: Path) -> dict[int, float]:
    rows = [row for row in read_metrics(workdir / "metrics.jsonl") if "loss" in row]
    found = {row["step"]: row["loss"] for row in rows}
    assert len(found) == len(rows)  # no step twice
    return found


def parameters(workdir: Path) -> list[np.ndarray]:
    with ocp.training.Checkpointer(workdir / "checkpoints" / "latest") as checkpointer:
        assert checkpointer.latest.step == STEPS
        stored = checkpointer.checkpointables_metadata(STEPS).metadata["state"]
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), stored)
        state = checkpointer.load_checkpointables(STEPS, {"state": like})["state"]
    return [np.asarray(x) for x in jax.tree.leaves(state["params"])]


def distance(workdir: Path, other: Path) -> float:
    """Of the parameters, relative to their norm.

    Not of each by itself: the gradient of a key's bias is 0 but for rounding, which Adam makes as
    large as any other.
    """
    a, b = (np.concatenate([x.ravel() for x in parameters(d)]) for d in (workdir, other))
    found = float(np.linalg.norm(a - b) / np.linalg.norm(a))
    print(f"parameters are {found:.1e} apart")
    return found


def scenes_read(workdir: Path, pattern: str, steps: range) -> list[str]:
    """Digests of the scenes that the processes of a start read for these steps."""
    found = []
    for path in workdir.glob(pattern):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            found += row["scenes"] if row["step"] in steps else []
    return found


@pytest.fixture(scope="module")
def one_process(export, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("processes") / "one"
    assert ended(start(export, workdir, 1), workdir) == [0]
    return workdir


@pytest.mark.slow
def test_two_processes_are_one(export, one_process, tmp_path):
    assert ended(start(export, tmp_path, 2), tmp_path) == [0, 0]
    one, two = losses(one_process), losses(tmp_path)
    assert list(two) == list(one) == list(range(1, STEPS + 1))
    np.testing.assert_allclose(list(two.values()), list(one.values()), rtol=1e-5)
    assert distance(one_process, tmp_path) < 1e-4
    said = [
        [json.loads(x)["prediction"] for x in (d / "predictions.jsonl").read_text().splitlines()]
        for d in (one_process, tmp_path)
    ]
    assert said[0] and said[0] == said[1]
    # Every scene of an epoch is read once, by one of the two, half by each.
    for epoch in range(STEPS // EPOCH):
        steps = range(epoch * EPOCH, (epoch + 1) * EPOCH)
        read = scenes_read(tmp_path, "seen_2_*.jsonl", steps)
        assert len(read) == len(set(read)) == 8 * EPOCH
        assert sorted(read) == sorted(scenes_read(one_process, "seen_1_0.jsonl", steps))
        assert len(scenes_read(tmp_path, "seen_2_1.jsonl", steps)) == 4 * EPOCH
    # Process 0 alone speaks.
    assert "best checkpoint" in (tmp_path / "output_0").read_text()
    assert "best checkpoint" not in (tmp_path / "output_1").read_text()


@pytest.mark.slow
def test_a_killed_process_ends_the_other_and_one_process_goes_on(export, one_process, tmp_path):
    processes = start(export, tmp_path, 2)
    wait_for_step(processes, tmp_path, 5)
    processes[1].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    assert processes[0].wait(timeout=ENDS_WITHIN) not in (0, None)
    print(f"the other ended after {time.monotonic() - killed:.0f} s")
    assert ended(start(export, tmp_path, 1, "2x2x2"), tmp_path) == [0]
    said = (tmp_path / "output_0").read_text()
    resumed = int(said.split("resuming at step ")[1].split()[0])
    assert resumed in (3, 6)
    one, other = losses(one_process), losses(tmp_path)
    assert list(other) == list(range(1, STEPS + 1))
    np.testing.assert_allclose(list(other.values()), list(one.values()), rtol=1e-5)
    assert distance(one_process, tmp_path) < 1e-4
    # No scene of an epoch lost or repeated, the epoch in which one died too.
    for epoch in range(STEPS // EPOCH):
        first, last = epoch * EPOCH, (epoch + 1) * EPOCH
        read = scenes_read(tmp_path, "seen_2_*.jsonl", range(first, min(last, resumed)))
        read += scenes_read(tmp_path, "seen_1_*.jsonl", range(max(first, resumed), last))
        assert len(read) == len(set(read)) == 8 * EPOCH


@pytest.mark.slow
def test_sigterm_to_one_process_saves_and_stops_both(export, tmp_path):
    processes = start(export, tmp_path, 2)
    wait_for_step(processes, tmp_path, 4)
    processes[1].terminate()
    codes = ended(processes, tmp_path)
    assert codes == [128 + signal.SIGTERM] * 2
    assert "stopped by SIGTERM at step" in (tmp_path / "output_0").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("damaged", ["manifest", "scene"])
def test_an_error_of_one_process_ends_both_with_its_line(export, tmp_path, damaged):
    """Process 0 reads the manifest while the other waits; a scene is read by one of the two."""
    broken = shutil.copytree(export, tmp_path / "export")
    if damaged == "manifest":
        (broken / "manifest.json").write_text("{")
        words = "manifest.json: not JSON"
    else:
        scene = Export(broken).scene_ids("train")[0]
        (broken / "scenes" / f"{scene}.safetensors").write_bytes(b"no tensors")
        words = f"error: scene {scene}: "
    workdir = tmp_path / "run"
    first, second = start(broken, workdir, 2)
    while first.poll() is None and second.poll() is None:
        time.sleep(0.1)
    end = time.monotonic()
    assert ended([first, second], workdir) == [2, 2]
    assert time.monotonic() - end < ENDS_WITHIN
    for process in (0, 1):
        said = (workdir / f"output_{process}").read_text()
        assert said.count("error: ") == said.count(words) == 1
        assert "Traceback" not in said and "Fatal" not in said


_AN_ERROR_WHILE_THE_LINE_OF_ANOTHER_IS_PRINTED = """
import time
from geode_jax.errors import UserError
from geode_jax.runtime import distributed, jax_private

class Client:
    "Process 1 has failed, and takes a second to end."
    end = time.monotonic() + 1

    def key_value_try_get(self, key):
        if key.endswith("left/1") and time.monotonic() < self.end:
            raise KeyError(key)
        return '[1, "error: of process 1", 2]'

    def key_value_set(self, key, value):
        pass

distributed.process_group = lambda: jax_private.ProcessGroup(Client(), 0, 2)
distributed.POLL_SECONDS = 0.1
with distributed.ends_together():
    time.sleep(0.5)
    raise UserError("what comes of the other's end")
"""


def test_the_line_of_another_process_is_printed_once():
    """A sum over devices fails while the thread that has found the line still waits."""
    command = [sys.executable, "-c", _AN_ERROR_WHILE_THE_LINE_OF_ANOTHER_IS_PRINTED]
    ended = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert (ended.returncode, ended.stderr) == (2, "error: of process 1 (process 1)\n")


def listen(answer: bytes | None) -> str:
    """The address of a program that sends `answer` to whoever connects; None: not a word."""
    server = socket.create_server(("127.0.0.1", 0))

    def serve():
        connection, _ = server.accept()
        with connection, server:
            connection.recv(100)
            if answer is None:
                connection.recv(100)  # until the other goes
            else:
                connection.sendall(answer)

    threading.Thread(target=serve, daemon=True).start()
    return f"127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"", None])
def test_a_stranger_at_the_coordinators_port_is_refused(monkeypatch, answer):
    monkeypatch.setattr(coordinator, "ANSWER_SECONDS", 1)
    with pytest.raises(UserError, match="not process 0 of this run"):
        distributed.initialize(listen(answer), 2, 1)


def test_a_port_that_is_taken_and_a_process_that_does_not_come_are_refused():
    with pytest.raises(UserError, match="Address already in use"):
        distributed.initialize(listen(b""), 2, 0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        free = f"127.0.0.1:{server.getsockname()[1]}"
    with pytest.raises(UserError, match="process 0 was not at"):
        coordinator.wait_for_coordinator(free, 0.5)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("no-such-host.invalid:1234", 2, 1), "host no-such-host.invalid: "),
        (("host:1", 2, None), "belong together"),
        (("host:1", 2, 2), "--process_id 2"),
        (("host:1", None, 0), "belong together"),
        (("host:1", 2, -1), "--process_id -1"),
        (("host", 2, 0), "not HOST:PORT"),
        ((":1", 2, 0), "not HOST:PORT"),
        (("host:port", 2, 0), "not HOST:PORT"),
        (("host:65536", 2, 0), "not HOST:PORT"),
    ],
)
def test_arguments_that_cannot_be(arguments, words, bare_environment):
    with pytest.raises(UserError, match=words):
        distributed.initialize(*arguments)


VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


@pytest.fixture
def bare_environment(monkeypatch):
    """Nothing says that there are other processes; `monkeypatch` may."""
    others = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "KUBERNETES_SERVICE_HOST")
    for name in (*others, *VARIABLES):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}, "belong together"),
        ({"JAX_COORDINATOR_ADDRESS": "host:1"}, "belong together"),
        ({"JAX_PROCESS_ID": "1"}, "belong together"),
        (dict(zip(VARIABLES, ("host:1", "two", "0"), strict=True)), "JAX_NUM_PROCESSES=two"),
        (dict(zip(VARIABLES, ("host:1", "2", "-1"), strict=True)), "JAX_PROCESS_ID=-1"),
        (dict(zip(VARIABLES, ("host:1", "2", "2"), strict=True)), "JAX_PROCESS_ID 2: not below"),
        (dict(zip(VARIABLES, ("host", "2", "0"), strict=True)), "ADDRESS host: not HOST:PORT"),
        ({"XLA_PYTHON_CLIENT_MEM_FRACTION": "92"}, "not a share"),
        ({"XLA_PYTHON_CLIENT_MEM_FRACTION": "nan"}, "not a share"),
        ({"XLA_PYTHON_CLIENT_MEM_FRACTION": "most"}, "not a share"),
        ({"JAX_COMPILATION_CACHE_DIR": __file__}, "not a folder"),
    ],
)
def test_variables_that_cannot_be(environment, words, bare_environment):
    for name, value in environment.items():
        bare_environment.setenv(name, value)
    with pytest.raises(UserError, match=words):
        distributed.initialize()


def test_one_process_waits_for_nobody():
    assert distributed.is_main()
    with distributed.main_first("nothing"):
        pass


@pytest.mark.parametrize(
    ("environment", "several"),
    [
        ({}, False),
        ({"SLURM_STEP_NUM_TASKS": "16", "SLURM_NTASKS": "16"}, True),
        ({"SLURM_NTASKS": "16"}, False),  # the batch script, not one of its tasks
        ({"SLURM_STEP_NUM_TASKS": "1"}, False),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, False),
        ({"JAX_COORDINATOR_ADDRESS": "host:1", "KUBERNETES_SERVICE_HOST": "10.0.0.1"}, True),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, False),
    ],
)
def test_who_is_one_of_several(bare_environment, environment, several):
    for name, value in environment.items():
        bare_environment.setenv(name, value)
    joined = []
    bare_environment.setattr(jax.distributed, "initialize", lambda *a, **_: joined.append(a))
    distributed.initialize()
    assert joined == ([(None, None, None)] if several else [])


def test_the_three_variables_are_the_three_flags(bare_environment):
    for name, value in zip(VARIABLES, ("127.0.0.1:1", "1", "0"), strict=True):
        bare_environment.setenv(name, value)
    joined = []
    bare_environment.setattr(jax.distributed, "initialize", lambda *a, **_: joined.append(a))
    distributed.initialize()
    assert joined == [("127.0.0.1:1", 1, 0)]
