"""Rehearses a run of many processes on one machine.

    python launch/local.py --processes 2 --devices 4 -- python -m geode_jax.main --config=...

Starts --processes copies of the command, each with --devices simulated CPU devices and with the
flags by which the processes find each other (`--coordinator_address`, `--num_processes`,
`--process_id`). Each line of output begins with the number of its process. Ctrl-C and SIGTERM are
forwarded to all processes. If one fails, the others get --grace seconds to end by themselves; the
exit code is that of the first that failed.
"""

import argparse
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import Any

POLL_SECONDS = 0.05
PROGRESS_SECONDS = 2
"""Minimum time between two printed states of a progress bar."""


def main(arguments: list[str]) -> int:
    """Runs the processes, and returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, default=2, help="number of processes (2)")
    parser.add_argument("--devices", type=int, default=4, help="CPU devices of each process (4)")
    parser.add_argument(
        "--grace",
        type=float,
        default=60,
        help="seconds until the others are killed after a failure (60)",
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND")
    options = parser.parse_args(arguments)
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    if not command:
        parser.error("no command behind --")
    if min(options.processes, options.devices) < 1:
        parser.error("--processes and --devices are at least 1")
    if not 0 <= options.grace < float("inf"):
        parser.error(f"--grace {options.grace} is not a number of seconds")
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count="
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        # Threads: each device that waits in a collective blocks one, and a device may wait in
        # several collectives. With fewer threads processes have been seen to hang.
        "PJRT_NPROC": str(max(os.cpu_count() or 1, 4 * options.devices)),
        "XLA_FLAGS": f"{flags}{options.devices}".strip(),
        "PYTHONUNBUFFERED": "1",
    }
    address = f"127.0.0.1:{free_port()}"
    processes: list[subprocess.Popen] = []
    # This process forwards signals, and ends after its processes.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda signum, _: forward(processes, signum))
    try:
        for i in range(options.processes):
            own = [f"--coordinator_address={address}", f"--num_processes={options.processes}"]
            processes.append(
                subprocess.Popen(
                    [*command, *own, f"--process_id={i}"],
                    env=environment,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # so that Ctrl-C reaches them only once, from here
                )
            )
    except OSError as error:
        stop(processes)
        print(f"local.py: {command[0]}: {error.strerror}", file=sys.stderr)
        return 2
    readers = [
        threading.Thread(target=copy_output, args=(i, p.stdout)) for i, p in enumerate(processes)
    ]
    for reader in readers:
        reader.start()
    code = wait(processes, options.grace)
    for reader in readers:
        reader.join()
    return code


def free_port() -> int:
    """Returns a port that is free now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def forward(processes: list[subprocess.Popen], signum: int) -> None:
    """Sends a signal to the processes that still run."""
    for process in processes:
        if process.poll() is None:
            process.send_signal(signum)


def wait(processes: list[subprocess.Popen], grace: float) -> int:
    """Waits for all processes; returns the first failure's exit code, 128 + N for signal N."""
    first, since = 0, 0.0
    while any(process.poll() is None for process in processes):
        failed = [process.returncode for process in processes if process.poll()]
        if failed and not first:
            first, since = failed[0], time.monotonic()
        if first and time.monotonic() - since > grace:
            print("local.py: processes did not end by themselves: killed", file=sys.stderr)
            stop(processes)
        time.sleep(POLL_SECONDS)
    first = first or next((process.returncode for process in processes if process.returncode), 0)
    return 128 - first if first < 0 else first


def stop(processes: list[subprocess.Popen]) -> None:
    """Kills the processes that still run, with their own child processes."""
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def copy_output(number: int, stream: Any) -> None:
    """Copies a process's output line by line.

    A progress bar rewrites its line many times; one state in `PROGRESS_SECONDS` is printed.
    """
    rest, shown = b"", 0.0
    while chunk := stream.read1():
        *pieces, rest = re.split(rb"([\r\n])", rest + chunk)
        for text, end in zip(pieces[::2], pieces[1::2], strict=True):
            now = time.monotonic()
            if text.strip() and (end == b"\n" or now - shown > PROGRESS_SECONDS):
                shown = now if end == b"\r" else shown
                print_line(number, text)
    if rest.strip():
        print_line(number, rest)
    stream.close()


def print_line(number: int, text: bytes) -> None:
    """Prints a line of a process's output."""
    sys.stdout.write(f"[{number}] {text.decode(errors='replace')}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
