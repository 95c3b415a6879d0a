"""Runs all benchmarks of a CPU, and writes BENCHMARKS.md from their results.

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
"""Benchmarks in the order of the document; that of `gpu` follows if its results exist."""

HEAD = """# Benchmarks

Each table is from one run of one script, which first compares the results of both sides and then
times them in alternation. "Times better" is the median over the rounds of theirs / ours (for rates,
ours / theirs), with its extremes; rows below 1, which we lose, are kept. PyTorch's language models,
Mamba and loss run in a process of their own, with the settings that their users have. Rows of "our
memory setting" give them `keep_freed_memory`, which PyTorch's attention always has here.
`make bench` writes this page from `benchmarks/results/*.json`, which have the versions of all
packages.
"""

UNMEASURED = """## Not measured

Nothing has been measured on a GPU or TPU. On a machine with a GPU, `python -m benchmarks.gpu`
measures attention against cuDNN, the scan, the loss, the MFU of a training step, decoding against
the memory bandwidth and against transformers, and the latency of the student. Checked without a
GPU: each of these programs compiles for an H100 (`--compile h100:1x1`), and the kernels compute the
right numbers in interpreters (`tests/ops`).
"""


def section(name: str, result: dict) -> list[str]:
    """Returns the lines of a benchmark's section: machine, versions, table, notes."""
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
    """Returns the text of BENCHMARKS.md from all existing results."""
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
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--document", action="store_true", help="only write the document")
    arguments = parser.parse_args()
    for name in () if arguments.document else arguments.only:
        print(f"{name}:", flush=True)
        subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], check=True)
    Path("BENCHMARKS.md").write_text(document())


if __name__ == "__main__":
    main()
