"""The selective scan as Mosaic GPU kernels for Hopper, forward and backward.

A program is a warpgroup with 128 channels of a row of the batch, one of each thread, and goes over
the chunks of positions of the row. Of each of the U states, 128 channels are one register of each
thread, and what belongs to a position and not to a channel (B, C, whether the state before counts)
is scalars: so threads have nothing to say to each other, but for dB and dC. Chunks come through a
ring of buffers in shared memory, the next one while this one is computed; results go from registers
to global memory, 512 bytes in a row. Forward keeps the state before each chunk, [chunks, U, E]
floats; backward goes over the chunks in reverse and computes the states within a chunk again, into
shared memory.

dB and dC are sums over channels: the summands of a few positions are transposed by way of shared
memory, so that a thread sums channels instead of holding one; XLA sums the blocks of channels.
Everything is float32 inside. Positions, of which a chunk may have too many, and channels are padded
with zeros: a step size of 0 leaves the state.

The arithmetic of a position is in functions of arrays (`advance`, `retreat`), which the kernels and
the tests' simulator share; newer jax interprets all of a kernel, its copies too. Nobody has run
these kernels on a GPU yet, and so `selective_scan` takes them only where it is told to. A GPU is
full from 132 programs on, which a single row of 3,072 channels does not have.

Letters: N chunks of T positions; c channels with padding.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from geode_jax.ops.attention_gpu import WHOLE
from geode_jax.shapes import Array

T = 16
"""Positions of a chunk: their states, of 128 channels, are 128 of the 227 KiB of shared memory."""

CHANNELS = 128
"""Of a program: as many as a warpgroup has threads."""

ROWS = 64
"""Of what is summed over channels at a time, positions x states: the layout of sums has 64."""

PITCH = CHANNELS + 8
"""Of these rows, in shared memory: the 4 that half a warp reads at a time are in other banks."""

STATES = (4, 8, 16)
"""Those U that divide `ROWS` into positions that divide `T`."""

STAGES = 2
"""Chunks that are in shared memory at a time."""

UNROLL = 2
"""Positions between two jumps: what the second reads is on its way while the first is computed."""

LN_2 = math.log(2)


# --- The arithmetic of a position -----------------------------------------------------------------


def advance(before: Sequence, rates: Sequence, step, added, reset, b: Sequence) -> list:
    """The states after a position.

    Args:
        before: [channels] of each state.
        rates: like them, of the exponent base 2.
        step, added: [channels] step size, and input times step size.
        reset: scalar, -inf where the states before do not count, else 0.
        b: scalars, of each state.
    """
    return [
        jnp.exp2(step * rate + reset) * h + of * added
        for h, rate, of in zip(before, rates, b, strict=True)
    ]


def read(states: Sequence, c: Sequence, skipped):
    """y of a position, [channels]: what passes by the states, and what they give."""
    for h, of in zip(states, c, strict=True):
        skipped += of * h
    return skipped


def retreat(after: Sequence, before: Sequence, rates: Sequence, step, u, dy, reset, b, c, D):
    """The gradients of a position, whose later ones are known.

    Args:
        after: [channels] of each state, the gradient of the state after the position, but for what
            this position's y reads of it.
        before: the states before the position.
        u, dy, D: [channels].
        others: as of `advance` and `read`.

    Returns:
        Gradients of the states before the position, of u, of the step size, what is added to that
        of each of A's columns, and for each state the summands of b's.
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
    """Whether the kernels know this number of states."""
    return states in STATES


class _Sizes:
    """Of arrays and blocks; see `forward` for the arguments."""

    def __init__(self, u_BLE: Array, A_EU: Array):
        self.B, self.L, self.E = u_BLE.shape
        self.U = A_EU.shape[1]
        self.N = -(-self.L // T)
        self.blocks = -(-self.E // CHANNELS)
        self.c = self.blocks * CHANNELS
        self.scalars = -(-(2 * self.U + 1) // 4) * 4  # copies are of whole 16 bytes

    def channels(self, x: Array) -> jax.Array:
        """[..., E] -> [..., c], float32."""
        x = x.astype(jnp.float32)
        return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, self.c - self.E)])

    def positions(self, x: Array) -> jax.Array:
        """[B, L, X] -> [B * N * T, X]."""
        x = jnp.pad(x, [(0, 0), (0, self.N * T - self.L), (0, 0)])
        return x.reshape(-1, x.shape[-1])

    def back(self, x: Array) -> jax.Array:
        """[B * N * T, c] -> [B, L, E]."""
        return x.reshape(self.B, self.N * T, -1)[:, : self.L, : self.E]

    def summed(self, x: Array) -> jax.Array:
        """[B, blocks, N * T * U / 64, 64] -> [B, L, U]."""
        x = x.reshape(self.B, self.blocks, self.N * T, self.U)
        return jnp.sum(x, axis=1)[:, : self.L]

    def inputs(self, u, delta, A, B, C, D, first) -> list[jax.Array]:
        """What both kernels read."""
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
        """A kernel with one warpgroup, on a grid (blocks of channels, B)."""
        return plgpu.kernel(
            body,
            out_type=[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes],
            scratch_types=scratch,
            grid=(self.blocks, self.B),
            grid_names=("block", "batch"),
            kernel_name=name,
            compiler_params=plgpu.CompilerParams(
                approx_math=True,
                # Of shared memory a thread reads what it wrote itself; elsewhere, `commit_smem`.
                unsafe_no_auto_barriers=True,
                lowering_semantics=plgpu.LoweringSemantics.Lane,
            ),
        )


def _place() -> tuple[jax.Array, jax.Array, pl.Slice]:
    """This program's row of the batch, block of channels, and these channels."""
    batch, block = (jax.lax.axis_index(name) for name in ("batch", "block"))
    return batch, block, pl.ds(block * CHANNELS, CHANNELS)


_THREADS = plgpu.Layout.WG_STRIDED((CHANNELS,), vec_size=1)


def _load(ref, *index) -> jax.Array:
    """[channels], one of each thread."""
    return plgpu.load(ref.at[index], *WHOLE, layout=_THREADS)


def _zero() -> jax.Array:
    return plgpu.layout_cast(jnp.zeros(CHANNELS, jnp.float32), _THREADS)


def _scalars(ref, t, U: int) -> tuple[list, list, jax.Array]:
    """b, c and reset of position t of a chunk."""
    values = [ref[t, i] for i in range(2 * U + 1)]
    return values[:U], values[U : 2 * U], values[2 * U]


def _over_chunks(p: _Sizes, body, order, carry, scalars, *arrays):
    """Calls body(n, arrays' chunk n [T, 128] each, that of scalars, carry) for each chunk.

    Args:
        order: step -> n.
        carry: before the first step; the one after the last is returned.
        scalars, arrays: [B * N * T, ...] in global memory.
    """
    batch, block, _ = _place()

    def step(indices, scalars, *rest):
        carry = body(order(indices[0]), *rest[:-1], scalars, rest[-1])
        plgpu.commit_smem()  # all threads have read what the next copy overwrites
        return carry

    def spec(width, column):
        return plgpu.BlockSpec((T, width), lambda i: (batch * p.N + order(i), column))

    return plgpu.emit_pipeline(
        step,
        grid=(p.N,),
        in_specs=[spec(p.scalars, 0), *(spec(CHANNELS, block) for _ in arrays)],
        max_concurrent_steps=STAGES,
        init_carry=carry,
    )(scalars, *arrays)


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
    """y [B, L, E], the state after the last position, and those before each chunk [B, N, U, c].

    Args:
        u_BLE, delta_BLE, A_EU, B_BLU, C_BLU, D_E, state_BUE: as of `selective_scan`; U of `STATES`.
        first_BL: 1 where a segment begins, else 0.
    """
    p = _Sizes(u_BLE, A_EU)
    N, U = p.N, p.U

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
                y[(batch * N + n) * T + t, mine] = read(states, c, skip * own)
                return states

            return jax.lax.fori_loop(0, T, position, states, unroll=UNROLL)

        states = [_load(first, batch, i, mine) for i in range(U)]
        states = _over_chunks(p, chunk, lambda n: n, states, scalars, u, delta)
        for i, h in enumerate(states):
            last[batch, i, mine] = h

    state = (p.B, U, p.c)
    shapes = [(p.B * N * T, p.c), state, (p.B, N, U, p.c)]
    inputs = p.inputs(u_BLE, delta_BLE, A_EU, B_BLU, C_BLU, D_E, first_BL)
    y, last, before = p.kernel(kernel, "selective_scan_forward", shapes)(
        *inputs, p.channels(state_BUE)
    )
    return p.back(y).astype(u_BLE.dtype), last[..., : p.E], before


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
    N, U = p.N, p.U
    group = ROWS // U  # positions that are summed over channels at a time

    def kernel(
        u, delta, scalars, A, D, before, dy, dlast, du, ddelta, dB, dC, dA, dD, dfirst, kept, rows
    ):
        batch, block, mine = _place()
        rates, skip = [_load(A, i, mine) for i in range(U)], _load(D, mine)

        def groups(n, position, sums, carry, reverse: bool):
            """Calls position(t, put, carry) for each, and sums what is put in the place of state i.

            Args:
                n: chunk.
                sums: of dB or dC, in global memory.
                carry: before the first call; the one after the last is returned.
                reverse: the last position comes first.
            """

            def whole(k, carry):
                g = T // group - 1 - k if reverse else k

                def one(k, carry):
                    at = group - 1 - k if reverse else k

                    def put(i, x):
                        rows[at * U + i, pl.ds(0, CHANNELS)] = x

                    return position(g * group + at, put, carry)

                carry = jax.lax.fori_loop(0, group, one, carry, unroll=UNROLL)
                plgpu.commit_smem()  # all threads have put their channels
                x = rows.at[:, pl.ds(0, CHANNELS)]
                x = plgpu.load(x, *WHOLE, layout=plgpu.Layout.WGMMA, optimized=False)
                sums[batch, block, n * (T // group) + g] = jnp.sum(x, axis=1)
                plgpu.commit_smem()  # and have read what they put next over
                return carry

            return jax.lax.fori_loop(0, T // group, whole, carry)

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
                at = (batch * N + n) * T + t
                du[at, mine], ddelta[at, mine] = of_u, of_step
                of_A = [a + x for a, x in zip(of_A, of_rates, strict=True)]
                return slopes, of_A, of_D + g * own

            states = [_load(before, batch, n, i, mine) for i in range(U)]
            groups(n, again, dC, states, reverse=False)
            return groups(n, position, dB, carry, reverse=True)

        slopes = [_load(dlast, batch, i, mine) for i in range(U)]
        carry = slopes, [_zero() for _ in range(U)], _zero()
        slopes, of_A, of_D = _over_chunks(
            p, chunk, lambda i: N - 1 - i, carry, scalars, u, delta, dy
        )
        for i in range(U):
            dfirst[batch, i, mine], dA[batch, i, mine] = slopes[i], of_A[i]
        dD[batch, mine] = of_D

    of_channel, state = (p.B * N * T, p.c), (p.B, U, p.c)
    of_sums = (p.B, p.blocks, N * T // group, ROWS)
    du, ddelta, dB, dC, dA, dD, dfirst = p.kernel(
        kernel,
        "selective_scan_backward",
        [of_channel, of_channel, of_sums, of_sums, state, (p.B, p.c), state],
        [
            plgpu.SMEM((T, U, CHANNELS), jnp.float32),
            plgpu.SMEM((ROWS, PITCH), jnp.float32),
        ],
    )(
        *p.inputs(u_BLE, delta_BLE, A_EU, B_BLU, C_BLU, D_E, first_BL),
        before,
        p.positions(p.channels(dy_BLE)),
        p.channels(dlast_BUE),
    )
    dA, dD = (jnp.sum(x, axis=0)[..., : p.E] for x in (dA, dD))
    return (
        p.back(du), p.back(ddelta), dA.T, p.summed(dB), p.summed(dC), dD, dfirst[..., : p.E],
    )  # fmt: skip
