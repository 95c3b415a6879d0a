"""All benchmarks that a CPU can run, one after the other, and BENCHMARKS.md from their results.

python -m benchmarks [--only NAME ...] [--document]
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from benchmarks import ledger

NAMES = (
    "language_model",
    "attention",
    "cross_entropy",
    "mamba",
    "scene_questions",
    "cold_start",
    "loader",
)
"""In the order of the document; `gpu`, which needs one, is added where it has been run."""

HEAD = """# What was measured

Each table is one run of one script, ours and theirs turn by turn, after their results were found
equal. "Times better" is the median over the rounds of theirs / ours (for rates, ours / theirs),
with its least and most: below 1 we lose, and the row stays. Language models, Mamba and the loss of
PyTorch run in a process of their own, as their users have them; rows of "our memory setting" give
them `keep_freed_memory` too, which PyTorch's attention always has. Written by `make bench` from
`benchmarks/results/*.json`, which have the versions of everything.
"""

UNMEASURED = """## Not measured

No row of a GPU or TPU: `python -m benchmarks.gpu` (attention against cuDNN, the scan, the loss,
MFU of a training step, decoding against its bandwidth and against transformers, latency of the
student) is one command for a machine that has one. What could be proven without: every program of
it compiles for an H100 that is not there (`--compile h100:1x1`), and the kernels' numbers in
interpreters (`tests/ops`).
"""


def section(name: str, result: dict) -> list[str]:
    """A table with what it was measured on."""
    machine, title = result["machine"], name.replace("_", " ").capitalize()
    versions = ", ".join(f"{k} {v}" for k, v in machine["versions"].items())
    where = f"{machine['processor']}, {machine['threads']} threads; Python {machine['python']}"
    lines = [
        f"## {title}",
        "",
        f"`{result['command']}`, {result['date']}, {where}, {versions}.",
        "",
    ]
    lines += [*ledger.table(result["rows"]), ""]
    return lines + [f"{note[0].upper()}{note[1:]}.\n" for note in result["notes"]]


def document() -> str:
    """BENCHMARKS.md of all results there are."""
    lines = [HEAD]
    for name in (*NAMES, "gpu"):
        path = ledger.RESULTS / f"{name}.json"
        if path.exists():
            lines += section(name, json.loads(path.read_text()))
    if not (ledger.RESULTS / "gpu.json").exists():
        lines.append(UNMEASURED)
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    """Runs the scripts, each in a process of its own, and writes the document."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--document", action="store_true", help="write it, and run nothing")
    arguments = parser.parse_args()
    for name in () if arguments.document else arguments.only:
        print(f"{name}:", flush=True)
        subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], check=True)
    Path("BENCHMARKS.md").write_text(document())


if __name__ == "__main__":
    main()
