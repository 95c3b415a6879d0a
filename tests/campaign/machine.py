"""Reads damaged folders and gives a verdict on each.

The inputs are read in a worker process, which is started again after an input that crashes it or
never returns to Python.
"""

import contextlib
import dataclasses
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.campaign.damage import Damage, damage

VERDICTS = ("refused", "read", "traceback", "silent", "hang", "memory")
GOOD = ("refused", "read")
HANG_SECONDS = 20
LOST_SECONDS = 30
"""Seconds after the alarm at which a worker that has not returned to Python is killed."""
MEMORY = 1 << 30
"""Most bytes of memory for reading one of these small inputs."""
MAX_DATA = 6 << 30
"""Most bytes of data of the worker."""
MAX_REFUSAL = 640
"""Most characters of a refusal: `MAX_MESSAGE` and the prefix `error: `."""
MAX_THREADS = 150
"""Threads from which on the worker is restarted: every restore of Orbax leaves some running."""
REPOSITORY = Path(__file__).resolve().parent.parent.parent


class Refused(Exception):
    """A reader refused an input; the message is its line."""


class _Hang(BaseException):
    pass


@dataclasses.dataclass(frozen=True)
class Target:
    """A reader and its input.

    Attributes:
        make: writes an intact input into an empty folder.
        read: reads a folder and returns a value; raises `Refused` or one of `refusals`.
        weight: share of the inputs, relative to other targets; 1 costs about 50 ms.
        files: patterns of the files that are damaged.
        silent: (value of the intact folder, value of the damaged one, the damage, the damaged
            folder) -> why the damage had to be noticed, "" if not. Called if the values differ.
        refusals: exceptions that count as refusals, besides UserError.
    """

    make: Callable[[Path], Any]
    read: Callable[[Path], Any]
    weight: float = 1
    files: tuple[str, ...] = ("**/*",)
    silent: Callable[[Any, Any, Damage, Path], str] = lambda *_: "the value has changed"
    refusals: tuple[type[Exception], ...] = ()


def any_reader_sees(before: Any, after: Any, done: Damage, folder: Path) -> str:
    """`silent` of inputs without checksums: only a plain damage must be noticed."""
    return "the file is not readable, and the value has changed" if done.plain else ""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The result of one input.

    Attributes:
        target, number: target and number of the input.
        verdict: one of `VERDICTS`.
        damage: description of the damage.
        message: the refusal, or the fault.
        seconds: time of reading.
    """

    target: str
    number: int
    verdict: str
    damage: str
    message: str
    seconds: float

    @property
    def where(self) -> str:
        """Target, number and damage of the input."""
        return f"{self.target}:{self.number}: {self.damage}"


def shared(name: str, make: Callable[[Path], Any]) -> Path:
    """Returns a folder that is made once for all targets and workers of a campaign.

    Args:
        name: name of the folder.
        make: function that fills it.
    """
    folder = Path(tempfile.gettempdir()) / name
    done = folder / ".done"
    if not done.exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        make(folder)
        done.touch()
    return folder


# --- One input ------------------------------------------------------------------------------------


def command(arguments: Sequence[str | Path]) -> str:
    """Runs `geode-jax ARGUMENTS` and returns what it prints.

    Raises:
        Refused: it ended with one line on stderr and exit status 2.
        AssertionError: it ended with another error.
    """
    from geode_jax.cli.command import main

    err, begun = sys.stderr.fileno(), os.lseek(sys.stderr.fileno(), 0, os.SEEK_CUR)
    out_begun = os.lseek(sys.stdout.fileno(), 0, os.SEEK_CUR)
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as end:
        sys.stderr.flush()
        message = os.pread(err, 1 << 20, begun).decode(errors="replace")
        lines = [line.rpartition("\r")[2] for line in message.split("\n")]
        errors = [line for line in lines if line.startswith("error: ")]
        assert end.code == 2, f"exit status {end.code}: {message[-300:]}"
        assert len(errors) == 1, f"{len(errors)} lines of error: {message[-300:]}"
        assert lines[-2:] == [errors[0], ""], f"more than one line: {message[-300:]}"
        raise Refused(errors[0]) from None
    sys.stdout.flush()
    return os.pread(sys.stdout.fileno(), 1 << 24, out_begun).decode(errors="replace")


@contextlib.contextmanager
def _files_for_output(folder: Path) -> Iterator[Callable[[], str]]:
    """Redirects stdout and stderr of the block to files; yields a function that reads stderr."""
    sys.stdout.flush(), sys.stderr.flush()
    kept = [os.dup(1), os.dup(2)]
    names = [folder / "stdout", folder / "stderr"]
    try:
        for number, name in enumerate(names, 1):
            file = os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, number)
            os.close(file)
        yield lambda: names[1].read_text(errors="replace")
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        for number, file in enumerate(kept, 1):
            os.dup2(file, number)
            os.close(file)


def _peak() -> int:
    """Returns the peak memory of this process since `_reset_peak`, in bytes; 0 if unknown."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("VmHWM:")[1].split()[0])
    return 0


def _reset_peak() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _waits() -> bool:
    """Returns whether a thread of this process waits for a writer of a pipe."""
    waiting = False
    for task in Path("/proc/self/task").glob("*/wchan"):
        with contextlib.suppress(OSError):  # it has ended
            waiting |= task.read_text() == "wait_for_partner"
    return waiting


def _raise_hang(*_):
    raise _Hang


def _read(target: Target, folder: Path, alarm: float) -> tuple[str, Any, str]:
    """Returns (verdict, value, message); the verdict is "read" even if the value has changed."""
    try:
        signal.signal(signal.SIGALRM, _raise_hang)
        signal.setitimer(signal.ITIMER_REAL, alarm)
        found = _read_in_time(target, folder)
        signal.setitimer(signal.ITIMER_REAL, 0)
        return found
    except _Hang:
        return "hang", None, f"more than {alarm:.0f} s"


def _read_in_time(target: Target, folder: Path) -> tuple[str, Any, str]:
    from geode_jax.errors import UserError

    value, verdict, message = None, "read", ""
    try:
        value = target.read(folder)
    except (Refused, UserError, *target.refusals) as error:
        verdict, message = "refused", str(error)
        if len(message) > MAX_REFUSAL or not message.isprintable() or not message:
            verdict, message = "traceback", f"the refusal is no line: {message[:300]!r}"
    except MemoryError:
        verdict, message = "memory", "the memory was full"
    except (Exception, SystemExit) as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        own = [f for f in traceback.extract_tb(error.__traceback__) if "geode_jax/" in f.filename]
        place = own[-1] if own else place
        where = f"{Path(place.filename).name}:{place.lineno}"
        verdict, message = "traceback", f"{type(error).__name__} in {where}: {error}"
    return verdict, value, message


class Campaign:
    """Makes intact folders of targets, and gives verdicts on damaged copies of them."""

    def __init__(self, targets: dict[str, Target], folder: Path, seed: int, alarm: float):
        """Args:
        targets: the targets by name.
        folder: folder for templates and copies.
        seed: seed of the damages.
        alarm: seconds after which a reader counts as hanging.
        """
        self._targets, self._folder, self._seed, self._alarm = targets, folder, seed, alarm
        self._intact: dict[str, Any] = {}

    def _template(self, name: str) -> Path:
        folder = self._folder / "intact" / name.replace("/", "_")
        if not (folder / "whole").is_dir():
            shutil.rmtree(folder, ignore_errors=True)
            (folder / "made").mkdir(parents=True)
            with _files_for_output(folder):
                self._targets[name].make(folder / "made")
            (folder / "made").rename(folder / "whole")
        return folder / "whole"

    def _copy(self, name: str) -> Path:
        # Always the same path, which some readers store.
        copy = self._folder / "copy"
        _remove(copy)
        copy.mkdir()
        shutil.copytree(self._template(name), copy / "input", symlinks=True)
        return copy / "input"

    def try_input(self, name: str, number: int, keep: Path | None = None) -> Outcome:
        """Makes and reads an input.

        Args:
            name: name of the target.
            number: number of the input.
            keep: folder that gets a copy of the damaged folder.

        Raises:
            RuntimeError: the target cannot read its intact folder.
        """
        target = self._targets[name]
        if name not in self._intact:
            intact = self._copy(name)
            with _files_for_output(intact.parent):
                verdict, value, message = _read(target, intact, 10 * self._alarm)
            if verdict != "read":
                raise RuntimeError(f"{name}: the intact input is not read: {verdict}: {message}")
            self._intact[name] = value
        input = self._copy(name)
        done = damage(input, random.Random(f"{self._seed}/{name}/{number}"), target.files)
        if keep:
            shutil.copytree(input, keep, symlinks=True)
        damaged = f"{done.kind} {done.path}"
        _reset_peak()
        peak, start = _peak(), time.monotonic()
        with _files_for_output(input.parent) as stderr:
            verdict, value, message = _read(target, input, self._alarm)
            printed = stderr()
        seconds = time.monotonic() - start
        if verdict == "read" and value != self._intact[name]:
            why = target.silent(self._intact[name], value, done, input)
            verdict, message = ("silent", why) if why else (verdict, "another value")
        if verdict in GOOD and "Traceback (most recent call last)" in printed:
            verdict, message = "traceback", f"in a thread: {printed.strip().splitlines()[-1]}"
        if verdict in GOOD and _waits():
            verdict, message = "hang", "a thread waits on a pipe, and the process will not end"
        if verdict in GOOD and _peak() - peak > MEMORY:
            verdict, message = "memory", f"{(_peak() - peak) / 1e9:.1f} GB"
        return Outcome(name, number, verdict, damaged, " ".join(message.split())[:400], seconds)


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


# --- Many -----------------------------------------------------------------------------------------


def shares(targets: dict[str, Target], inputs: int) -> list[tuple[str, int]]:
    """Returns (target, number) of a campaign's inputs; every target has its share, at least one."""
    total = sum(target.weight for target in targets.values())
    counts = {n: max(1, round(inputs * t.weight / total)) for n, t in targets.items()}
    return [(name, number) for name, count in counts.items() for number in range(count)]


def use_only(folder: Path) -> None:
    """Sets the temporary and the cache folder of this process, so that it uses no other ones."""
    tempfile.tempdir = str(folder)
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")


def work(targets: dict[str, Target], folder: Path, seed: int, alarm: float) -> None:
    """Runs the worker: reads lines `[target, number]` from stdin, writes outcomes to stdout."""
    use_only(folder)  # the parent removes it
    # A reader that needs too much memory then raises MemoryError, and the worker goes on.
    resource.setrlimit(resource.RLIMIT_DATA, (MAX_DATA, MAX_DATA))
    with os.fdopen(os.dup(1), "w") as answers, os.fdopen(os.dup(0)) as questions:
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        campaign = Campaign(targets, folder, seed, alarm)
        for line in questions:
            outcome = campaign.try_input(*json.loads(line))
            answers.write(json.dumps(dataclasses.asdict(outcome)) + "\n")
            answers.flush()
            if outcome.verdict in ("hang", "memory"):
                os._exit(0)  # what it leaves behind would affect the next input


class Worker:
    """The process that reads the inputs, seen from its parent."""

    def __init__(self, folder: Path, seed: int, alarm: float):
        arguments = ["--worker", folder, "--seed", seed, "--alarm", alarm]
        with open(folder / "worker", "ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.campaign", *map(str, arguments)],
                cwd=REPOSITORY,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
            )

    def try_input(self, name: str, number: int, seconds: float) -> Outcome | None:
        """Returns the outcome of an input; None if the worker died or did not answer in time."""
        timer = threading.Timer(seconds, self._process.kill)
        timer.start()
        try:
            self._process.stdin.write(f"{json.dumps([name, number])}\n".encode())
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = b""
        finally:
            timer.cancel()
        return Outcome(**json.loads(answer)) if answer else None

    @property
    def worn_out(self) -> bool:
        """True if the worker has so many threads that they would slow down the next inputs."""
        folder = Path(f"/proc/{self._process.pid}/task")
        return folder.is_dir() and len(os.listdir(folder)) > MAX_THREADS

    def end(self) -> None:
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def run(
    inputs: Iterable[tuple[str, int]], seed: int, alarm: float = HANG_SECONDS, report=lambda _: None
) -> list[Outcome]:
    """Returns the outcomes of inputs.

    An input that ends its process is read once more by another: about once in 10,000 inputs a
    thread of TensorStore ended a process that read a damaged checkpoint, and no input repeated it.
    What ends both is a bad outcome; what ends one is reported.

    Args:
        inputs: (target, number), as from `shares`.
        seed: seed of the damages.
        alarm: seconds after which a reader counts as hanging.
        report: function that gets every bad outcome.

    Raises:
        RuntimeError: the worker cannot be started, or a target cannot read its intact folder.
    """
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="campaign") as folder:
        folder = Path(folder)
        worker, fresh, ready, ended = None, True, set(), set()
        pending = deque(inputs)
        while pending:
            name, number = pending.popleft()
            if worker is None:
                worker, fresh = Worker(folder, seed, alarm), True
            start = time.monotonic()
            # A target's first input makes its intact folder; a worker's first one imports JAX.
            first = fresh or name not in ready
            outcome = worker.try_input(name, number, alarm + (300 if first else LOST_SECONDS))
            ready.add(name)
            if outcome is None:
                worker.end()
                worker = None
                log = (folder / "worker").read_text(errors="replace")
                if "RuntimeError: " in log[-2000:]:
                    raise RuntimeError(log.strip().splitlines()[-1])
                took = time.monotonic() - start
                verdict = "hang" if took > alarm else "traceback"
                message = f"the process ended after {took:.0f} s: {log[-200:]}"
                outcome = Outcome(name, number, verdict, "?", message, took)
                if verdict == "traceback" and (name, number) not in ended:
                    ended.add((name, number))
                    report(dataclasses.replace(outcome, verdict="ended, and read once more"))
                    pending.appendleft((name, number))
                    continue
                if fresh and len(outcomes) and outcomes[-1].damage == "?":
                    raise RuntimeError(f"the worker does not start: {log[-500:]}")
            elif outcome.verdict in ("hang", "memory") or worker.worn_out:
                worker.end()
                worker = None
            fresh = False
            if outcome.verdict not in GOOD:
                report(outcome)
            outcomes.append(outcome)
        if worker:
            worker.end()
    return outcomes


def table(outcomes: Iterable[Outcome]) -> str:
    """Returns the counts by target and verdict, and the seconds of reading, as a text table."""
    counts: dict[str, Counter] = {}
    seconds: Counter = Counter()
    for one in outcomes:
        counts.setdefault(one.target, Counter())[one.verdict] += 1
        for name in (one.target, "all"):
            seconds[name] += one.seconds
    counts["all"] = sum(counts.values(), Counter())
    width = max(map(len, counts))
    lines = [
        " " * width + "".join(f"{verdict:>11}" for verdict in ("inputs", *VERDICTS, "seconds"))
    ]
    for name, found in counts.items():
        cells = (found.total(), *(found[verdict] for verdict in VERDICTS))
        cells = "".join(f"{cell:>11,}" for cell in cells)
        lines.append(f"{name.ljust(width)}{cells}{seconds[name]:>11.1f}")
    return "\n".join(lines)
