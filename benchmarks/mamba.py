"""Our Mamba block and its scan against PyTorch's ways of running the same, with the same weights.

    python -m benchmarks.mamba [--rounds 7]

Width 512 (1,024 channels of 16 states), one row of 1,024 positions, fp32; output, and output with
the gradients of input and weights. Against `transformers`' block as it runs without its CUDA
kernels, and against loops over positions as fair as PyTorch allows: positions are unbound once
(transformers' loop indexes its arrays in each step, whose gradient writes all of them each time:
its training is measured on 128 positions). The usual loop reads the output of each position in its
turn; the fairest does everything before or after the loop that can be done there.
"""

import argparse
import functools
import itertools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from transformers import MambaConfig as ReferenceConfig
from transformers.models.mamba.modeling_mamba import MambaBlock as Reference

from benchmarks import ledger
from geode_jax.build import keep_freed_memory
from geode_jax.models.mamba import MambaBlock, MambaConfig
from geode_jax.ops.selective_scan import selective_scan

WIDTH, POSITIONS, SHORT = 512, 1024, 128


def both() -> tuple[Reference, MambaBlock]:
    """transformers' block with random weights, and ours with the same."""
    torch.manual_seed(0)
    theirs = Reference(
        ReferenceConfig(hidden_size=WIDTH, num_hidden_layers=1, use_mambapy=False), layer_idx=0
    )
    ours = MambaBlock(MambaConfig(width=WIDTH, layers=1), rngs=nnx.Rngs(0))
    weights = {name: jnp.asarray(w.detach().numpy()) for name, w in theirs.named_parameters()}
    mixer = ours.mixer
    ours.norm.scale[...] = weights["norm.weight"]
    mixer.in_proj.kernel[...] = weights["mixer.in_proj.weight"].T.reshape(WIDTH, 2, -1)
    mixer.conv.kernel[...] = weights["mixer.conv1d.weight"][:, 0].T
    mixer.conv.bias[...] = weights["mixer.conv1d.bias"]
    for name in ("x_proj", "dt_proj", "out_proj"):
        getattr(mixer, name).kernel[...] = weights[f"mixer.{name}.weight"].T
    mixer.dt_proj.bias[...] = weights["mixer.dt_proj.bias"]
    mixer.A_log[...], mixer.D[...] = weights["mixer.A_log"], weights["mixer.D"]
    return theirs, ours


def by_loop(u, step, A, b, c, D, *, read_in_turn: bool = False) -> torch.Tensor:
    """The scan as a loop over positions; arguments as of `selective_scan`."""
    decay = torch.exp(step[..., None] * A)
    added = (step * u)[..., None] * b[:, :, None]
    state, out = torch.zeros_like(added[:, 0]), []
    for d, a, r in zip(decay.unbind(1), added.unbind(1), c.unbind(1), strict=True):
        state = d * state + a
        out.append(torch.einsum("beu,bu->be", state, r) if read_in_turn else state)
    y = torch.stack(out, 1)
    return (y if read_in_turn else torch.einsum("bleu,blu->ble", y, c)) + D * u


def fair(block: Reference, x: torch.Tensor) -> torch.Tensor:
    """The same block around the fairest loop."""
    m, length = block.mixer, x.shape[1]
    u, gate = m.in_proj(block.norm(x)).transpose(1, 2).chunk(2, dim=1)
    u = torch.nn.functional.silu(m.conv1d(u)[..., :length]).transpose(1, 2)
    parts = m.x_proj(u)
    step, b, c = parts.split([m.time_step_rank, m.ssm_state_size, m.ssm_state_size], dim=-1)
    step = torch.nn.functional.softplus(m.dt_proj(step))
    y = by_loop(u, step, -torch.exp(m.A_log), b, c, m.D)
    return x + m.out_proj(y * torch.nn.functional.silu(gate.transpose(1, 2)))


def of_torch(call: Callable, block: Reference, x: np.ndarray, gradients: bool) -> Callable:
    """Output, and where wanted the input's gradient, with the weights' beside it."""
    x = torch.tensor(x)

    def run():
        if not gradients:
            with torch.inference_mode():
                return (call(x),)
        block.zero_grad()
        own = x.clone().requires_grad_()
        out = call(own)
        out.square().sum().backward()
        return out.detach(), own.grad

    return run


def ours_of(block: MambaBlock, x: np.ndarray, gradients: bool) -> Callable:
    """The same of ours, compiled."""
    graph, state = nnx.split(block)

    def out(state, x):
        return nnx.merge(graph, state)(x)[0]

    def loss(state, x):
        y = out(state, x)
        return jnp.sum(jnp.square(y)), y

    forward, backward = jax.jit(out), jax.jit(jax.grad(loss, (0, 1), has_aux=True))

    def run():
        if not gradients:
            return (forward(state, x).block_until_ready(),)
        (_, dx), y = jax.block_until_ready(backward(state, x))
        return y, dx

    return run


def blocks(rounds: int) -> Iterator[dict]:
    """Rows of the whole block."""
    theirs, ours = both()
    calls = {"transformers": lambda x: theirs(x), "the fairest loop": lambda x: fair(theirs, x)}
    for name, call in calls.items():
        for gradients in (False, True):
            length = SHORT if gradients and name == "transformers" else POSITIONS
            x = np.random.default_rng(0).standard_normal((1, length, WIDTH), np.float32)
            pair = ours_of(ours, x, gradients), of_torch(call, theirs, x, gradients)
            yield compared(f"Mamba block against {name}", *pair, x.shape, gradients, rounds)


def scans(rounds: int) -> Iterator[dict]:
    """Rows of the scan alone."""
    random, E, U = np.random.default_rng(0), 2 * WIDTH, 16
    shapes = (
        (1, POSITIONS, E),
        (1, POSITIONS, E),
        (E, U),
        (1, POSITIONS, U),
        (1, POSITIONS, U),
        (E,),
    )
    inputs = [random.standard_normal(shape, np.float32) for shape in shapes]
    inputs[1], inputs[2] = np.log1p(np.exp(inputs[1] - 3)), -np.exp(inputs[2] / 2)

    def loss(*inputs):
        y = selective_scan(*inputs)[0]
        return jnp.sum(jnp.square(y)), y

    forward = jax.jit(lambda *inputs: selective_scan(*inputs)[0])
    backward = jax.jit(jax.grad(loss, tuple(range(6)), has_aux=True))

    def ours(gradients):
        if not gradients:
            return (forward(*inputs).block_until_ready(),)
        slopes, y = jax.block_until_ready(backward(*inputs))
        return y, *slopes

    def theirs(gradients, in_turn):
        own = [torch.tensor(x).requires_grad_(gradients) for x in inputs]
        with torch.inference_mode(not gradients):
            y = by_loop(*own, read_in_turn=in_turn)
        if not gradients:
            return (y,)
        y.square().sum().backward()
        return y.detach(), *(x.grad for x in own)

    for name, in_turn in (("the fairest loop", False), ("the usual loop", True)):
        for gradients in (False, True):
            pair = (
                functools.partial(ours, gradients),
                functools.partial(theirs, gradients, in_turn),
            )
            yield compared(f"scan alone against {name}", *pair, shapes[0] + (U,), gradients, rounds)


def compared(name: str, ours, theirs, shape, gradients: bool, rounds: int) -> dict:
    """A row, after both gave the same."""
    for a, b in zip(ours(), theirs(), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * float(b.abs().max()))
    name = f"{name}: forward{' and backward' if gradients else ''}"
    facts = {"unit": "s", "dtype": "float32", "shape": list(shape)}
    return ledger.row(name, *ledger.alternate(ours, theirs, rounds), **facts)


def main() -> None:
    """Measures, prints a table and writes `mamba.json`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(ledger.threads())
    rows = []
    for row in itertools.chain(blocks(arguments.rounds), scans(arguments.rounds)):
        rows.append(row)
        print(ledger.table(rows)[-1], flush=True)
    ledger.write("mamba", rows)


if __name__ == "__main__":
    main()
