"""The command line of the campaign; see the package."""

import argparse
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from tests.campaign import machine


def main() -> int:
    """Runs a campaign, or its worker; returns exit status 1 if a verdict is bad."""
    parser = argparse.ArgumentParser(prog="python -m tests.campaign")
    parser.add_argument("--inputs", type=int, default=2000, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--only", default="", metavar="TARGET,...", help="only targets whose names begin so"
    )
    parser.add_argument("--at", metavar="TARGET:NUMBER", help="repeat one input")
    parser.add_argument(
        "--keep", type=Path, metavar="DIR", help="copy the damaged folder of --at there"
    )
    parser.add_argument("--alarm", type=float, default=machine.HANG_SECONDS, metavar="SECONDS")
    parser.add_argument("--kills", type=int, metavar="N", help="instead, kill a run N times")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.kills:
        from tests.campaign.kills import kill

        print(kill(options.kills, options.seed, report=print))
        return 0
    from tests.campaign.targets import TARGETS

    if options.worker:
        machine.work(TARGETS, options.worker, options.seed, options.alarm)
        return 0
    if options.at:
        import tempfile

        name, _, number = options.at.rpartition(":")
        with tempfile.TemporaryDirectory() as folder:
            machine.use_only(Path(folder))
            campaign = machine.Campaign(TARGETS, Path(folder), options.seed, options.alarm)
            print(campaign.try_input(name, int(number), options.keep))
        return 0
    names = tuple(options.only.split(","))
    chosen = {name: target for name, target in TARGETS.items() if name.startswith(names)}
    if not chosen:
        print(f"--only: no target; there are {', '.join(TARGETS)}", file=sys.stderr)
        return 2
    start = time.monotonic()
    outcomes = machine.run(
        machine.shares(chosen, options.inputs),
        options.seed,
        options.alarm,
        report=lambda one: print(f"{one.verdict}: {one.where}: {one.message}", flush=True),
    )
    print(machine.table(outcomes))
    print(f"{time.monotonic() - start:.0f} s, seed {options.seed}")
    return int(any(one.verdict not in machine.GOOD for one in outcomes))


if __name__ == "__main__":
    sys.exit(main())
