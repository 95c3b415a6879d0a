"""The selective scan as Pallas kernels for TPUs, forward and backward.

A grid step computes one chunk of positions for 1,024 channels of one row. The chunks of a row
follow each other, and the state stays in vector memory between them. A state of 1,024 channels is
one vector register [8, 128], and what all channels share (B, C, the reset at a segment's first
position) is scalar, so nothing moves between lanes. The forward pass keeps the state before each
chunk; the backward pass recomputes the states within a chunk.

dB and dC are sums over channels: a grid step sums over sublanes, and XLA over the 128 lanes and the
grid steps. All arithmetic is float32. Positions and channels are padded with zeros: a step size of
0 leaves the state unchanged.

Sizes beside those of `shapes`: n chunks of a row; i blocks of 128 channels.
"""

import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Float, Float32

from geode_jax.shapes import Array
from geode_jax.sharding import platform

POSITIONS = 64
"""Most positions of a chunk; a multiple of 8."""

LANES, SUBLANES = 128, 8

VMEM_BYTES = 32 * 2**20
"""Vector memory that a kernel may use; the states of a chunk take 4 MiB."""


class _Sizes:
    """Sizes of the arrays and blocks; the arguments are those of `forward`."""

    def __init__(self, u_BLI: Array, A_IU: Array):
        self.B, self.L, self.I = u_BLI.shape
        self.U = A_IU.shape[1]
        self.chunk = min(POSITIONS, -(-self.L // SUBLANES) * SUBLANES)
        self.chunks = -(-self.L // self.chunk)
        tiles = -(-self.I // LANES)
        self.sublanes = min(SUBLANES, tiles)
        self.blocks = -(-tiles // self.sublanes)
        self.tiles = self.blocks * self.sublanes

    def channels(self, x: Array) -> jax.Array:
        """Returns [..., I] as float32 [..., i, 128], padded."""
        x = x.astype(jnp.float32)
        pad = [(0, 0)] * (x.ndim - 1) + [(0, self.tiles * LANES - self.I)]
        return jnp.pad(x, pad).reshape(*x.shape[:-1], self.tiles, LANES)

    def positions(self, x: Array) -> jax.Array:
        """Pads [B, L, ...] to whole chunks."""
        return jnp.pad(
            x, [(0, 0), (0, self.chunks * self.chunk - self.L)] + [(0, 0)] * (x.ndim - 2)
        )

    def back(self, x: jax.Array) -> jax.Array:
        """Returns [..., i, 128] as [..., I]."""
        return x.reshape(*x.shape[:-2], -1)[..., : self.I]

    def specs(self, reverse: bool) -> dict[str, pl.BlockSpec]:
        """Returns the blocks of a grid step (row b, channel block i, chunk n), by kind of array."""

        def chunk(n):
            return self.chunks - 1 - n if reverse else n

        U, T, s = self.U, self.chunk, self.sublanes
        return {
            "channel": pl.BlockSpec((None, T, s, LANES), lambda b, i, n: (b, chunk(n), i, 0)),
            "position": pl.BlockSpec(
                (None, T, 2 * U + 1), lambda b, i, n: (b, chunk(n), 0), memory_space=pltpu.SMEM
            ),
            "decay": pl.BlockSpec((U, s, LANES), lambda b, i, n: (0, i, 0)),
            "skip": pl.BlockSpec((s, LANES), lambda b, i, n: (i, 0)),
            "state": pl.BlockSpec((None, U, s, LANES), lambda b, i, n: (b, 0, i, 0)),
            "states": pl.BlockSpec(
                (None, None, U, s, LANES), lambda b, i, n: (b, chunk(n), 0, i, 0)
            ),
            "lanes": pl.BlockSpec(
                (None, None, T, U, LANES), lambda b, i, n: (b, i, chunk(n), 0, 0)
            ),
            "of skip": pl.BlockSpec((None, s, LANES), lambda b, i, n: (b, i, 0)),
        }

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of results, by kind of array."""
        B, U, positions, tiles = self.B, self.U, self.chunks * self.chunk, self.tiles
        return {
            "channel": (B, positions, tiles, LANES),
            "state": (B, U, tiles, LANES),
            "states": (B, self.chunks, U, tiles, LANES),
            "lanes": (B, self.blocks, positions, U, LANES),
            "of skip": (B, tiles, LANES),
        }

    def call(self, name, kernel, inputs, outputs, scratch, reverse=False):
        """Runs a kernel; `inputs` are pairs (kind, array), `outputs` are kinds."""
        specs, shapes = self.specs(reverse), self.shapes()
        return pl.pallas_call(
            kernel,
            grid=(self.B, self.blocks, self.chunks),
            in_specs=[specs[kind] for kind, _ in inputs],
            out_specs=[specs[kind] for kind in outputs],
            out_shape=[jax.ShapeDtypeStruct(shapes[kind], jnp.float32) for kind in outputs],
            scratch_shapes=scratch,
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary"),
                vmem_limit_bytes=VMEM_BYTES,
            ),
            cost_estimate=self._cost([x for _, x in inputs], [shapes[kind] for kind in outputs]),
            interpret=platform() != "tpu",  # Pallas' interpreter, for tests
            name=name,
        )(*(x for _, x in inputs))

    def _cost(self, inputs: list[Array], outputs: list[tuple[int, ...]]) -> pl.CostEstimate:
        steps = self.B * self.L * self.I * self.U
        numbers = sum(x.size for x in inputs) + sum(math.prod(shape) for shape in outputs)
        # Of each state and position: its decay, what is added to it, and its part of y.
        return pl.CostEstimate(flops=6 * steps, transcendentals=steps, bytes_accessed=4 * numbers)


# --- Forward --------------------------------------------------------------------------------------


def forward(
    u_BLI: Float[Array, "B L I"],
    delta_BLI: Float[Array, "B L I"],
    A_IU: Float[Array, "I U"],
    B_BLU: Float[Array, "B L U"],
    C_BLU: Float[Array, "B L U"],
    D_I: Float[Array, " I"],
    first_BL: Float[Array, "B L"],
    state_BUI: Float[Array, "B U I"],
) -> tuple[
    Float[jax.Array, "B L I"], Float32[jax.Array, "B U I"], Float32[jax.Array, "B n U i 128"]
]:
    """Returns y [B, L, I], the last state [B, U, I], and the states before each chunk.

    The states before each chunk are [B, n, U, i, 128].

    Args:
        u_BLI, delta_BLI, A_IU, B_BLU, C_BLU, D_I, state_BUI: as in `selective_scan`.
        first_BL: 1 where a segment begins, else 0.
    """
    p = _Sizes(u_BLI, A_IU)
    y, last, before = p.call(
        "selective_scan_forward",
        _forward_kernel,
        [*_inputs(p, u_BLI, delta_BLI, A_IU, B_BLU, C_BLU, D_I, first_BL), _state(p, state_BUI)],
        ["channel", "state", "states"],
        [pltpu.VMEM((p.U, p.sublanes, LANES), jnp.float32)],
    )
    return p.back(y[:, : p.L]).astype(u_BLI.dtype), p.back(last), before


def _inputs(p: _Sizes, u, delta, A, B, C, D, first) -> list[tuple[str, jax.Array]]:
    """Returns the inputs of both kernels as pairs (kind, array)."""
    scalars = jnp.concatenate([x.astype(jnp.float32) for x in (B, C, first[..., None])], axis=-1)
    return [
        ("channel", p.positions(p.channels(u))),
        ("channel", p.positions(p.channels(delta))),
        ("position", p.positions(scalars)),
        ("decay", p.channels(A.T)),
        ("skip", p.channels(D)),
    ]


def _state(p: _Sizes, state_BUI: Array) -> tuple[str, jax.Array]:
    return "state", p.channels(state_BUI)


def _advance(states, rates, scalars, t, step, added) -> list:
    """Returns the states after position t, see the equation of `selective_scan`."""
    keep = 1.0 - scalars[t, 2 * len(rates)]
    return [
        keep * jnp.exp(step * rate) * h + scalars[t, i] * added
        for i, (rate, h) in enumerate(zip(rates, states, strict=True))
    ]


def _forward_kernel(u, delta, scalars, A, D, first, y, last, before, state):
    n, U = pl.program_id(2), A.shape[0]

    @pl.when(n == 0)
    def _():
        state[...] = first[...]

    before[...] = state[...]
    rates = [A[i] for i in range(U)]

    def position(t, states):
        step, own = delta[t], u[t]
        out = D[...] * own
        states = _advance(states, rates, scalars, t, step, step * own)
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
    u_BLI: Float[Array, "B L I"],
    delta_BLI: Float[Array, "B L I"],
    A_IU: Float[Array, "I U"],
    B_BLU: Float[Array, "B L U"],
    C_BLU: Float[Array, "B L U"],
    D_I: Float[Array, " I"],
    first_BL: Float[Array, "B L"],
    before: Float[Array, "B n U i 128"],
    dy_BLI: Float[Array, "B L I"],
    dlast_BUI: Float[Array, "B U I"],
) -> tuple[
    Float32[jax.Array, "B L I"],
    Float32[jax.Array, "B L I"],
    Float32[jax.Array, "I U"],
    Float32[jax.Array, "B L U"],
    Float32[jax.Array, "B L U"],
    Float32[jax.Array, " I"],
    Float32[jax.Array, "B U I"],
]:
    """Returns the gradients of u, delta, A, B, C, D and the first state, float32.

    Args:
        u_BLI, delta_BLI, A_IU, B_BLU, C_BLU, D_I, first_BL: as in `forward`.
        before: the states before each chunk, from `forward`.
        dy_BLI, dlast_BUI: cotangents of y and of the last state.
    """
    p = _Sizes(u_BLI, A_IU)
    of_state = pltpu.VMEM((p.U, p.sublanes, LANES), jnp.float32)
    du, ddelta, dB, dC, dA, dD, dfirst = p.call(
        "selective_scan_backward",
        _backward_kernel,
        [
            *_inputs(p, u_BLI, delta_BLI, A_IU, B_BLU, C_BLU, D_I, first_BL),
            ("states", before),
            ("channel", p.positions(p.channels(dy_BLI))),
            _state(p, dlast_BUI),
        ],
        ["channel", "channel", "lanes", "lanes", "state", "of skip", "state"],
        [of_state, pltpu.VMEM((p.chunk, p.U, p.sublanes, LANES), jnp.float32)],
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
        for i in range(U):
            states[t, i] = own[i]
        return _advance(own, rates, scalars, t, delta[t], delta[t] * u[t])

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
