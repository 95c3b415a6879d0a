"""Rehearses a run of many processes on one machine.

    python launch/local.py --processes 2 --devices 4 -- python -m geode_jax.main --config=...

Starts the command so many times, each with that many simulated CPU devices and with the flags by
which the processes find each other (`--coordinator_address`, `--num_processes`, `--process_id`).
Every line of output is prefixed with the number of its process. Ctrl-C and SIGTERM go to all of
them. Where one ends with an error the others get --grace seconds to notice and end by themselves;
the exit code is that of the first that failed.
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

POLL_SECONDS = 0.05
BAR_SECONDS = 2


def main(arguments: list[str]) -> int:
    """Runs the processes; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, default=2, help="how many (2)")
    parser.add_argument("--devices", type=int, default=4, help="CPU devices of each (4)")
    parser.add_argument("--grace", type=float, default=60, help="seconds (60)")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND")
    options = parser.parse_args(arguments)
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    if not command:
        parser.error("no command behind --")
    if min(options.processes, options.devices) < 1:
        parser.error("--processes and --devices are at least 1")
    if not 0 <= options.grace < float("inf"):
        parser.error(f"--grace {options.grace} is no number of seconds")
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count="
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        # Threads: devices that wait for each other in a collective take one each, and a device may
        # wait in several. With fewer they have been seen to wait for ever.
        "PJRT_NPROC": str(max(os.cpu_count() or 1, 4 * options.devices)),
        "XLA_FLAGS": f"{flags}{options.devices}".strip(),
        "PYTHONUNBUFFERED": "1",
    }
    address = f"127.0.0.1:{free_port()}"
    processes: list[subprocess.Popen] = []
    # Signals to this process are theirs: it ends when they have ended.
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
                    start_new_session=True,  # Ctrl-C reaches them once, from here
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
    """A port that nobody listens on now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def forward(processes: list[subprocess.Popen], signum: int) -> None:
    """Sends a signal to those that still run."""
    for process in processes:
        if process.poll() is None:
            process.send_signal(signum)


def wait(processes: list[subprocess.Popen], grace: float) -> int:
    """Waits for all to end; the exit code of the first that failed, as a shell has it."""
    first, since = 0, 0.0
    while any(process.poll() is None for process in processes):
        failed = [process.returncode for process in processes if process.poll()]
        if failed and not first:
            first, since = failed[0], time.monotonic()
        if first and time.monotonic() - since > grace:
            print("local.py: the others did not end by themselves: killed", file=sys.stderr)
            stop(processes)
        time.sleep(POLL_SECONDS)
    first = first or next((process.returncode for process in processes if process.returncode), 0)
    return 128 - first if first < 0 else first


def stop(processes: list[subprocess.Popen]) -> None:
    """Kills whatever still runs, and what it has started."""
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def copy_output(number: int, stream) -> None:
    """Copies a process's output, line by line.

    Of a progress bar, which draws its line over and over, a state now and then.
    """
    rest, shown = b"", 0.0
    while chunk := stream.read1():
        *pieces, rest = re.split(rb"([\r\n])", rest + chunk)
        for text, end in zip(pieces[::2], pieces[1::2], strict=True):
            now = time.monotonic()
            if text.strip() and (end == b"\n" or now - shown > BAR_SECONDS):
                shown = now if end == b"\r" else shown
                say(number, text)
    if rest.strip():
        say(number, rest)
    stream.close()


def say(number: int, text: bytes) -> None:
    """A line of a process's output."""
    sys.stdout.write(f"[{number}] {text.decode(errors='replace')}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
