"""Measures time and memory of tiled cross-entropy against that of all logits at once.

    python -m benchmarks.cross_entropy [--rounds 3]

Value and gradients for states and matrix, with Qwen's 151,936 entries, width 256, in fp32. "XLA" is
the same loss with materialised logits and the same compiler; "PyTorch" is its
`torch.nn.functional.cross_entropy` of a linear layer, in a process of its own. Memory is that of
the compiler's temporaries; for PyTorch it is that of logits and their gradient, which it keeps at
least. First all tokens count in the loss, then half of them, as with padded answers.
"""

import jax
import jax.numpy as jnp
import numpy as np
import torch

from benchmarks import ledger
from geode_jax.objectives.losses import token_cross_entropy
from geode_jax.ops.cross_entropy import token_loss
from geode_jax.runtime.process import keep_freed_memory

ENTRIES, WIDTH = 151_936, 256
MB = 2**20


def ours(hidden, matrix, labels, counted):
    """Returns the mean loss of the counted tokens, without computing the others."""
    args = hidden[None], matrix, labels[None, :, None], counted[None]
    return token_loss(token_cross_entropy, *args, tied=True) / jnp.sum(counted)


def materialised(hidden, matrix, labels, counted):
    """Returns the mean loss of the counted tokens from all logits."""
    logits = hidden @ matrix.T
    label = jnp.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]
    loss = jax.nn.logsumexp(logits, axis=-1) - label
    return jnp.sum(jnp.where(counted, loss, 0)) / jnp.sum(counted)


def compiled(loss, *args):
    """Returns a call that waits for value and gradients, and the megabytes of its temporaries."""
    program = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*args).compile()
    memory = program.memory_analysis()
    assert memory is not None  # compilers of CPUs and GPUs have the analysis
    return lambda: jax.block_until_ready(program(*args)), memory.temp_size_in_bytes / MB


def drawn(tokens: int, share: float) -> tuple[np.ndarray, ...]:
    """Returns random states, matrix, labels and mask of counted tokens."""
    random = np.random.default_rng(0)
    hidden = random.standard_normal((tokens, WIDTH), np.float32)
    matrix = random.standard_normal((ENTRIES, WIDTH), np.float32) * np.float32(WIDTH**-0.5)
    return hidden, matrix, random.integers(0, ENTRIES, tokens), random.random(tokens) < share


class Theirs:
    """The loss in PyTorch."""

    def __init__(self, tokens: int, share: float):
        hidden, matrix, labels, counted = drawn(tokens, share)
        self.x, self.w = (torch.tensor(a).requires_grad_() for a in (hidden, matrix))
        self.labels = torch.tensor(np.where(counted, labels, -100)).long()

    def __call__(self):
        self.x.grad = self.w.grad = None
        logits = torch.nn.functional.linear(self.x, self.w)
        loss = torch.nn.functional.cross_entropy(logits, self.labels)
        loss.backward()
        assert self.x.grad is not None and self.w.grad is not None
        return loss.detach().numpy(), (self.x.grad.numpy(), self.w.grad.numpy())


def check(got, want) -> None:
    """Asserts that value and gradients agree within 1e-4 of the largest number."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(b).max())


def measure(tokens: int, share: float, rounds: int) -> list[dict]:
    """Returns the rows of one size."""
    args = tuple(map(jnp.asarray, drawn(tokens, share)))
    our_call, our_memory = compiled(ours, *args)
    xla_call, xla_memory = compiled(materialised, *args)
    theirs = ledger.OtherProcess(Theirs, tokens, share)
    check(our_call(), xla_call())
    check(our_call(), theirs.get("__call__"))
    what = f"cross-entropy, {'all' if share == 1 else 'half of the'} tokens in the loss"
    facts = {"dtype": "float32", "shape": [tokens, WIDTH, ENTRIES]}
    rows = []
    for name, call in (("XLA", xla_call), ("PyTorch", lambda: theirs.call("__call__"))):
        times = ledger.alternate(our_call, call, rounds, warm_up=1)
        rows.append(ledger.row(f"{what}, against {name}", *times, unit="s", **facts))
    theirs.close()
    logits = 2 * tokens * ENTRIES * 4 / MB
    for name, memory in (("XLA", xla_memory), ("PyTorch", logits)):
        name = f"its memory, against {name}"
        rows.append(ledger.row(name, [our_memory], [memory], unit="MB", **facts))
    print("\n".join(ledger.table(rows)[2:]), flush=True)
    return rows


def main() -> None:
    """Measures, prints a table and writes `cross_entropy.json`."""
    arguments = ledger.parser(__doc__, rounds=3).parse_args()
    keep_freed_memory()
    rows = []
    for tokens, share in ((512, 1.0), (4096, 1.0), (4096, 0.5)):
        rows += measure(tokens, share, arguments.rounds)
    ledger.write("cross_entropy", rows)


if __name__ == "__main__":
    main()
