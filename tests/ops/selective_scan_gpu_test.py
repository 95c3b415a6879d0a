"""The scan's kernels for Hopper as far as they can be proven without one.

Their arithmetic by a simulator of the positions; all of them, with a watch for races, in jax's
interpreter, where it has one; and that they lower for CUDA. The interpreter takes a warpgroup for
one thread: what its 128 threads owe each other is read off the code, and no test sees it.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from geode_jax import sharding
from geode_jax.ops import selective_scan_gpu as gpu
from geode_jax.ops.gpu import use_kernels
from geode_jax.ops.selective_scan import choose, selective_scan
from tests.ops.selective_scan_test import NAMES, oracle


def arrays(B: int, L: int, E: int, U: int):
    """Inputs in the order of NAMES, where segments begin, cotangents of y and the last state."""
    random = np.random.default_rng(0)

    def normal(*shape):
        return random.standard_normal(shape).astype(np.float32)

    inputs = (
        normal(B, L, E),
        random.uniform(0.01, 1, (B, L, E)).astype(np.float32),
        -random.uniform(0.05, 2, (E, U)).astype(np.float32),
        normal(B, L, U),
        normal(B, L, U),
        normal(E),
        normal(B, U, E),
    )
    first = random.random((B, L)) < 0.15
    first[0, -3] = True
    return inputs, first, (normal(B, L, E), normal(B, U, E))


def check(out, gradients, inputs, first, cotangents) -> None:
    want, wanted = oracle(inputs, first, *cotangents)
    names = ("y", "last", *NAMES)
    for name, a, b in zip(names, (*out, *gradients), (*want, *wanted), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * (1 + np.abs(b).max()), err_msg=name)


def simulate(inputs, first, cotangents):
    """What the kernels do, position after position, of all channels and rows at a time."""
    u, delta, A, b, c, D, state = inputs
    dy, dlast = cotangents
    L, U = u.shape[1], A.shape[1]
    rates = [A[:, i] / gpu.LN_2 for i in range(U)]

    def scalars(t):
        values = ([x[:, t, i, None] for i in range(U)] for x in (b, c))
        return *values, np.where(first[:, t, None], -np.inf, 0)

    kept, states, y = [], [state[:, i] for i in range(U)], np.zeros_like(u)
    for t in range(L):
        kept.append(states)
        of_b, of_c, reset = scalars(t)
        states = gpu.advance(states, rates, delta[:, t], delta[:, t] * u[:, t], reset, of_b)
        y[:, t] = gpu.read(states, of_c, D * u[:, t])
    du, ddelta, db, dc = (np.zeros_like(x) for x in (u, delta, b, c))
    dA, slopes = np.zeros_like(A), [dlast[:, i] for i in range(U)]
    for t, after in reversed(list(enumerate([*kept[1:], states]))):
        of_b, of_c, reset = scalars(t)
        dc[:, t] = np.stack([np.sum(dy[:, t] * h, axis=1) for h in after], axis=1)
        slopes, du[:, t], ddelta[:, t], of_rates, summands = gpu.retreat(
            *(slopes, kept[t], rates, delta[:, t], u[:, t], dy[:, t], reset, of_b, of_c, D)
        )
        db[:, t] = np.stack([np.sum(x, axis=1) for x in summands], axis=1)
        dA += np.stack([np.sum(x, axis=0) for x in of_rates], axis=1)
    dD = np.sum(dy * u, axis=(0, 1))
    out = y, np.stack(states, axis=1)
    return out, (du, ddelta, dA, db, dc, dD, np.stack(slopes, axis=1))


@pytest.mark.parametrize("scale", [1, 1e4])
def test_the_arithmetic_of_the_positions(scale):
    """With steps that forget everything, too: exp(delta A) underflows."""
    (u, delta, A, *rest), first, cotangents = arrays(2, 21, 5, 4)
    inputs = u, delta, scale * A, *rest
    check(*simulate(inputs, first, cotangents), inputs, first, cotangents)


@jax.jit
def both(inputs, first, cotangents):
    """Values and gradients by the kernels."""

    def f(*inputs):
        *rest, state = inputs
        return selective_scan(*rest, first_BL=first, state_BUI=state, implementation="gpu")

    out, vjp = jax.vjp(f, *inputs)
    return out, vjp(cotangents)


# Three chunks, of which the last is mostly padding, of two blocks of channels; and less than one.
@pytest.mark.skipif(not hasattr(plgpu, "force_gpu_interpret_mode"), reason="jax is too old")
@pytest.mark.parametrize("shape", [(1, 2 * gpu.CHUNK + 3, 130, 4), (2, 5, 24, 16)])
def test_the_kernels_in_the_interpreter(shape):
    given = arrays(*shape)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        out, gradients = both(*given)
    check(out, gradients, *given)


@pytest.mark.parametrize("shape", [(2, 77, 200, 4), (1, 40, 128, 8), (1, 2048, 3072, 16)])
def test_the_kernels_lower_for_cuda(shape):
    (u, *rest), first, (dy, dlast) = jax.eval_shape(lambda: arrays(*shape))
    u, dy = (jax.ShapeDtypeStruct(x.shape, jnp.bfloat16) for x in (u, dy))
    traced = both.trace((u, *rest), first, (dy, dlast))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("stablehlo.custom_call @mosaic_gpu") == 2


def test_the_choice_by_platform_and_shape():
    platforms = {"tpu": "tpu", "gpu": "chunked", "cuda": "chunked", "cpu": "chunked"}
    assert {p: choose(p, 512, 16) for p in platforms} == platforms
    gpus = {"gpu": "gpu", "cuda": "gpu"}
    with use_kernels(True):
        assert {p: choose(p, 512, 16) for p in platforms} == platforms | gpus
        assert {choose(p, 1, 16) for p in platforms} == {choose("gpu", 512, 5)} == {"chunked"}


def test_what_is_chosen_is_run(monkeypatch):
    (*rest, state), first, _ = jax.eval_shape(lambda: arrays(1, 40, 128, 8))

    def kernels(platform):
        monkeypatch.setattr(sharding, "platform", lambda: platform)
        f = jax.jit(lambda *args: selective_scan(*args[:6], first_BL=args[6], state_BUI=args[7]))

        def count(wanted):
            with use_kernels(wanted):
                lowered = f.trace(*rest, first, state).lower(lowering_platforms=("cuda",))
            return lowered.as_text().count("stablehlo.custom_call @mosaic_gpu")

        # One function: what was traced under one setting is not reused under the other.
        return [count(wanted) for wanted in (False, True, False)]

    assert (kernels("gpu"), kernels("cpu")) == ([0, 1, 0], [0, 0, 0])


def test_a_number_of_states_that_no_kernel_knows():
    inputs, first, _ = arrays(1, 4, 3, 5)
    with pytest.raises(ValueError, match="no GPU kernel for 5 states"):
        selective_scan(*inputs[:6], first_BL=first, implementation="gpu")
