"""The command line of the rehearsal; see the package."""

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from tests.rehearsal import raw
from tests.rehearsal.run import RECIPES, REPOSITORY, facts, timed


def main() -> int:
    """Runs the recipes; returns exit status 1 if one failed, or if kills changed its end."""
    parser = argparse.ArgumentParser(prog="python -m tests.rehearsal")
    parser.add_argument("--only", choices=RECIPES, help="one recipe; default: both")
    parser.add_argument("--out", type=Path, metavar="DIR", help="keep inputs and results there")
    parser.add_argument("--kills", type=int, default=0, metavar="N", help="repeat, killed N times")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    options = parser.parse_args()
    folder = options.out or Path(tempfile.mkdtemp(prefix="rehearsal"))
    data = Path(os.environ.get("GEODE_JAX_DATA", REPOSITORY.parent / "shared" / "data"))
    inputs = folder / "raw"
    if not inputs.exists():
        print(f"inputs: {inputs}", flush=True)
        raw.write_raw(inputs, data if data.is_dir() else None)
    failed = False
    for recipe in (options.only,) if options.only else RECIPES:
        status, seconds = timed(recipe, inputs, folder / recipe)
        print(f"-- {recipe}: ended with {status} after {seconds:.0f} s", flush=True)
        failed |= bool(status)
        if options.kills and not status:
            killed = folder / f"{recipe}-killed"
            shutil.rmtree(killed, ignore_errors=True)
            timed(recipe, inputs, killed, kills=options.kills, seed=options.seed)
            same = facts(recipe, killed) == facts(recipe, folder / recipe)
            print(f"-- {recipe}: {options.kills} kills, {'the same' if same else 'ANOTHER'} end")
            failed |= not same
    if not options.out and not failed:
        shutil.rmtree(folder)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
