"""The selective scan of Mamba-1 [Gu & Dao 2023, Eq. 2a with the discretisation of Sec. 3.2].

    h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t        y_t = C_t h_t + D u_t

for each of I channels, which have U states each. Every channel has its own u, delta and D; all
channels of a position share B and C. States are [B, U, I], with the many channels last.

`selective_scan` chooses among plain XLA by chunks, Pallas kernels for TPUs (`selective_scan_tpu`),
and kernels for Hopper GPUs (`selective_scan_gpu`; within `gpu.use_kernels(True)` only).
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Bool, Float, Float32

from geode_jax import sharding
from geode_jax.ops import gpu
from geode_jax.shapes import Array


class _Passes(NamedTuple):
    """A kernel and the kernel of its derivative."""

    forward: Callable
    backward: Callable


# Imported when they are used: Pallas takes most of a second.


def _tpu() -> _Passes:
    from geode_jax.ops.selective_scan_tpu import backward, forward

    return _Passes(forward, backward)


def _gpu() -> _Passes:
    from geode_jax.ops.selective_scan_gpu import backward, forward

    return _Passes(forward, backward)


_KERNELS = {"tpu": _tpu, "gpu": _gpu}

IMPLEMENTATIONS = ("chunked", *_KERNELS)

CHUNK = 16
"""Positions between two states that are kept for the backward pass, which recomputes the rest."""


def selective_scan(
    u_BLI: Float[Array, "B L I"],
    delta_BLI: Float[Array, "B L I"],
    A_IU: Float[Array, "I U"],
    B_BLU: Float[Array, "B L U"],
    C_BLU: Float[Array, "B L U"],
    D_I: Float[Array, " I"],
    *,
    first_BL: Bool[Array, "B L"] | None = None,
    state_BUI: Float[Array, "B U I"] | None = None,
    implementation: str | None = None,
) -> tuple[Float[jax.Array, "B L I"], Float32[jax.Array, "B U I"]]:
    """Runs the recurrence over all positions; the state is always float32.

    Under a mesh (`jax.set_mesh`) each device runs the kernels on its own rows and channels.

    Args:
        u_BLI: input.
        delta_BLI: step size, positive; a step size of 0 leaves the state unchanged.
        A_IU: negative, float32.
        B_BLU: weights of the input in each state.
        C_BLU: weights of each state in the output.
        D_I: weights of the skip connection, float32.
        first_BL: bool, True at the first position of a segment, where the state before is dropped;
            None: no segments.
        state_BUI: state before the first position; None: zeros.
        implementation: one of `IMPLEMENTATIONS`; None: by `choose`. Other platforms run "tpu" in
            Pallas' interpreter. "gpu" needs a Hopper GPU, and 4, 8 or 16 states.

    Returns:
        y [B, L, I] in the dtype of u, and the state after the last position [B, U, I].

    Raises:
        ValueError: the implementation does not exist or does not support the number of states.
    """
    (B, L, channels), U = u_BLI.shape, A_IU.shape[1]
    if state_BUI is None:
        state_BUI = jnp.zeros((B, U, channels), jnp.float32)
    if implementation is None:
        implementation = choose(sharding.platform(), L, U)
    if implementation not in IMPLEMENTATIONS:
        names = ", ".join(IMPLEMENTATIONS)
        raise ValueError(f"selective_scan: {implementation!r} is none of {names}")
    if implementation == "gpu" and not _gpu_supports(U):
        raise ValueError(f"selective_scan: no GPU kernel for {U} states")
    if implementation == "chunked":
        return _chunked(u_BLI, delta_BLI, A_IU, B_BLU, C_BLU, D_I, first_BL, state_BUI)
    first_BL = jnp.zeros((B, L)) if first_BL is None else first_BL
    first_BL = first_BL.astype(jnp.float32)
    mesh = jax.sharding.get_abstract_mesh()
    alone = mesh.empty or mesh.size == 1 or mesh.manual_axes
    spread = None if alone else _spread(mesh, B, channels)
    arrays = u_BLI, delta_BLI, A_IU, B_BLU, C_BLU, D_I, first_BL, state_BUI
    return _by_kernels(implementation, spread, *arrays)


def choose(platform: str, positions: int, states: int) -> str:
    """Returns the implementation for so many positions and states.

    Decoding computes one position at a time, where a kernel has no advantage.
    """
    if positions == 1:
        return "chunked"
    if platform == "tpu":
        return "tpu"
    wanted = gpu.kernels_wanted(platform) and _gpu_supports(states)
    return "gpu" if wanted else "chunked"


def _gpu_supports(states: int) -> bool:
    from geode_jax.ops.selective_scan_gpu import supports

    return supports(states)


def _chunked(u_BLI, delta_BLI, A_IU, B_BLU, C_BLU, D_I, first_BL, state_BUI):
    B, L, channels = u_BLI.shape
    chunk = min(CHUNK, L)
    chunks = -(-L // chunk)

    def by_chunk(x):
        """Returns [B, L, ...] as [chunks, chunk, B, ...]; the zeros of padding leave the state."""
        x = jnp.moveaxis(x, 1, 0)
        x = jnp.pad(x, ((0, chunks * chunk - L), *((0, 0),) * (x.ndim - 1)))
        return x.reshape(chunks, chunk, *x.shape[1:])

    inputs = (u_BLI, delta_BLI, B_BLU, C_BLU)
    inputs = (*(x.astype(jnp.float32) for x in inputs), first_BL)

    # Sequentially: an associative scan of each chunk moves all its states in every step and takes
    # several times as long on a CPU.
    def positions(state, x):
        return _positions(state, x, A_IU.T, D_I)

    state_BUI, y = jax.lax.scan(positions, state_BUI, jax.tree.map(by_chunk, inputs))
    y_BLI = jnp.moveaxis(y.reshape(chunks * chunk, B, channels)[:L], 0, 1)
    return y_BLI.astype(u_BLI.dtype), state_BUI


# Sums are written as matrix products where possible: with elementwise products and `jnp.sum`, XLA's
# CPU compiler recomputes the exponentials of the summands and takes ten times as long. The
# derivative is written out for the same reason.
_product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def _decay_and_added(x, A_UI: Array) -> tuple[jax.Array, jax.Array]:
    """Returns a position's factor on the states [..., B, U, I], and what it adds to them."""
    u, delta, b, _, first = x
    decay = jnp.exp(delta[..., None, :] * A_UI)
    decay = decay if first is None else jnp.where(first[..., None, None], 0.0, decay)
    return decay, (delta * u)[..., None, :] * b[..., None]


def _step(state_BUI: jax.Array, x, A_UI: Array, D_I: Array) -> tuple[jax.Array, jax.Array]:
    u, _, _, c, _ = x
    decay, added = _decay_and_added(x, A_UI)
    state = decay * state_BUI + added
    return state, _product("bu,bui->bi", c, state) + D_I * u


@jax.custom_vjp
def _positions(
    state_BUI: jax.Array, inputs, A_UI: Array, D_I: Array
) -> tuple[jax.Array, jax.Array]:
    """Returns the state after a chunk, and its y [chunk, B, I]; keeps only the first state."""
    return jax.lax.scan(lambda state, x: _step(state, x, A_UI, D_I), state_BUI, inputs)


def _positions_forward(state_BUI, inputs, A_UI, D_I):
    return _positions(state_BUI, inputs, A_UI, D_I), (state_BUI, inputs, A_UI, D_I)


def _positions_backward(saved, slopes):
    """Runs the two recurrences position by position, the rest for the whole chunk at once."""
    state_BUI, inputs, A_UI, D_I = saved
    u, delta, b, c, _ = inputs
    of_last, of_y = slopes
    # The barriers keep XLA from recomputing these values in each of their users.
    decay, added = jax.lax.optimization_barrier(_decay_and_added(inputs, A_UI))

    def again(state, x):
        decay, added = x
        state = decay * state + added
        return state, state

    def back(of_after, x):
        decay, of_read = x
        of_state = of_after + of_read
        return of_state * decay, of_state

    _, after = jax.lax.scan(again, state_BUI, (decay, added))
    before = jnp.concatenate([state_BUI[None], after[:-1]])
    of_read = c[..., None] * of_y[..., None, :]
    of_first, of_state = jax.lax.scan(back, of_last, (decay, of_read), reverse=True)
    of_exponent = jax.lax.optimization_barrier(of_state * decay * before)
    of_added = _product("tbui,tbu->tbi", of_state, b)
    of_inputs = (
        of_added * delta + D_I * of_y,
        sum(of_exponent[..., i, :] * A_UI[i] for i in range(len(A_UI))) + of_added * u,
        _product("tbui,tbi->tbu", of_state, delta * u),
        _product("tbui,tbi->tbu", after, of_y),
        None,
    )
    of_A = jnp.sum(of_exponent * delta[..., None, :], axis=(0, 1))
    return of_first, of_inputs, of_A, jnp.sum(of_y * u, axis=(0, 1))


_positions.defvjp(_positions_forward, _positions_backward)


# --- By kernels -----------------------------------------------------------------------------------


class _Spread(NamedTuple):
    """Static: the mesh axes over which rows and channels are spread."""

    mesh: jax.sharding.AbstractMesh
    rows: tuple[str, ...] | str | None
    channels: tuple[str, ...] | str | None

    def specs(self, letters: str) -> tuple[PartitionSpec, ...]:
        """Returns the specs of arrays; each word has a letter for each axis, of which B and I are
        spread."""
        on = {"B": self.rows, "I": self.channels}
        return tuple(PartitionSpec(*map(on.get, word)) for word in letters.split())

    def summed(self, x: jax.Array, over: tuple[str, ...] | str | None) -> jax.Array:
        """Sums over the devices of some mesh axes, each of which holds a part of the sum."""
        return x if over is None else jax.lax.psum(x, over)


def _spread(mesh, rows: int, channels: int) -> _Spread:
    sizes = mesh.shape
    parts = sharding.spec(("batch", "inner"), (rows, channels), sizes)
    return _Spread(mesh, *parts)


# The derivative is defined outside of `shard_map`, as in `ops.attention`.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _by_kernels(implementation, spread, u, delta, A, B, C, D, first, state):
    return _forward(implementation, spread, u, delta, A, B, C, D, first, state)[0]


def _forward(implementation: str, spread: _Spread | None, u, delta, A, B, C, D, first, state):
    function = _KERNELS[implementation]().forward
    if spread is not None:
        function = jax.shard_map(
            function,
            mesh=spread.mesh,
            in_specs=spread.specs("BLI BLI IU BLU BLU I BL BUI"),
            # The kept states have padded channels, on TPUs as blocks of 128.
            out_specs=spread.specs("BLI BUI BnUI"),
            check_vma=False,
        )
    y, last, before = function(u, delta, A, B, C, D, first, state)
    return (y, last), (u, delta, A, B, C, D, first, before)


def _backward(implementation: str, spread: _Spread | None, saved, slopes):
    u, delta, A, B, C, D, first, before = saved
    function = kernel = _KERNELS[implementation]().backward
    if spread is not None:

        def own(*arrays):
            du, ddelta, dA, dB, dC, dD, dstate = kernel(*arrays)
            dA, dD = (spread.summed(x, spread.rows) for x in (dA, dD))
            dB, dC = (spread.summed(x, spread.channels) for x in (dB, dC))
            return du, ddelta, dA, dB, dC, dD, dstate

        function = jax.shard_map(
            own,
            mesh=spread.mesh,
            in_specs=spread.specs("BLI BLI IU BLU BLU I BL BnUI BLI BUI"),
            out_specs=spread.specs("BLI BLI IU BLU BLU I BUI"),
            check_vma=False,
        )
    *gradients, dstate = function(u, delta, A, B, C, D, first, before, *slopes)
    like = zip(gradients, (u, delta, A, B, C, D), strict=True)
    return *(g.astype(x.dtype) for g, x in like), jnp.zeros_like(first), dstate


_by_kernels.defvjp(_forward, _backward)
