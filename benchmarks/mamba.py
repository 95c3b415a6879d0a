"""Measures the Mamba block and its scan against PyTorch's with the same weights.

    python -m benchmarks.mamba [--rounds 7]

Width 512 (1,024 channels of 16 states), one row of 1,024 positions, fp32; forward alone, and with
the gradients of input and weights. Compared with `transformers`' block without its CUDA kernels,
and with loops over positions that unbind the positions once. (transformers' loop indexes its arrays
in each step, so the gradient writes whole arrays in each step; its training is measured on 128
positions.) The usual loop computes the output of each position inside; the fairest loop moves all
work that can be moved in front of the loop or behind it. PyTorch runs in a process of its own with
the settings that its users have, and the fairest loop again with our memory setting.
"""

import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from transformers import MambaConfig as ReferenceConfig
from transformers import MambaModel
from transformers.models.mamba.modeling_mamba import MambaBlock as Reference

from benchmarks import ledger
from geode_jax.models.mamba import MambaBlock, MambaConfig
from geode_jax.ops.selective_scan import selective_scan
from geode_jax.runtime.process import keep_freed_memory

WIDTH, POSITIONS, SHORT = 512, 1024, 128


def reference() -> Reference:
    """Returns transformers' block with random weights; only a whole model initialises all."""
    torch.manual_seed(0)
    config = ReferenceConfig(
        vocab_size=1, hidden_size=WIDTH, num_hidden_layers=1, use_mambapy=False
    )
    block = MambaModel(config).layers[0]
    assert isinstance(block, Reference)
    return block


def copied(theirs: Reference) -> MambaBlock:
    """Returns this package's block with the same weights."""
    ours = MambaBlock(MambaConfig(width=WIDTH, layers=1), rngs=nnx.Rngs(0))
    weights = {name: jnp.asarray(w.detach().numpy()) for name, w in theirs.named_parameters()}
    mixer = ours.mixer
    assert mixer.conv.bias is not None and mixer.dt_proj.bias is not None
    ours.norm.scale[...] = weights["norm.weight"]
    mixer.in_proj.kernel[...] = weights["mixer.in_proj.weight"].T.reshape(WIDTH, 2, -1)
    mixer.conv.kernel[...] = weights["mixer.conv1d.weight"][:, 0].T
    mixer.conv.bias[...] = weights["mixer.conv1d.bias"]
    for name in ("x_proj", "dt_proj", "out_proj"):
        getattr(mixer, name).kernel[...] = weights[f"mixer.{name}.weight"].T
    mixer.dt_proj.bias[...] = weights["mixer.dt_proj.bias"]
    mixer.A_log[...], mixer.D[...] = weights["mixer.A_log"], weights["mixer.D"]
    return ours


def by_loop(u, step, A, b, c, D, *, read_in_turn: bool = False) -> torch.Tensor:
    """Computes the scan as a loop over positions; arguments as in `selective_scan`."""
    decay = torch.exp(step[..., None] * A)
    added = (step * u)[..., None] * b[:, :, None]
    state, out = torch.zeros_like(added[:, 0]), []
    for d, a, r in zip(decay.unbind(1), added.unbind(1), c.unbind(1), strict=True):
        state = d * state + a
        out.append(torch.einsum("beu,bu->be", state, r) if read_in_turn else state)
    y = torch.stack(out, 1)
    return (y if read_in_turn else torch.einsum("bleu,blu->ble", y, c)) + D * u


def fair(block: Reference, x: torch.Tensor) -> torch.Tensor:
    """Computes the block with the fairest loop."""
    m, length = block.mixer, x.shape[1]
    u, gate = m.in_proj(block.norm(x)).transpose(1, 2).chunk(2, dim=1)
    u = torch.nn.functional.silu(m.conv1d(u)[..., :length]).transpose(1, 2)
    parts = m.x_proj(u)
    step, b, c = parts.split([m.time_step_rank, m.ssm_state_size, m.ssm_state_size], dim=-1)
    step = torch.nn.functional.softplus(m.dt_proj(step))
    y = by_loop(u, step, -torch.exp(m.A_log), b, c, m.D)
    return x + m.out_proj(y * torch.nn.functional.silu(gate.transpose(1, 2)))


@functools.cache
def inputs_of_scan() -> list[np.ndarray]:
    """Returns u, delta, A, B, C and D."""
    random, E, U = np.random.default_rng(0), 2 * WIDTH, 16
    shapes = (
        (1, POSITIONS, E),
        (1, POSITIONS, E),
        (E, U),
        (1, POSITIONS, U),
        (1, POSITIONS, U),
        (E,),
    )
    u, delta, A, *rest = (random.standard_normal(shape, np.float32) for shape in shapes)
    return [u, np.log1p(np.exp(delta - 3)), -np.exp(A / 2), *rest]


@functools.cache
def inputs_of_block(positions: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((1, positions, WIDTH), np.float32)


class Ours:
    """The timed calls of this package, compiled; each waits for its result."""

    def __init__(self):
        graph, self.state = nnx.split(copied(reference()))

        def block(state, x):
            return nnx.merge(graph, state)(x)[0]

        def scan(*inputs):
            return selective_scan(*inputs)[0]

        self._block, self._scan = jax.jit(block), jax.jit(scan)
        self._block_slopes = jax.jit(jax.grad(_squared(block), (0, 1), has_aux=True))
        self._scan_slopes = jax.jit(jax.grad(_squared(scan), tuple(range(6)), has_aux=True))

    def block(self, positions: int, gradients: bool) -> tuple:
        """Returns the output and, if asked for, the input's gradient of a full backward pass."""
        x = inputs_of_block(positions)
        if not gradients:
            return (self._block(self.state, x).block_until_ready(),)
        (_, dx), y = jax.block_until_ready(self._block_slopes(self.state, x))
        return y, dx

    def scan(self, gradients: bool) -> tuple:
        """Returns the output and, if asked for, the gradients of all inputs."""
        inputs = inputs_of_scan()
        if not gradients:
            return (self._scan(*inputs).block_until_ready(),)
        slopes, y = jax.block_until_ready(self._scan_slopes(*inputs))
        return y, *slopes


def _squared(function: Callable) -> Callable:
    def loss(*args):
        y = function(*args)
        return jnp.sum(jnp.square(y)), y

    return loss


class Theirs:
    """The timed calls of PyTorch; the kind is "transformers", "fairest" or "usual"."""

    def __init__(self, kind: str):
        self.kind, self.model = kind, reference()

    def block(self, positions: int, gradients: bool) -> tuple:
        call = self.model if self.kind == "transformers" else functools.partial(fair, self.model)
        self.model.zero_grad()
        return _run(call, [inputs_of_block(positions)], gradients)

    def scan(self, gradients: bool) -> tuple:
        call = functools.partial(by_loop, read_in_turn=self.kind == "usual")
        return _run(call, inputs_of_scan(), gradients)


def _run(call: Callable, inputs: list[np.ndarray], gradients: bool) -> tuple:
    own = [torch.tensor(x).requires_grad_(gradients) for x in inputs]
    with torch.inference_mode(not gradients):
        y = call(*own)
    if not gradients:
        return (y.numpy(),)
    y.square().sum().backward()
    return y.detach().numpy(), *(x.grad.numpy() for x in own if x.grad is not None)


def measure(rounds: int) -> Iterator[dict]:
    """Yields the rows."""
    ours = Ours()
    kinds = {
        "transformers": ("transformers", False),
        "the fairest loop": ("fairest", False),
        "the fairest loop, our memory setting": ("fairest", True),
        "the usual loop": ("usual", False),
    }
    for name, (kind, keep) in kinds.items():
        theirs = ledger.OtherProcess(Theirs, kind, keep_memory=keep)
        calls = [("scan", (gradients,)) for gradients in (False, True) if kind != "transformers"]
        if kind != "usual":
            short = SHORT if kind == "transformers" else POSITIONS
            calls += [("block", (POSITIONS, False)), ("block", (short, True))]
        for what, args in calls:
            call = functools.partial(getattr(ours, what), *args)
            for a, b in zip(call(), theirs.get(what, *args), strict=True):
                np.testing.assert_allclose(a, b, atol=1e-4 * float(np.abs(b).max()))
            times = ledger.alternate(call, functools.partial(theirs.call, what, *args), rounds)
            whole = "Mamba block" if what == "block" else "scan alone"
            shape = [1, args[0], WIDTH] if what == "block" else [1, POSITIONS, 2 * WIDTH, 16]
            yield ledger.row(
                f"{whole} against {name}: forward{' and backward' if args[-1] else ''}",
                *times,
                unit="s",
                dtype="float32",
                shape=shape,
            )
        theirs.close()


def main() -> None:
    """Measures, prints a table and writes `mamba.json`."""
    arguments = ledger.parser(__doc__, rounds=7).parse_args()
    keep_freed_memory()
    rows = []
    for row in measure(arguments.rounds):
        rows.append(row)
        print(ledger.table(rows)[-1], flush=True)
    ledger.write("mamba", rows)


if __name__ == "__main__":
    main()
