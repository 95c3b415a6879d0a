"""Many processes as one run: how they find each other, and what they agree on.

Every process runs the same program over one mesh. Process 0 alone prints, draws progress and
writes results; checkpoints are written by all, each its own shards. Whatever depends on a clock or
a signal is decided by `Vote`, so that all decide alike.
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

from geode_jax.errors import UserError, one_line, said_of
from geode_jax.runtime.coordinator import (
    refuse_taken_port,
    refuse_unknown_host,
    wait_for_coordinator,
)
from geode_jax.runtime.jax_private import check_process_group, on_tpu_cluster, process_group

HEARTBEAT_SECONDS = 20
"""A process that has not been heard of for so long is dead, and the others end with an error."""

START_SECONDS = 300
"""So long may processes take to find each other."""

PREPARE_SECONDS = 4 * 3600
"""So long may process 0 make what the others wait for: an export, records, a tokenizer."""


def initialize(
    address: str | None = None, processes: int | None = None, process: int | None = None
) -> None:
    """Joins the other processes of the run, if there are any; call before any use of devices.

    Without arguments they are found as JAX finds them: in a step of SLURM, under Open MPI, on a
    TPU pod, or by JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID.

    Args:
        address: HOST:PORT of process 0.
        processes: how many there are.
        process: number of this one.

    Raises:
        UserError: some of the three are missing or contradict each other, a variable of the
            environment that `launch/README.md` names is damaged, or the others did not come.
    """
    _check_environment()
    names, given = _FLAGS, (address, processes, process)
    if all(x is None for x in given) and not _found_by_jax():
        names, given = _VARIABLES, _from_environment()
    if any(x is not None for x in given):
        _check_together(names, given)
        address, processes, process = given
        refuse_unknown_host(address)
        if process == 0:
            refuse_taken_port(address)
        else:
            wait_for_coordinator(address, START_SECONDS)
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
        # What it would print, process 0 prints; errors still come out on stderr.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - open to the end of the process


_FLAGS = ("--coordinator_address", "--num_processes", "--process_id")
_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def _from_environment() -> tuple[str | None, int | None, int | None]:
    """What the three variables say; an empty one is none.

    JAX itself reads the first alone.

    Raises:
        UserError: a number is none.
    """
    address, *counts = (os.environ.get(name) or None for name in _VARIABLES)
    numbers: list[int | None] = []
    for name, text in zip(_VARIABLES[1:], counts, strict=True):
        if text is not None and not (text.isascii() and text.isdecimal() and len(text) < 10):
            raise UserError(f"{name}={text}: not a whole number")
        numbers.append(None if text is None else int(text))
    return address, numbers[0], numbers[1]


def _check_together(names: tuple[str, str, str], given: tuple) -> None:
    """Raises a UserError where the three are not all there, or no process of several."""
    (of_address, of_count, of_number), (address, count, number) = names, given
    if any(x is None for x in given):
        raise UserError(f"{of_address}, {of_count} and {of_number} belong together")
    if not 0 <= number < count:
        raise UserError(f"{of_number} {number}: not below {of_count} {count}")
    host, _, port = address.rpartition(":")
    if not host or not (
        port.isascii() and port.isdecimal() and len(port) < 6 and 0 < int(port) < 1 << 16
    ):
        raise UserError(f"{of_address} {address}: not HOST:PORT")


def _check_environment() -> None:
    """Raises a UserError for a variable of `launch/README.md` that JAX would take as it is."""
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
    """Whether this process is one of several that JAX finds by itself.

    JAX's own detection takes a batch script of SLURM, which stands for all tasks, for one of them.
    """
    counts = [os.environ.get(n) for n in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")]
    if any(count not in (None, "", "1") for count in counts):
        return True
    others = (os.environ.get(name) for name in _VARIABLES[1:])
    if os.environ.get(_VARIABLES[0]) and "KUBERNETES_SERVICE_HOST" in os.environ:
        return not any(others)  # a job of Kubernetes, which tells the address alone
    # Even one host of a TPU may be one of several slices.
    return on_tpu_cluster()


def is_main() -> bool:
    """Whether this is process 0, which prints and writes."""
    # Not JAX's process_index, which starts the devices.
    return process_group().process == 0


@contextlib.contextmanager
def main_first(what: str) -> Iterator[None]:
    """Process 0 runs the block before the others do, which then find its files made.

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
    """An error that one process meets in the block ends all of them, with its line.

    Left alone, the others would wait: for this one at a barrier, in a sum over all devices, or, as
    JAX's own end of a process does, for five minutes and with a core dump.

    A process that meets the error publishes its line, and the exit status; a thread of every
    process looks for such a line. Process 0, in which the coordination service lives, goes last.
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
        _leave_as_others(client)  # a sum over devices fails where another process has left
        said = said_of(error)
        if said is None:
            traceback.print_exc()
            said = f"error: {type(error).__name__}: {one_line(str(error), 200)}", 1
        else:
            print(said[0], file=sys.stderr)
        with contextlib.suppress(Exception):  # another process was first, or the service is gone
            client.key_value_set(_FAILED, json.dumps([own, *said]))
        _leave(client, said[1])
    finally:
        done.set()
        watcher.join()  # before JAX shuts its client down


_FAILED = "geode_jax/failed"
_LOOK_SECONDS = 2.0
"""So often a process looks whether another one has failed."""
_LEAVE_SECONDS = 20.0
"""So long process 0 waits for the others to leave."""


def _watch(client, done: threading.Event) -> None:
    """Ends the process when another one has published an error."""
    while not done.wait(_LOOK_SECONDS):
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
    """Ends the process at once: JAX's own way out waits for all others."""
    _, own, count = process_group()
    with contextlib.suppress(Exception):
        client.key_value_set(f"{_FAILED}/left/{own}", "")
    if own == 0:
        end = time.monotonic() + _LEAVE_SECONDS
        left = set(range(1, count))
        while left and time.monotonic() < end:
            left = {i for i in left if _published(client, f"{_FAILED}/left/{i}") is None}
            time.sleep(0.1)
        time.sleep(0.5)  # the last of them still has to go
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


class Vote:
    """Wishes of single processes that all follow at the same step.

    A vote is dispatched with a step and read with the next: nothing waits for the devices.
    """

    def __init__(self, mesh: Mesh, wishes: int):
        """Args:
        mesh: whose processes vote.
        wishes: how many things may be wished for.
        """
        self._ballot = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._shape = (mesh.size, wishes)
        everywhere = NamedSharding(mesh, PartitionSpec())
        self._count = jax.jit(lambda x: jnp.any(x, axis=0), out_shardings=everywhere)
        self._cast = None

    def cast(self, *wishes: bool) -> np.ndarray:
        """Casts this process's wishes.

        Returns:
            Bool [wishes]: what any process wished when `cast` was called the time before.
        """
        own = np.array([wishes])
        ballot = jax.make_array_from_callback(self._shape, self._ballot, lambda _: own)
        before, self._cast = self._cast, self._count(ballot)
        return np.zeros(len(wishes), bool) if before is None else np.asarray(before)
