"""The fuzzing campaign: its verdicts on known faults, and on the readers of this project."""

import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.campaign import damage, kills, machine
from tests.campaign.machine import Target
from tests.campaign.targets import TARGETS

INPUTS = 2000


def write_number(folder: Path) -> None:
    (folder / "number.txt").write_text("7")


def read_number(folder: Path) -> int:
    return (folder / "number.txt").read_bytes()[0]


def hangs(folder: Path) -> int:
    while read_number(folder) != ord("7"):
        time.sleep(0.01)
    return 7


def fills(folder: Path) -> int:
    kept = bytearray(2 * machine.MEMORY if read_number(folder) != ord("7") else 1)
    kept[:: 1 << 12] = b"x" * len(kept[:: 1 << 12])
    return 7


def prints(folder: Path) -> int:
    if read_number(folder) != ord("7"):
        os.write(2, b"Traceback (most recent call last):\nError: of a thread\n")
    return 7


def long_refusal(folder: Path) -> int:
    if read_number(folder) != ord("7"):
        raise machine.Refused("no\nline")
    return 7


@pytest.mark.parametrize(
    ("read", "verdict"),
    [
        (read_number, "silent"),
        (lambda folder: {ord("7"): 7}[read_number(folder)], "traceback"),
        (hangs, "hang"),
        (prints, "traceback"),
        (long_refusal, "traceback"),
        (lambda folder: 7, "read"),
    ],
)
def test_every_verdict_is_seen(read, verdict, tmp_path):
    assert verdict_of(read, tmp_path) == verdict


def verdict_of(read: Callable[[Path], int], folder: Path) -> str:
    """The verdict on a reader of a number whose file is damaged."""

    def flip(folder, draw, patterns):
        (folder / "number.txt").write_text("8")
        return damage.Damage("flip", "number.txt", False)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "damage", flip)
        patch.setattr(machine, "MEMORY", 1 << 26)
        campaign = machine.Campaign({"number": Target(write_number, read)}, folder, 0, alarm=1)
        return campaign.try_input("number", 0).verdict


def test_too_much_memory_is_seen(tmp_path):
    """In a new process: this one may have kept freed memory, which the reader would use again."""
    code = (
        "import sys; from pathlib import Path; from tests.campaign_test import fills, verdict_of; "
        "print(verdict_of(fills, Path(sys.argv[1])))"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, cwd=machine.REPOSITORY, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "memory\n"), done.stderr


def test_a_damage_is_a_function_of_its_seed_and_changes_one_file(tmp_path):
    seen = set()
    for number in range(200):
        content = []
        for copy in range(2):
            folder = tmp_path / f"{number}-{copy}"
            folder.mkdir()
            (folder / "a.json").write_text('{"scene": "x", "sizes": [1, 2.5], "name": null}')
            (folder / "b.bin").write_bytes(bytes(range(256)))
            done = damage.damage(folder, random.Random(number))
            files = sorted(folder.iterdir())
            regular = [p.read_bytes() if p.is_file() and not p.is_symlink() else b"" for p in files]
            content.append((done, [p.name for p in files], regular))
        assert content[0] == content[1]
        seen.add(content[0][0].kind)
    assert len(seen) > 25


def test_every_target_reads_its_own_inputs_and_is_in_the_campaign():
    inputs = machine.shares(TARGETS, INPUTS)
    assert {name for name, _ in inputs} == set(TARGETS) and abs(len(inputs) - INPUTS) < 50


@pytest.mark.parametrize("ends_both", [False, True])
def test_an_input_that_ends_its_process_is_read_once_more(ends_both, monkeypatch):
    good = machine.Outcome("export", 0, "refused", "flip", "manifest.json: not JSON", 0.0)
    answers = iter([None, None if ends_both else good])

    class Worker:
        worn_out = False

        def __init__(self, folder, seed, alarm):
            (folder / "worker").touch()

        def try_input(self, name, number, seconds):
            return next(answers)

        def end(self):
            pass

    monkeypatch.setattr(machine, "Worker", Worker)
    reported: list[machine.Outcome] = []
    (outcome,) = machine.run([("export", 0)], seed=0, report=reported.append)
    assert outcome.verdict == ("traceback" if ends_both else "refused")
    assert [one.verdict for one in reported[:1]] == ["ended, and read once more"]
    assert len(reported) == 1 + ends_both


TRAINED = ("config", "ask", "export", "leaves", "tokenizer", "restore", "resume")
"""Targets that train a model first, which is slow."""


def test_a_few_damaged_inputs_of_the_other_readers():
    trained = {f"run/{name}" for name in TRAINED} | {"config/flags"}
    assert trained < set(TARGETS)
    check({name: target for name, target in TARGETS.items() if name not in trained}, 150)


def check(targets: dict[str, Target], inputs: int) -> None:
    outcomes = machine.run(machine.shares(targets, inputs), seed=0, report=print)
    print(machine.table(outcomes))
    bad = [one for one in outcomes if one.verdict not in machine.GOOD]
    assert not bad, "\n".join(f"{one.verdict}: {one.where}: {one.message}" for one in bad)


@pytest.mark.slow
def test_damaged_inputs_are_refused_in_one_line_or_read_aright():
    check(TARGETS, INPUTS)


@pytest.mark.slow
def test_random_kills_lose_nothing():
    print(kills.kill(5, seed=random.randrange(1 << 30), report=print))
