"""Measures time and memory of tiled masked attention against PyTorch's with the same mask.

    python -m benchmarks.attention [--rounds 7]

The mask is that of packed questions behind a prefix: a row has four causal segments, which all see
the first eighth of the keys. PyTorch gets it as a boolean array, the only form of such a mask that
`scaled_dot_product_attention` takes. fp32, one row, 8 heads of 64; forward and backward. Memory is
the increase of the resident set at the peak of a call, in a process of its own.
"""

import multiprocessing
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import torch

from benchmarks import ledger
from geode_jax.ops.attention import Intervals, attention, visible
from geode_jax.runtime.process import keep_freed_memory

HEADS, WIDTH, SEGMENTS = 8, 64, 4
LENGTHS = (512, 1024, 2048, 4096, 8192)


def intervals(length: int) -> Intervals:
    """Returns the intervals of packed questions, [1, length]."""
    column = np.arange(length, dtype=np.int32)[None]
    start = column // (length // SEGMENTS) * (length // SEGMENTS)
    return Intervals(np.full_like(column, length // 8), start, column + 1)


def arrays(length: int) -> list[np.ndarray]:
    """Returns q, k, v and the cotangent, [1, length, HEADS, WIDTH]."""
    random = np.random.default_rng(0)
    return [random.standard_normal((1, length, HEADS, WIDTH), np.float32) for _ in range(4)]


def ours(length: int, implementation: str | None = None) -> Callable[[], list]:
    """Returns a compiled call for output and gradients."""

    @jax.jit
    def both(q, k, v, g, rows):
        def f(q, k, v):
            return attention(q, k, v, rows, implementation=implementation)

        out, vjp = jax.vjp(f, q, k, v)
        return [out, *vjp(g)]

    args = *map(jax.numpy.asarray, arrays(length)), intervals(length)
    return lambda: jax.block_until_ready(both(*args))


def theirs(length: int) -> Callable[[], list]:
    """Returns PyTorch's call for output and gradients."""
    q, k, v, g = (torch.tensor(x).transpose(1, 2).contiguous() for x in arrays(length))
    mask = torch.tensor(np.array(visible(intervals(length), length)))[:, None]

    def both():
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        out = torch.nn.functional.scaled_dot_product_attention(*inputs, attn_mask=mask)
        out.backward(g)
        return [out.detach(), *(x.grad for x in inputs)]

    return both


def check(length: int) -> None:
    """Asserts that outputs and gradients agree within 1e-4 of the largest number."""
    for a, b in zip(ours(length)(), theirs(length)(), strict=True):
        b = b.transpose(1, 2).numpy()
        np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(b).max())


def _status(name: str) -> int:
    """Returns an entry of this process's status, in kilobytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def _grown(side: str, length: int, send) -> None:
    """Sends the megabytes that a second call needs beyond the process's memory after the first."""
    torch.set_num_threads(ledger.threads())
    call = {"ours": ours, "theirs": theirs}[side](length)
    call()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _status("VmRSS")
    call()
    send.put((_status("VmHWM") - before) / 1024)


def peak_memory(side: str, length: int) -> float:
    """Returns the peak memory of a call in a new process, in megabytes."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_grown, args=(side, length, queue))
    process.start()
    grown = queue.get(timeout=600)
    process.join()
    return grown


def main() -> None:
    """Measures, prints a table and writes `attention.json`."""
    arguments = ledger.parser(__doc__, rounds=7).parse_args()
    keep_freed_memory()
    torch.set_num_threads(ledger.threads())
    rows: list[dict] = []
    memory: dict[str, list[float]] = {"ours": [], "theirs": []}
    for length in LENGTHS:
        check(length)
        shape = [1, length, HEADS, WIDTH]
        times = ledger.alternate(ours(length), theirs(length), arguments.rounds)
        name = "attention to packed segments, forward and backward"
        rows.append(ledger.row(name, *times, unit="s", dtype="float32", shape=shape))
        print(ledger.table(rows)[-1], flush=True)
    for length in LENGTHS[2:]:
        grown = {side: [peak_memory(side, length) for _ in range(3)] for side in memory}
        for side, found in grown.items():
            memory[side].append(sorted(found)[1])
        name = "its memory"
        rows.append(
            ledger.row(
                name,
                grown["ours"],
                grown["theirs"],
                unit="MB",
                dtype="float32",
                shape=[1, length, HEADS, WIDTH],
            )
        )
        print(ledger.table(rows)[-1], flush=True)
    growth = {side: m[-1] / m[0] for side, m in memory.items()}
    rise = f"from rows of {LENGTHS[2]:,} to {LENGTHS[-1]:,} memory grows"
    note = f"{rise} {growth['ours']:.1f} times (ours) and {growth['theirs']:.1f} times (theirs)"
    ledger.write("attention", rows, [note])


if __name__ == "__main__":
    main()
