"""Our Mamba block against PyTorch's ways of running the same one, with the same weights.

    python -m benchmarks.mamba [--rounds 7]

Width 512 (1,024 channels of 16 states), one row of 1,024 positions, fp32; output, and output with
the gradients of input and weights. Against `transformers`' block as it runs without its CUDA
kernels, and against the fairest loop over positions that PyTorch can be given: everything that
needs no loop is done before it, and positions are unbound once. transformers' loop indexes its
arrays in each step, whose gradient writes all of them each time: its training is measured on 128
positions.
"""

import argparse
from collections.abc import Callable

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


def fair(block: Reference, x: torch.Tensor) -> torch.Tensor:
    """The same block, its loop over positions as light as PyTorch allows."""
    m, length = block.mixer, x.shape[1]
    u, gate = m.in_proj(block.norm(x)).transpose(1, 2).chunk(2, dim=1)
    u = torch.nn.functional.silu(m.conv1d(u)[..., :length]).transpose(1, 2)
    parts = m.x_proj(u)
    step, b, c = parts.split([m.time_step_rank, m.ssm_state_size, m.ssm_state_size], dim=-1)
    step = torch.nn.functional.softplus(m.dt_proj(step))
    decay = torch.exp(step[..., None] * -torch.exp(m.A_log))
    added = (step * u)[..., None] * b[:, :, None]
    state, states = torch.zeros_like(added[:, 0]), []
    for d, a in zip(decay.unbind(1), added.unbind(1), strict=True):
        state = d * state + a
        states.append(state)
    y = torch.einsum("bleu,blu->ble", torch.stack(states, 1), c) + m.D * u
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


def main() -> None:
    """Measures, prints a table and writes `mamba.json`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(ledger.threads())
    theirs, ours = both()
    calls = {"transformers": lambda x: theirs(x), "a fair loop": lambda x: fair(theirs, x)}
    rows = []
    for name, call in calls.items():
        for gradients in (False, True):
            length = SHORT if gradients and name == "transformers" else POSITIONS
            x = np.random.default_rng(0).standard_normal((1, length, WIDTH), np.float32)
            mine, other = ours_of(ours, x, gradients), of_torch(call, theirs, x, gradients)
            for a, b in zip(mine(), other(), strict=True):
                np.testing.assert_allclose(a, b, atol=1e-4 * float(b.abs().max()))
            times = ledger.alternate(mine, other, arguments.rounds)
            what = "forward and backward" if gradients else "forward"
            rows.append(
                ledger.row(
                    f"Mamba block against {name}: {what}",
                    *times,
                    unit="s",
                    dtype="float32",
                    shape=[1, length, WIDTH],
                )
            )
            print(ledger.table(rows)[-1], flush=True)
    ledger.write("mamba", rows)


if __name__ == "__main__":
    main()
