"""Against a scan in float64 with its gradient written out, and against itself in parts."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geode_jax.ops import selective_scan_tpu
from geode_jax.ops.selective_scan import CHUNK, selective_scan

B, E, U = 2, 3, 4
NAMES = ("u", "delta", "A", "B", "C", "D", "state")
LONG = 2 * CHUNK + 3
"""Two chunks and a third that is mostly padding."""


def oracle(inputs, first, g_y, g_last):
    """y and the last state, and the gradients of all inputs for cotangents of both, in float64."""
    u, delta, A, b, c, D, start = (np.asarray(x, np.float64) for x in inputs)
    kept = ~first[..., None, None]
    decay = np.exp(delta[:, :, None] * A.T) * kept
    states = [start]
    for t in range(u.shape[1]):
        add = (delta[:, t] * u[:, t])[:, None] * b[:, t, :, None]
        states.append(decay[:, t] * states[-1] + add)
    before, after = np.stack(states[:-1], 1), np.stack(states[1:], 1)
    y = np.einsum("blu,blue->ble", c, after) + D * u

    g_states, g = np.zeros_like(after), np.asarray(g_last, np.float64)
    for t in reversed(range(u.shape[1])):
        g = g + np.einsum("bu,be->bue", c[:, t], g_y[:, t])
        g_states[:, t] = g
        g = g * decay[:, t]
    g_exponent = g_states * before * decay
    g_added = np.einsum("blue,blu->ble", g_states, b)
    gradients = (
        g_y * D + g_added * delta,
        np.einsum("blue,eu->ble", g_exponent, A) + g_added * u,
        np.einsum("blue,ble->eu", g_exponent, delta),
        np.einsum("blue,ble->blu", g_states, delta * u),
        np.einsum("blue,ble->blu", after, g_y),
        np.einsum("ble,ble->e", g_y, u),
        g,
    )
    return (y, states[-1]), gradients


HERE = {}


@pytest.fixture(scope="module", params=("chunked", "tpu"), autouse=True)
def implementation(request):
    """Every test is of each; the kernels with chunks as long as the other's."""
    HERE["implementation"] = request.param
    positions, selective_scan_tpu.POSITIONS = selective_scan_tpu.POSITIONS, CHUNK
    yield request.param
    selective_scan_tpu.POSITIONS = positions


def run(inputs, first, implementation):
    *rest, state = inputs
    return selective_scan(*rest, first_BL=first, state_BUI=state, implementation=implementation)


@functools.partial(jax.jit, static_argnums=3)
def differentiated(inputs, first, cotangents, implementation):
    out, vjp = jax.vjp(lambda inputs: run(inputs, first, implementation), inputs)
    return out, vjp(cotangents)[0]


compiled = jax.jit(run, static_argnums=2)


def ours(inputs, first, cotangents):
    return differentiated(inputs, first, cotangents, HERE["implementation"])


def scan(inputs, first):
    return compiled(inputs, first, HERE["implementation"])


@functools.cache
def arrays(length: int):
    """Inputs in the order of NAMES, and cotangents of y and of the last state."""
    random = np.random.default_rng(length)

    def normal(*shape):
        return random.standard_normal(shape).astype(np.float32)

    inputs = (
        normal(B, length, E),
        random.uniform(0.01, 1, (B, length, E)).astype(np.float32),
        -random.uniform(0.05, 2, (E, U)).astype(np.float32),
        normal(B, length, U),
        normal(B, length, U),
        normal(E),
        normal(B, U, E),
    )
    return inputs, (normal(B, length, E), normal(B, U, E))


def nowhere(length: int) -> np.ndarray:
    return np.zeros((B, length), bool)


def check(inputs, first, cotangents) -> None:
    """Values and gradients against the oracle."""
    out, gradients = ours(inputs, first, cotangents)
    expected, expected_gradients = oracle(inputs, first, *cotangents)
    for name, got, want in zip(
        ("y", "last", *NAMES), (*out, *gradients), (*expected, *expected_gradients), strict=True
    ):
        np.testing.assert_allclose(got, want, atol=1e-5 * (1 + np.abs(want).max()), err_msg=name)


@pytest.mark.parametrize("length", [1, CHUNK - 1, 2 * CHUNK, LONG])
@given(st.data())
@settings(max_examples=8)
def test_values_and_gradients_against_the_oracle(length, data):
    first = nowhere(length)
    for row in first:
        row[data.draw(st.lists(st.integers(0, length - 1), max_size=4))] = True
    inputs, cotangents = arrays(length)
    check(inputs, first, cotangents)


def test_segments_of_a_row_are_as_if_apart():
    bounds = (0, 5, CHUNK, CHUNK + 1, LONG)
    (u, delta, A, b, c, D, _), _ = arrays(LONG)
    first = nowhere(LONG)
    first[:, bounds[:-1]] = True
    together, last = scan(arrays(LONG)[0], first)
    zero = np.zeros((B, U, E), np.float32)
    for start, stop in itertools.pairwise(bounds):
        # At the front of its own row, and then nothing: steps of size zero.
        u_, delta_, b_, c_ = (np.roll(x, -start, axis=1) for x in (u, delta, b, c))
        delta_ = np.where(np.arange(LONG)[:, None] < stop - start, delta_, 0)
        apart, state = scan((u_, delta_, A, b_, c_, D, zero), nowhere(LONG))
        np.testing.assert_allclose(together[:, start:stop], apart[:, : stop - start], atol=1e-6)
    np.testing.assert_allclose(last, state, atol=1e-6)


def test_nothing_at_all_passes_from_a_segment_to_the_next():
    (u, *rest), _ = arrays(LONG)
    first, cut = nowhere(LONG), CHUNK + 3
    first[0, cut] = True
    before = scan((u, *rest), first)[0]
    u = np.where(np.arange(LONG)[:, None] < cut, 1e6 * u, u)
    after = scan((u, *rest), first)[0]
    np.testing.assert_array_equal(before[0, cut:], after[0, cut:])
    assert (before[1, cut:] != after[1, cut:]).any()


def test_the_last_state_goes_on_where_the_first_run_stopped():
    (u, delta, A, b, c, D, state), _ = arrays(LONG)
    whole, last = scan(arrays(LONG)[0], nowhere(LONG))
    half = CHUNK + 1
    for at in (slice(half), slice(half, 2 * half), slice(2 * half, LONG)):
        part = (u[:, at], delta[:, at], A, b[:, at], c[:, at], D, state)
        y, state = scan(part, nowhere(part[0].shape[1]))
        np.testing.assert_allclose(y, whole[:, at], atol=1e-6)
    np.testing.assert_allclose(state, last, atol=1e-6)


def test_without_a_state_and_segments_it_starts_once_at_zero():
    inputs, _ = arrays(CHUNK + 1)
    got = scan((*inputs[:-1], None), None)
    zero = np.zeros((B, U, E), np.float32)
    for x, want in zip(got, scan((*inputs[:-1], zero), nowhere(CHUNK + 1)), strict=True):
        np.testing.assert_allclose(x, want, atol=1e-6)


def test_a_position_at_a_time_equals_the_whole():
    (u, delta, A, b, c, D, state), _ = arrays(CHUNK + 1)
    whole, last = scan(arrays(CHUNK + 1)[0], nowhere(CHUNK + 1))
    for t in range(CHUNK + 1):
        u_t, delta_t, b_t, c_t = (x[:, t : t + 1] for x in (u, delta, b, c))
        y, state = scan((u_t, delta_t, A, b_t, c_t, D, state), None)
        np.testing.assert_allclose(y[:, 0], whole[:, t], atol=1e-6)
    np.testing.assert_allclose(state, last, atol=1e-6)


def test_steps_that_forget_everything_stay_finite():
    """exp(delta A) underflows to 0, as its gradient does."""
    (u, delta, A, *rest), cotangents = arrays(LONG)
    check((u, delta, 1e4 * A, *rest), nowhere(LONG), cotangents)


def test_bfloat16_is_rounded_at_the_end_and_not_in_the_state():
    length = 512
    random = np.random.default_rng(0)
    u, b, c = (jnp.asarray(random.uniform(0.5, 1, (B, length, n)), jnp.bfloat16) for n in (E, U, U))
    delta = jnp.asarray(random.uniform(0.002, 0.006, (B, length, E)), jnp.bfloat16)
    A, D = np.full((E, U), -0.01, np.float32), np.zeros(E, np.float32)
    inputs = (u, delta, A, b, c, D, np.zeros((B, U, E), np.float32))
    y, last = scan(inputs, nowhere(length))
    assert (y.dtype, last.dtype) == (jnp.bfloat16, jnp.float32)
    exact = oracle(inputs, nowhere(length), np.zeros(y.shape), np.zeros(last.shape))[0]
    # A state in bfloat16 would stop growing at 256 times what is added.
    np.testing.assert_allclose(last, exact[1], rtol=1e-5)
    np.testing.assert_allclose(y.astype(np.float32), exact[0], rtol=2**-8)
