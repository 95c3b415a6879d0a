"""The selective scan as Pallas kernels for TPUs, forward and backward.

A visit is a chunk of positions of 1,024 channels of a row; the chunks of a row follow each other,
and the state stays in vector memory between them. Of each of the U states, 1,024 channels are one
vector register [8, 128], and what belongs to a position and not to a channel (B, C, whether the
state before counts) is scalars: so nothing is ever moved between lanes. Forward keeps the state
before each chunk, [chunks, U, E] floats; backward computes those within a chunk again.

dB and dC are sums over channels: a visit adds sublanes, and XLA the 128 lanes and the visits.
Everything is float32 inside. Positions, of which a chunk may have too many, and channels are padded
with zeros: a step size of 0 leaves the state.

Letters: N chunks of T positions; c channels / 128.
"""

import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from geode_jax.shapes import Array
from geode_jax.sharding import platform

POSITIONS = 64
"""T, at most; a multiple of 8."""

LANES, SUBLANES = 128, 8

VMEM_BYTES = 32 * 2**20
"""What a kernel may take; the states of a chunk are 4 MiB."""


class _Sizes:
    """Of arrays and blocks; see `forward` for the arguments."""

    def __init__(self, u_BLE: Array, A_EU: Array):
        self.B, self.L, self.E = u_BLE.shape
        self.U = A_EU.shape[1]
        self.T = min(POSITIONS, -(-self.L // SUBLANES) * SUBLANES)
        self.N = -(-self.L // self.T)
        tiles = -(-self.E // LANES)
        self.s = min(SUBLANES, tiles)
        self.blocks = -(-tiles // self.s)
        self.c = self.blocks * self.s

    def channels(self, x: Array) -> jax.Array:
        """[..., E] -> [..., c, 128], float32."""
        x = x.astype(jnp.float32)
        pad = [(0, 0)] * (x.ndim - 1) + [(0, self.c * LANES - self.E)]
        return jnp.pad(x, pad).reshape(*x.shape[:-1], self.c, LANES)

    def positions(self, x: Array) -> jax.Array:
        """[B, L, ...] -> [B, N * T, ...]."""
        return jnp.pad(x, [(0, 0), (0, self.N * self.T - self.L)] + [(0, 0)] * (x.ndim - 2))

    def back(self, x: Array) -> jax.Array:
        """[..., c, 128] -> [..., E]."""
        return x.reshape(*x.shape[:-2], -1)[..., : self.E]

    def specs(self, reverse: bool) -> dict[str, pl.BlockSpec]:
        """Where a visit (row b, block of channels e, chunk n) finds its blocks, by kind."""

        def chunk(n):
            return self.N - 1 - n if reverse else n

        U, T, s = self.U, self.T, self.s
        return {
            "channel": pl.BlockSpec((None, T, s, LANES), lambda b, e, n: (b, chunk(n), e, 0)),
            "position": pl.BlockSpec(
                (None, T, 2 * U + 1), lambda b, e, n: (b, chunk(n), 0), memory_space=pltpu.SMEM
            ),
            "decay": pl.BlockSpec((U, s, LANES), lambda b, e, n: (0, e, 0)),
            "skip": pl.BlockSpec((s, LANES), lambda b, e, n: (e, 0)),
            "state": pl.BlockSpec((None, U, s, LANES), lambda b, e, n: (b, 0, e, 0)),
            "states": pl.BlockSpec(
                (None, None, U, s, LANES), lambda b, e, n: (b, chunk(n), 0, e, 0)
            ),
            "lanes": pl.BlockSpec(
                (None, None, T, U, LANES), lambda b, e, n: (b, e, chunk(n), 0, 0)
            ),
            "of skip": pl.BlockSpec((None, s, LANES), lambda b, e, n: (b, e, 0)),
        }

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the results, by kind."""
        B, N, T, U, c = self.B, self.N, self.T, self.U, self.c
        return {
            "channel": (B, N * T, c, LANES),
            "state": (B, U, c, LANES),
            "states": (B, N, U, c, LANES),
            "lanes": (B, self.blocks, N * T, U, LANES),
            "of skip": (B, c, LANES),
        }

    def call(self, name, kernel, inputs, outputs, scratch, reverse=False):
        """Runs a kernel; `inputs` are (kind, array), `outputs` kinds."""
        specs, shapes = self.specs(reverse), self.shapes()
        return pl.pallas_call(
            kernel,
            grid=(self.B, self.blocks, self.N),
            in_specs=[specs[kind] for kind, _ in inputs],
            out_specs=[specs[kind] for kind in outputs],
            out_shape=[jax.ShapeDtypeStruct(shapes[kind], jnp.float32) for kind in outputs],
            scratch_shapes=scratch,
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary"),
                vmem_limit_bytes=VMEM_BYTES,
            ),
            cost_estimate=self._cost([x for _, x in inputs], [shapes[kind] for kind in outputs]),
            interpret=platform() != "tpu",  # in Pallas' interpreter, for tests
            name=name,
        )(*(x for _, x in inputs))

    def _cost(self, inputs: list[Array], outputs: list[tuple[int, ...]]) -> pl.CostEstimate:
        steps = self.B * self.L * self.E * self.U
        numbers = sum(x.size for x in inputs) + sum(math.prod(shape) for shape in outputs)
        # A step of a state: decay, what is added, what is read.
        return pl.CostEstimate(flops=6 * steps, transcendentals=steps, bytes_accessed=4 * numbers)


# --- Forward --------------------------------------------------------------------------------------


def forward(
    u_BLE: Array,
    delta_BLE: Array,
    A_EU: Array,
    B_BLU: Array,
    C_BLU: Array,
    D_E: Array,
    first_BL: Array,
    state_BUE: Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """y [B, L, E], the state after the last position, and the states before each chunk.

    Args:
        u_BLE, delta_BLE, A_EU, B_BLU, C_BLU, D_E, state_BUE: as of `selective_scan`.
        first_BL: 1 where a segment begins, else 0.
    """
    p = _Sizes(u_BLE, A_EU)
    y, last, before = p.call(
        "selective_scan_forward",
        _forward_kernel,
        [*_inputs(p, u_BLE, delta_BLE, A_EU, B_BLU, C_BLU, D_E, first_BL), _state(p, state_BUE)],
        ["channel", "state", "states"],
        [pltpu.VMEM((p.U, p.s, LANES), jnp.float32)],
    )
    return p.back(y[:, : p.L]).astype(u_BLE.dtype), p.back(last), before


def _inputs(p: _Sizes, u, delta, A, B, C, D, first) -> list[tuple[str, jax.Array]]:
    """What both kernels read, by kind."""
    scalars = jnp.concatenate([x.astype(jnp.float32) for x in (B, C, first[..., None])], axis=-1)
    return [
        ("channel", p.positions(p.channels(u))),
        ("channel", p.positions(p.channels(delta))),
        ("position", p.positions(scalars)),
        ("decay", p.channels(A.T)),
        ("skip", p.channels(D)),
    ]


def _state(p: _Sizes, state_BUE: Array) -> tuple[str, jax.Array]:
    return "state", p.channels(state_BUE)


def _forward_kernel(u, delta, scalars, A, D, first, y, last, before, state):
    n, U = pl.program_id(2), A.shape[0]

    @pl.when(n == 0)
    def _():
        state[...] = first[...]

    before[...] = state[...]
    rates = [A[i] for i in range(U)]

    def position(t, states):
        step, own = delta[t], u[t]
        added, out = step * own, D[...] * own
        states = [
            (1.0 - scalars[t, 2 * U]) * jnp.exp(step * rate) * h + scalars[t, i] * added
            for i, (rate, h) in enumerate(zip(rates, states, strict=True))
        ]
        for i, h in enumerate(states):
            out += scalars[t, U + i] * h
        y[t] = out
        return states

    states = jax.lax.fori_loop(0, u.shape[0], position, [state[i] for i in range(U)])
    for i, h in enumerate(states):
        state[i] = h

    @pl.when(n == pl.num_programs(2) - 1)
    def _():
        last[...] = state[...]


# --- Backward -------------------------------------------------------------------------------------


def backward(
    u_BLE: Array,
    delta_BLE: Array,
    A_EU: Array,
    B_BLU: Array,
    C_BLU: Array,
    D_E: Array,
    first_BL: Array,
    before: Array,
    dy_BLE: Array,
    dlast_BUE: Array,
) -> tuple[jax.Array, ...]:
    """The gradients of u, delta, A, B, C, D and the first state, float32.

    Args:
        before: the states before each chunk, of `forward`.
        dy_BLE, dlast_BUE: of y, and of the state after the last position.
    """
    p = _Sizes(u_BLE, A_EU)
    of_state = pltpu.VMEM((p.U, p.s, LANES), jnp.float32)
    du, ddelta, dB, dC, dA, dD, dfirst = p.call(
        "selective_scan_backward",
        _backward_kernel,
        [
            *_inputs(p, u_BLE, delta_BLE, A_EU, B_BLU, C_BLU, D_E, first_BL),
            ("states", before),
            ("channel", p.positions(p.channels(dy_BLE))),
            _state(p, dlast_BUE),
        ],
        ["channel", "channel", "lanes", "lanes", "state", "of skip", "state"],
        [of_state, pltpu.VMEM((p.T, p.U, p.s, LANES), jnp.float32)],
        reverse=True,
    )
    du, ddelta = (p.back(x[:, : p.L]) for x in (du, ddelta))
    dB, dC = (jnp.sum(x, axis=(1, 4))[:, : p.L] for x in (dB, dC))
    dA, dD = p.back(jnp.sum(dA, axis=0)).T, p.back(jnp.sum(dD, axis=0))
    return du, ddelta, dA, dB, dC, dD, p.back(dfirst)


def _backward_kernel(
    u, delta, scalars, A, D, before, dy, dlast, du, ddelta, dB, dC, dA, dD, dfirst, slope, states
):
    n, U, T = pl.program_id(2), A.shape[0], u.shape[0]
    rates = [A[i] for i in range(U)]

    @pl.when(n == 0)
    def _():
        slope[...] = dlast[...]
        dA[...] = jnp.zeros_like(dA)
        dD[...] = jnp.zeros_like(dD)

    def again(t, own):
        """Keeps the state before each position."""
        added = delta[t] * u[t]
        for i in range(U):
            states[t, i] = own[i]
        return [
            (1.0 - scalars[t, 2 * U]) * jnp.exp(delta[t] * rate) * h + scalars[t, i] * added
            for i, (rate, h) in enumerate(zip(rates, own, strict=True))
        ]

    after = jax.lax.fori_loop(0, T, again, [before[i] for i in range(U)])

    def position(back, carry):
        t = T - 1 - back
        slopes, after = carry
        step, own, g = delta[t], u[t], dy[t]
        dstep, dadded = jnp.zeros_like(step), jnp.zeros_like(step)
        next_slopes, earlier = [], []
        for i in range(U):
            h = states[t, i]
            s = slopes[i] + scalars[t, U + i] * g  # of the state after this position
            decay = (1.0 - scalars[t, 2 * U]) * jnp.exp(step * rates[i])
            of_rate = s * decay * h
            dstep += of_rate * rates[i]
            dadded += scalars[t, i] * s
            dA[i] += of_rate * step
            dB[t, pl.ds(i, 1)] = jnp.sum(s * step * own, axis=0, keepdims=True)
            dC[t, pl.ds(i, 1)] = jnp.sum(g * after[i], axis=0, keepdims=True)
            next_slopes.append(decay * s)
            earlier.append(h)
        du[t] = dadded * step + D[...] * g
        ddelta[t] = dstep + dadded * own
        dD[...] += g * own
        return next_slopes, earlier

    slopes, _ = jax.lax.fori_loop(0, T, position, ([slope[i] for i in range(U)], after))
    for i, s in enumerate(slopes):
        slope[i] = s

    @pl.when(n == pl.num_programs(2) - 1)
    def _():
        dfirst[...] = slope[...]
