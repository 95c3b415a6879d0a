"""Several processes as one run: how they find each other, and how they decide together.

Every process runs the same program over one mesh. Only process 0 prints, draws progress and writes
results; every process writes its own shards of a checkpoint. Decisions that depend on a clock or a
signal are made by `Vote`, so that they are the same in all processes.
"""

import contextlib
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from geode_jax.errors import UserError, line_and_status, one_line
from geode_jax.runtime.coordinator import (
    refuse_taken_port,
    refuse_unknown_host,
    wait_for_coordinator,
)
from geode_jax.runtime.jax_private import check_process_group, on_tpu_cluster, process_group

HEARTBEAT_SECONDS = 20
"""A process that sends no heartbeat for this long counts as dead; the others end with an error."""

START_SECONDS = 300
"""Time for the processes to find each other."""

PREPARE_SECONDS = 4 * 3600
"""Time for process 0 to make what the others wait for: an export, records, a tokenizer."""


def initialize(
    address: str | None = None, processes: int | None = None, process: int | None = None
) -> None:
    """Joins the other processes of the run, if there are any; call it before any use of devices.

    Without arguments, JAX finds them: in a step of SLURM, under Open MPI, on a TPU pod, or by the
    variables JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID.

    Args:
        address: HOST:PORT of process 0.
        processes: number of processes.
        process: number of this process.

    Raises:
        UserError: some of the three are missing or contradict each other, a variable of the
            environment that `launch/README.md` names is wrong, or the other processes did not
            start in time.
    """
    _check_environment()
    names, given = _FLAGS, (address, processes, process)
    if all(x is None for x in given) and not _found_by_jax():
        names, given = _VARIABLES, _from_environment()
    if any(x is not None for x in given):
        coordinator, processes, process = _checked(names, given)
        address = coordinator
        refuse_unknown_host(coordinator)
        if process == 0:
            refuse_taken_port(coordinator)
        else:
            wait_for_coordinator(coordinator, START_SECONDS)
    elif not _found_by_jax():
        return
    check_process_group()
    try:
        jax.distributed.initialize(
            address,
            processes,
            process,
            initialization_timeout=START_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"processes: could not join the others: {reason}") from error
    if not is_main():
        # Process 0 prints the same; errors of every process are still printed on stderr.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - open to the end of the process


_FLAGS = ("--coordinator_address", "--num_processes", "--process_id")
_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def _from_environment() -> tuple[str | None, int | None, int | None]:
    """Returns the values of the three variables; an empty one counts as absent.

    JAX itself reads only the first.

    Raises:
        UserError: a number is not a whole number.
    """
    address, *counts = (os.environ.get(name) or None for name in _VARIABLES)
    numbers: list[int | None] = []
    for name, text in zip(_VARIABLES[1:], counts, strict=True):
        if text is not None and not (text.isascii() and text.isdecimal() and len(text) < 10):
            raise UserError(f"{name}={text}: not a whole number")
        numbers.append(None if text is None else int(text))
    return address, numbers[0], numbers[1]


def _checked(
    names: tuple[str, str, str], given: tuple[str | None, int | None, int | None]
) -> tuple[str, int, int]:
    """Returns address, number of processes and number of this process.

    Raises:
        UserError: one of the three is missing or out of its range.
    """
    (of_address, of_count, of_number), (address, count, number) = names, given
    if address is None or count is None or number is None:
        raise UserError(f"{of_address}, {of_count} and {of_number} belong together")
    if not 0 <= number < count:
        raise UserError(f"{of_number} {number}: not below {of_count} {count}")
    host, _, port = address.rpartition(":")
    if not host or not (
        port.isascii() and port.isdecimal() and len(port) < 6 and 0 < int(port) < 1 << 16
    ):
        raise UserError(f"{of_address} {address}: not HOST:PORT")
    return address, count, number


def _check_environment() -> None:
    """Checks the variables of `launch/README.md` that JAX does not check.

    Raises:
        UserError: the value of a variable is wrong.
    """
    name = "XLA_PYTHON_CLIENT_MEM_FRACTION"
    text = os.environ.get(name)
    try:
        good = text is None or 0 < float(text) <= 1
    except ValueError:
        good = False
    if not good:
        raise UserError(f"{name}={text}: not a share above 0 and at most 1")
    name = "JAX_COMPILATION_CACHE_DIR"
    folder = os.environ.get(name)
    if folder and "://" not in folder and os.path.lexists(folder) and not os.path.isdir(folder):
        raise UserError(f"{name}={folder}: not a folder")


def _found_by_jax() -> bool:
    """Returns whether this process is one of several that JAX finds by itself.

    JAX's own detection is not used: it takes a batch script of SLURM for one of the job's tasks.
    """
    counts = [os.environ.get(n) for n in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")]
    if any(count not in (None, "", "1") for count in counts):
        return True
    others = (os.environ.get(name) for name in _VARIABLES[1:])
    if os.environ.get(_VARIABLES[0]) and "KUBERNETES_SERVICE_HOST" in os.environ:
        return not any(others)  # a job of Kubernetes, which sets only the address
    # Even one host of a TPU may be one of several slices.
    return on_tpu_cluster()


def is_main() -> bool:
    """Returns whether this is process 0, which prints and writes."""
    # Not JAX's process_index, which starts the devices.
    return process_group().process == 0


@contextlib.contextmanager
def main_first(what: str) -> Iterator[None]:
    """Makes the other processes wait until process 0 has run the block and made its files.

    Args:
        what: unique name of the block.
    """

    def meet():
        if client := process_group().client:
            client.wait_at_barrier(what, PREPARE_SECONDS * 1000)

    if not is_main():
        meet()
    yield
    if is_main():
        meet()


@contextlib.contextmanager
def ends_together() -> Iterator[None]:
    """Ends all processes with the line of an error that one of them raises in the block.

    Otherwise the others would wait for the failed process: at a barrier, in a sum over all devices,
    or in JAX's own shutdown, which takes five minutes and ends with a core dump.

    The failed process publishes its line and exit status; a thread of every process polls for such
    a line. Process 0, which runs the coordination service, ends last.
    """
    client, own, _ = process_group()
    if client is None:
        yield
        return
    done = threading.Event()
    watcher = threading.Thread(target=_watch, args=(client, done), daemon=True)
    watcher.start()
    try:
        yield
    except SystemExit:  # as all processes agreed
        raise
    except BaseException as error:
        done.set()
        with _ENDING:  # never released where `_watch` is ending the process
            _leave_as_others(client)  # a sum over devices fails where another process has left
            report = line_and_status(error)
            if report is None:
                traceback.print_exc()
                report = f"error: {type(error).__name__}: {one_line(str(error), 200)}", 1
            else:
                print(report[0], file=sys.stderr)
            with contextlib.suppress(Exception):  # another was first, or the service is gone
                client.key_value_set(_FAILED, json.dumps([own, *report]))
            _leave(client, report[1])
    finally:
        done.set()
        watcher.join()  # before JAX shuts its client down


_FAILED = "geode_jax/failed"
_ENDING = threading.Lock()
"""Held by the thread that ends the process, so that one line is printed."""
POLL_SECONDS = 2.0
"""Time between two polls for the failure of another process."""
_LEAVE_SECONDS = 20.0
"""Time that process 0 waits for the others to end."""


def _watch(client, done: threading.Event) -> None:
    """Ends the process when another one has published an error."""
    while not done.wait(POLL_SECONDS):
        with _ENDING:
            if not done.is_set():
                _leave_as_others(client)


def _leave_as_others(client) -> None:
    """Ends the process with the error that another one has published, if there is one."""
    found = _published(client, _FAILED)
    if found is not None:
        process, line, status = json.loads(found)
        print(f"{line} (process {process})", file=sys.stderr)
        _leave(client, status)


def _published(client, key: str) -> str | None:
    try:
        return client.key_value_try_get(key)
    except Exception:  # not there yet; where the service is gone JAX ends the process
        return None


def _leave(client, status: int) -> None:
    """Ends the process at once; JAX's own shutdown waits for all others."""
    _, own, count = process_group()
    with contextlib.suppress(Exception):
        client.key_value_set(f"{_FAILED}/left/{own}", "")
    if own == 0:
        end = time.monotonic() + _LEAVE_SECONDS
        left = set(range(1, count))
        while left and time.monotonic() < end:
            left = {i for i in left if _published(client, f"{_FAILED}/left/{i}") is None}
            time.sleep(0.1)
        time.sleep(0.5)  # the last of them has published that it ends, and still runs
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


class Vote:
    """Requests of single processes that all processes follow at the same step.

    A vote is dispatched with a step and read with the next, so nothing waits for the devices.
    """

    def __init__(self, mesh: Mesh, wishes: int):
        """Args:
        mesh: of the processes that vote.
        wishes: number of things that can be requested.
        """
        self._ballot = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._shape = (mesh.size, wishes)
        everywhere = NamedSharding(mesh, PartitionSpec())
        self._count = jax.jit(lambda x: jnp.any(x, axis=0), out_shardings=everywhere)
        self._cast = None

    def cast(self, *wishes: bool) -> np.ndarray:
        """Casts this process's requests.

        Returns:
            Bool [wishes]: what any process requested in the previous call of `cast`.
        """
        own = np.array([wishes])
        ballot = jax.make_array_from_callback(self._shape, self._ballot, lambda _: own)
        before, self._cast = self._cast, self._count(ballot)
        return np.zeros(len(wishes), bool) if before is None else np.asarray(before)
