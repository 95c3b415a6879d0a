"""Writes the tables of docs/SCALING.md: python -m benchmarks.scaling [--rows N]

Plans each row that is not yet in `runs/plan/` (one JSON file a row; delete it to plan the row
again), most important first, and writes the tables between the document's markers. It can be
stopped at any time, and the next call continues. A row takes one to five minutes on two cores, in a
process of its own, since a failing compiler may end its process.
"""

import argparse
import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from geode_jax.cli.reported import reported
from geode_jax.errors import UserError
from geode_jax.exports import files
from geode_jax.plan.topology import parse_topology

STUDENT, SMALL, GEODE = (
    "configs/hidden_cot.py:full",
    "configs/hidden_cot.py:small",
    "configs/geode_joint.py:full",
)
CACHE, DOCUMENT = Path("runs/plan"), Path("docs/SCALING.md")
PER_CHIP = {STUDENT: 4, GEODE: 2, SMALL: 1}
"""Scenes of each chip in tables of weak scaling."""
STRONG = {STUDENT: 64, GEODE: 64}
"""Scenes of a batch in tables of strong scaling."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One plan: `geode-jax plan --config CONFIG --topology TOPOLOGY --mesh MESH --batch SCENES`."""

    config: str
    topology: str
    scenes: int

    @property
    def mesh(self) -> tuple[int, int, int]:
        """Mesh that spreads parameters over a TPU slice, or over the GPUs of each node."""
        topology = parse_topology(self.topology)
        return (1 if topology.chip.platform == "tpu" else topology.shape[0], -1, 1)

    @property
    def file(self) -> Path:
        """File of the row's result."""
        config = re.sub(r"\W+", "-", Path(self.config).name)
        mesh = "-".join(map(str, self.mesh))
        name = f"{config}_{self.topology.replace(':', '-')}_{mesh}_{self.scenes}.json"
        return CACHE / name

    @property
    def command(self) -> list[str]:
        """Arguments of `geode-jax` that plan the row."""
        mesh = ",".join(map(str, self.mesh))
        options = ["--config", self.config, "--topology", self.topology, f"--mesh={mesh}"]
        return ["plan", *options, "--batch", str(self.scenes), "--train-only", "--json"]


NAMED = ("v5e:4x4", "h100:2x8", "v6e:8x8", "v5p:4x4x4", "h100:8x8")
OTHERS = ("h100:1x1", "a100:1x8", "h100:64x8", "v5e:16x16", "v5p:8x8x8")
"""Further topologies, from one chip to 512."""
SMALL_ON = ("rtx3080:1x1", "h100:1x1", "a100:1x8")
STRONG_ON = ("h100:1x8", "h100:2x8", "h100:4x8", "h100:8x8")


def weak(config: str, topology: str) -> Row:
    """Returns the row of weak scaling: each chip has the same number of scenes."""
    return Row(config, topology, PER_CHIP[config] * parse_topology(topology).size)


def strong(config: str, topology: str) -> Row:
    """Returns the row of strong scaling: each batch has the same number of scenes."""
    return Row(config, topology, STRONG[config])


def rows() -> list[Row]:
    """Returns all rows, most important first."""
    found = [weak(config, topology) for config in (STUDENT, GEODE) for topology in NAMED]
    found += [weak(SMALL, topology) for topology in SMALL_ON]
    found += [weak(config, topology) for topology in OTHERS[:3] for config in (STUDENT, GEODE)]
    found += [strong(config, topology) for topology in STRONG_ON for config in (STUDENT, GEODE)]
    found += [weak(config, topology) for topology in OTHERS[3:] for config in (STUDENT, GEODE)]
    return list(dict.fromkeys(found))


def make(row: Row) -> None:
    """Plans a row and writes its result, or the last line of a compiler's error.

    Raises:
        UserError: a compiler is missing.
    """
    code = "from geode_jax.cli.command import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, *row.command], capture_output=True, text=True, check=False
    )
    lines = done.stdout.strip().splitlines()
    words = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    if done.returncode == 2:  # one line for the user
        raise UserError(words.removeprefix("error: "))
    planned = done.returncode == 0 and lines
    facts = json.loads(lines[-1]) if planned else {"failed": words[:300]}
    files.write_json(row.file, facts)
    print(f"  {facts.get('failed') or facts['bound']}", flush=True)


def result(row: Row) -> dict[str, Any] | None:
    """Returns the result of a row; None: not planned, or the compiler failed."""
    facts = json.loads(row.file.read_text()) if row.file.exists() else {"failed": ""}
    return None if "failed" in facts else facts


# --- Tables ---------------------------------------------------------------------------------------

HEADER = (
    "| topology | mesh | scenes | fits | peak of a chip | compute | memory | network | binds | "
    "MFU | tokens/s | chip-hours |"
)


def line(row: Row) -> str:
    """Returns a row as a line of the table."""
    p = result(row)
    if p is None:
        why = "failed to compile" if row.file.exists() else "not planned yet"
        return f"| {row.topology} | | {row.scenes} | {why} |" + " |" * 8
    mesh = " x ".join(f"{axis} {size}" for axis, size in p["mesh"].items() if size > 1) or "1"
    start = (
        f"| {row.topology} | {mesh} | {p['scenes_per_batch']} | "
        f"{'yes' if p['fits'] else '**no**'} | {p['hbm_peak_bytes'] / 1e9:.1f} of "
        f"{p['hbm_bytes'] / 1e9:.0f} GB | "
    )
    if p["bound"] is None:
        return start + "| " * 7
    times = " | ".join(_milliseconds(p["seconds"][k]) for k in ("compute", "memory", "network"))
    return start + (
        f"{times} | {p['bound']} | {p['mfu_ceiling']:.0%} | {p['tokens_per_second']:,.0f} | "
        f"{p['chip_hours']:.3g} |"
    )


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"


def table(chosen: list[Row]) -> str:
    """Returns rows as a Markdown table."""
    return "\n".join([HEADER, "|" + " --- |" * HEADER.count("|", 1), *map(line, chosen)])


def collectives(chosen: list[Row]) -> str:
    """Returns a table of the bytes that a chip sends in a step, by kind and mesh axes."""
    out = ["| topology | sent by a chip in a step |", "| --- | --- |"]
    for row in chosen:
        p = result(row)
        if p is None:
            continue
        sent = p.get("collective_bytes", {})
        parts = [
            f"{kind} along {axes} {size / 1e9:.2f} GB"
            for axes, kinds in sent.items()
            for kind, size in sorted(kinds.items(), key=lambda pair: -pair[1])
            if size >= 5e6
        ]
        out.append(f"| {row.topology} | {', '.join(parts) or 'less than 5 MB'} |")
    return "\n".join(out)


def growth(chosen: list[Row]) -> str:
    """Returns a table of scenes a second of a chip, relative to the first row.

    It has two estimates: with full overlap (a step takes the longest of its bounds), and with none
    (a step takes their sum).
    """
    out = [
        "| topology | chips | scenes | a step, all overlapped | of linear | nothing overlapped | "
        "of linear |",
        "|" + " --- |" * 7,
    ]
    first: dict[str, float] = {}
    for row in chosen:
        p = result(row)
        if p is None or p["bound"] is None or not p["fits"]:
            continue
        cells = []
        for name, seconds in (("best", p["step_seconds"]), ("worst", sum(p["seconds"].values()))):
            rate = p["scenes_per_batch"] / seconds / p["devices"]
            cells += [_milliseconds(seconds), f"{rate / first.setdefault(name, rate):.0%}"]
        cells = [row.topology, str(p["devices"]), str(p["scenes_per_batch"]), *cells]
        out.append(f"| {' | '.join(cells)} |")
    return "\n".join(out)


def sections() -> dict[str, str]:
    """Returns the text of each marker."""
    out = {}
    for name, config in (("student", STUDENT), ("geode", GEODE)):
        chips = sorted(
            (weak(config, t) for t in (*NAMED, *OTHERS)),
            key=lambda row: parse_topology(row.topology).size,
        )
        out[name] = table(chips)
        out[f"{name} collectives"] = collectives(chips)
        tpus = [row for row in chips if row.topology.startswith("v5p")]
        gpus = [row for row in chips if row.topology.startswith("h100")]
        out[f"{name} weak"] = growth(gpus) + "\n\n" + growth(tpus)
        out[f"{name} strong"] = growth([strong(config, t) for t in STRONG_ON])
    out["small"] = table([weak(SMALL, t) for t in SMALL_ON])
    missing = [row for row in rows() if result(row) is None]
    named = ", ".join(
        f"{row.topology} with {row.scenes} scenes of {Path(row.config).name}" for row in missing
    )
    out["missing"] = f"Not planned: {named}." if missing else "Every row is planned."
    return out


def write(document: Path) -> None:
    """Writes the tables into the document, between `<!-- NAME -->` and `<!-- end -->`.

    Raises:
        UserError: a marker is missing.
    """
    text = document.read_text()
    for name, body in sections().items():
        pattern = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
        if not pattern.search(text):
            raise UserError(f"{document}: no marker <!-- {name} -->")
        text = pattern.sub(lambda found, body=body: f"{found[1]}{body}\n{found[2]}", text)
    files.write_text(document, text)


def main() -> None:
    """Plans the missing rows, and writes the document after each."""
    parser = argparse.ArgumentParser(description="Plan the rows of docs/SCALING.md.")
    parser.add_argument(
        "--rows", type=int, help="maximum number of rows to plan; 0: only write tables"
    )
    count = parser.parse_args().rows
    with reported():
        missing = [row for row in rows() if not row.file.exists()]
        for i, row in enumerate(missing[:count]):
            print(f"{i + 1}/{len(missing[:count])} geode-jax {' '.join(row.command)}", flush=True)
            make(row)
            write(DOCUMENT)
        write(DOCUMENT)


if __name__ == "__main__":
    main()
