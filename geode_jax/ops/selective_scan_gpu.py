"""The selective scan as Mosaic GPU kernels for Hopper, forward and backward.

A program is one warpgroup. It computes 128 channels of one row of the batch, one channel a thread,
chunk by chunk. A state of these channels is one register of each thread; what all channels share
(B, C, the reset at a segment's first position) is scalar. So threads exchange data only for dB and
dC. A ring of buffers in shared memory holds the chunks, and the next chunk is copied while the
current one is computed. Results go from registers to global memory in runs of 512 bytes. The
forward pass keeps the state before each chunk. The backward pass visits the chunks in reverse and
recomputes the states within a chunk into shared memory.

dB and dC are sums over channels. The summands of a few positions are transposed through shared
memory, so that each thread sums over channels; XLA then sums over the blocks of channels. All
arithmetic is float32. Positions and channels are padded with zeros: a step size of 0 leaves the
state unchanged.

`advance` and `retreat` hold the arithmetic of one position, which the kernels and the tests'
simulator share; newer JAX interprets whole kernels, copies included. The kernels have never run on
a GPU, so they are off by default (`gpu.use_kernels`). A GPU needs 132 programs to be fully used; a
single row of 3,072 channels has 24.

Sizes beside those of `shapes`: n chunks of a row; i channels with their padding.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Float, Float32

from geode_jax.ops.attention_gpu import WHOLE
from geode_jax.shapes import Array

CHUNK = 16
"""Positions of a chunk. Their states, for 128 channels and U = 16, fill 128 of the 227 KiB of
shared memory."""

CHANNELS = 128
"""Channels of a program: one for each thread of a warpgroup."""

ROWS = 64
"""Rows (positions x states) that are summed over channels at a time: the layout of sums has 64."""

PITCH = CHANNELS + 8
"""Distance of these rows in shared memory, in floats: the 4 rows that half a warp reads at a time
lie in different banks."""

STATES = (4, 8, 16)
"""Supported U: `ROWS` / U positions must divide `CHUNK`."""

STAGES = 2
"""Chunks in shared memory at a time."""

UNROLL = 2
"""Positions of an iteration: the second position's loads overlap the first one's arithmetic."""

LN_2 = math.log(2)


# --- The arithmetic of a position -----------------------------------------------------------------


def advance(before: Sequence, rates: Sequence, step, added, reset, b: Sequence) -> list:
    """Returns the states after a position.

    Args:
        before: U arrays [channels], the states before the position.
        rates: U arrays [channels], the columns of A / ln 2.
        step, added: [channels], the step size, and the input times the step size.
        reset: scalar, -inf at the first position of a segment, else 0.
        b: U scalars.
    """
    return [
        jnp.exp2(step * rate + reset) * h + of * added
        for h, rate, of in zip(before, rates, b, strict=True)
    ]


def read(states: Sequence, c: Sequence, skipped):
    """Returns y of a position, [channels]: the skipped input plus what the states contribute."""
    for h, of in zip(states, c, strict=True):
        skipped += of * h
    return skipped


def retreat(after: Sequence, before: Sequence, rates: Sequence, step, u, dy, reset, b, c, D):
    """Returns the gradients of a position from those of the positions after it.

    Args:
        after: U arrays [channels], the gradients of the states after the position, without the
            part that comes through this position's y.
        before: the states before the position.
        rates, step, reset, b: as in `advance`.
        u, dy, D: [channels].
        c: U scalars.

    Returns:
        Gradients of the states before the position, of u and of the step size; for each state what
        the position adds to the gradient of A's column, and the summands [channels] of b's.
    """
    of_before, of_rates, of_b = [], [], []
    of_added, of_exponent = jnp.zeros_like(u), jnp.zeros_like(u)
    added = step * u
    for s, h, rate, b_i, c_i in zip(after, before, rates, b, c, strict=True):
        s = s + c_i * dy
        earlier = jnp.exp2(step * rate + reset) * s
        slope = earlier * h
        of_exponent += slope * rate
        of_added += b_i * s
        of_before.append(earlier)
        of_rates.append(slope * step)
        of_b.append(s * added)
    of_step = of_exponent * LN_2 + of_added * u
    return of_before, of_added * step + D * dy, of_step, of_rates, of_b


# --- Arrays and kernels ---------------------------------------------------------------------------


def supports(states: int) -> bool:
    """Returns whether the kernels support this number of states."""
    return states in STATES


class _Sizes:
    """Sizes of the arrays and blocks; the arguments are those of `forward`."""

    def __init__(self, u_BLI: Array, A_IU: Array):
        self.B, self.L, self.I = u_BLI.shape
        self.U = A_IU.shape[1]
        self.chunks = -(-self.L // CHUNK)
        self.blocks = -(-self.I // CHANNELS)
        self.padded = self.blocks * CHANNELS
        self.scalars = -(-(2 * self.U + 1) // 4) * 4  # a copy moves multiples of 16 bytes

    def channels(self, x: Array) -> jax.Array:
        """Returns [..., I] as float32 [..., i], padded."""
        x = x.astype(jnp.float32)
        return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, self.padded - self.I)])

    def positions(self, x: Array) -> jax.Array:
        """Returns [B, L, width] as [B * n * CHUNK, width], padded."""
        x = jnp.pad(x, [(0, 0), (0, self.chunks * CHUNK - self.L), (0, 0)])
        return x.reshape(-1, x.shape[-1])

    def back(self, x: jax.Array) -> jax.Array:
        """Returns [B * n * CHUNK, i] as [B, L, I]."""
        return x.reshape(self.B, self.chunks * CHUNK, -1)[:, : self.L, : self.I]

    def summed(self, x: Array) -> jax.Array:
        """Sums [B, blocks, n * CHUNK * U / 64, 64] over blocks to [B, L, U]."""
        x = x.reshape(self.B, self.blocks, self.chunks * CHUNK, self.U)
        return jnp.sum(x, axis=1)[:, : self.L]

    def inputs(self, u, delta, A, B, C, D, first) -> list[jax.Array]:
        """Returns the inputs of both kernels."""
        reset = jnp.where(first > 0, -jnp.inf, 0.0)[..., None]
        scalars = jnp.concatenate([x.astype(jnp.float32) for x in (B, C, reset)], axis=-1)
        pad = [(0, 0), (0, 0), (0, self.scalars - scalars.shape[-1])]
        return [
            self.positions(self.channels(u)),
            self.positions(self.channels(delta)),
            self.positions(jnp.pad(scalars, pad)),
            self.channels(A.T) / LN_2,
            self.channels(D),
        ]

    def kernel(self, body, name: str, shapes: list[tuple[int, ...]], scratch: Sequence = ()):
        """Builds a kernel of one warpgroup on a grid (blocks of channels, B)."""
        return plgpu.kernel(
            body,
            out_type=[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes],
            scratch_types=scratch,
            grid=(self.blocks, self.B),
            grid_names=("block", "batch"),
            kernel_name=name,
            compiler_params=plgpu.CompilerParams(
                approx_math=True,
                # A thread reads only what it wrote to shared memory, or calls `commit_smem`.
                unsafe_no_auto_barriers=True,
                lowering_semantics=plgpu.LoweringSemantics.Lane,
            ),
        )


def _place() -> tuple[jax.Array, jax.Array, Any]:
    """Returns this program's row of the batch, its block of channels, and the block's slice."""
    batch, block = (jax.lax.axis_index(name) for name in ("batch", "block"))
    return batch, block, pl.ds(block * CHANNELS, CHANNELS)


_THREADS = plgpu.Layout.WG_STRIDED((CHANNELS,), vec_size=1)


def _load(ref, *index) -> jax.Array:
    """Loads [channels], one channel a thread."""
    return plgpu.load(ref.at[index], *WHOLE, layout=_THREADS)


def _zero() -> jax.Array:
    return plgpu.layout_cast(jnp.zeros(CHANNELS, jnp.float32), _THREADS)


def _scalars(ref, t, U: int) -> tuple[list, list, jax.Array]:
    """Returns b, c and reset of position t of a chunk."""
    values = [ref[t, i] for i in range(2 * U + 1)]
    return values[:U], values[U : 2 * U], values[2 * U]


def _over_chunks(p: _Sizes, body, order, carry, scalars, *arrays):
    """Calls body(n, chunk n [CHUNK, 128] of each array, that of scalars, carry) for each chunk n.

    Args:
        p: sizes.
        body: the work on a chunk; returns the next carry.
        order: step -> n.
        carry: value before the first step.
        scalars, arrays: [B * n * CHUNK, ...] in global memory.

    Returns:
        The carry after the last step.
    """
    batch, block, _ = _place()

    def step(indices, scalars, *rest):
        carry = body(order(indices[0]), *rest[:-1], scalars, rest[-1])
        plgpu.commit_smem()  # all threads have read what the next copy overwrites
        return carry

    def spec(width, column):
        return plgpu.BlockSpec((CHUNK, width), lambda i: (batch * p.chunks + order(i), column))

    return plgpu.emit_pipeline(
        step,
        grid=(p.chunks,),
        in_specs=[spec(p.scalars, 0), *(spec(CHANNELS, block) for _ in arrays)],
        max_concurrent_steps=STAGES,
        init_carry=carry,
    )(scalars, *arrays)


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
) -> tuple[Float[jax.Array, "B L I"], Float32[jax.Array, "B U I"], Float32[jax.Array, "B n U i"]]:
    """Returns y [B, L, I], the last state [B, U, I], and the states before each chunk [B, n, U, i].

    Args:
        u_BLI, delta_BLI, A_IU, B_BLU, C_BLU, D_I, state_BUI: as in `selective_scan`; U in `STATES`.
        first_BL: 1 where a segment begins, else 0.
    """
    p = _Sizes(u_BLI, A_IU)
    chunks, U = p.chunks, p.U

    def kernel(u, delta, scalars, A, D, first, y, last, before):
        batch, _, mine = _place()
        rates, skip = [_load(A, i, mine) for i in range(U)], _load(D, mine)

        def chunk(n, u, delta, scalars, states):
            for i, h in enumerate(states):
                before[batch, n, i, mine] = h

            def position(t, states):
                b, c, reset = _scalars(scalars, t, U)
                step, own = _load(delta, t), _load(u, t)
                states = advance(states, rates, step, step * own, reset, b)
                y[(batch * chunks + n) * CHUNK + t, mine] = read(states, c, skip * own)
                return states

            return jax.lax.fori_loop(0, CHUNK, position, states, unroll=UNROLL)

        states = [_load(first, batch, i, mine) for i in range(U)]
        states = _over_chunks(p, chunk, lambda n: n, states, scalars, u, delta)
        for i, h in enumerate(states):
            last[batch, i, mine] = h

    state = (p.B, U, p.padded)
    shapes = [(p.B * chunks * CHUNK, p.padded), state, (p.B, chunks, U, p.padded)]
    inputs = p.inputs(u_BLI, delta_BLI, A_IU, B_BLU, C_BLU, D_I, first_BL)
    y, last, before = p.kernel(kernel, "selective_scan_forward", shapes)(
        *inputs, p.channels(state_BUI)
    )
    return p.back(y).astype(u_BLI.dtype), last[..., : p.I], before


# --- Backward -------------------------------------------------------------------------------------


def backward(
    u_BLI: Float[Array, "B L I"],
    delta_BLI: Float[Array, "B L I"],
    A_IU: Float[Array, "I U"],
    B_BLU: Float[Array, "B L U"],
    C_BLU: Float[Array, "B L U"],
    D_I: Float[Array, " I"],
    first_BL: Float[Array, "B L"],
    before: Float[Array, "B n U i"],
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
    chunks, U = p.chunks, p.U
    group = ROWS // U  # positions that are summed over channels at a time

    def kernel(
        u, delta, scalars, A, D, before, dy, dlast, du, ddelta, dB, dC, dA, dD, dfirst, kept, rows
    ):
        batch, block, mine = _place()
        rates, skip = [_load(A, i, mine) for i in range(U)], _load(D, mine)

        def groups(n, position, sums, carry, reverse: bool):
            """Calls position(t, put, carry) for each t; sums what `put(i, x)` gets over channels.

            Args:
                n: the chunk.
                position: the work on a position; returns the next carry.
                sums: the sums of dB or dC, in global memory.
                carry: value before the first call.
                reverse: visit the last position first.

            Returns:
                The carry after the last call.
            """

            def whole(k, carry):
                g = CHUNK // group - 1 - k if reverse else k

                def one(k, carry):
                    at = group - 1 - k if reverse else k

                    def put(i, x):
                        rows[at * U + i, pl.ds(0, CHANNELS)] = x

                    return position(g * group + at, put, carry)

                carry = jax.lax.fori_loop(0, group, one, carry, unroll=UNROLL)
                plgpu.commit_smem()  # all threads have written their channels
                x = rows.at[:, pl.ds(0, CHANNELS)]
                x = plgpu.load(x, *WHOLE, layout=plgpu.Layout.WGMMA, optimized=False)
                sums[batch, block, n * (CHUNK // group) + g] = jnp.sum(x, axis=1)
                plgpu.commit_smem()  # and have read what the next group overwrites
                return carry

            return jax.lax.fori_loop(0, CHUNK // group, whole, carry)

        def chunk(n, u, delta, dy, scalars, carry):
            def again(t, put, states):
                b, _, reset = _scalars(scalars, t, U)
                step, g = _load(delta, t), _load(dy, t)
                for i, h in enumerate(states):
                    kept[t, i] = h
                states = advance(states, rates, step, step * _load(u, t), reset, b)
                for i, h in enumerate(states):
                    put(i, g * h)
                return states

            def position(t, put, carry):
                slopes, of_A, of_D = carry
                b, c, reset = _scalars(scalars, t, U)
                step, own, g = _load(delta, t), _load(u, t), _load(dy, t)
                states = [_load(kept, t, i) for i in range(U)]
                slopes, of_u, of_step, of_rates, of_b = retreat(
                    slopes, states, rates, step, own, g, reset, b, c, skip
                )
                for i, x in enumerate(of_b):
                    put(i, x)
                at = (batch * chunks + n) * CHUNK + t
                du[at, mine], ddelta[at, mine] = of_u, of_step
                of_A = [a + x for a, x in zip(of_A, of_rates, strict=True)]
                return slopes, of_A, of_D + g * own

            states = [_load(before, batch, n, i, mine) for i in range(U)]
            groups(n, again, dC, states, reverse=False)
            return groups(n, position, dB, carry, reverse=True)

        slopes = [_load(dlast, batch, i, mine) for i in range(U)]
        carry = slopes, [_zero() for _ in range(U)], _zero()
        slopes, of_A, of_D = _over_chunks(
            p, chunk, lambda i: chunks - 1 - i, carry, scalars, u, delta, dy
        )
        for i in range(U):
            dfirst[batch, i, mine], dA[batch, i, mine] = slopes[i], of_A[i]
        dD[batch, mine] = of_D

    of_channel, state = (p.B * chunks * CHUNK, p.padded), (p.B, U, p.padded)
    of_sums = (p.B, p.blocks, chunks * CHUNK // group, ROWS)
    du, ddelta, dB, dC, dA, dD, dfirst = p.kernel(
        kernel,
        "selective_scan_backward",
        [of_channel, of_channel, of_sums, of_sums, state, (p.B, p.padded), state],
        [
            plgpu.SMEM((CHUNK, U, CHANNELS), jnp.float32),
            plgpu.SMEM((ROWS, PITCH), jnp.float32),
        ],
    )(
        *p.inputs(u_BLI, delta_BLI, A_IU, B_BLU, C_BLU, D_I, first_BL),
        before,
        p.positions(p.channels(dy_BLI)),
        p.channels(dlast_BUI),
    )
    dA, dD = (jnp.sum(x, axis=0)[..., : p.I] for x in (dA, dD))
    return (
        p.back(du), p.back(ddelta), dA.T, p.summed(dB), p.summed(dC), dD, dfirst[..., : p.I],
    )  # fmt: skip
