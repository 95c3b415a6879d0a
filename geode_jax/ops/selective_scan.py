"""The selective scan of Mamba-1 [Gu & Dao 2023, Eq. 2a with the discretisation of Sec. 3.2].

    h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t        y_t = C_t h_t + D u_t

for each of E channels, which have U states each; u, delta and D are of a channel, B and C of all
channels of a position. States are [B, U, E]: the channels, of which there are many, come last.

Behind the one call are plain XLA, by chunks, and kernels for TPUs (`selective_scan_tpu`) and for
Hopper GPUs (`selective_scan_gpu`), which are used within `gpu.use_kernels(True)`.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from geode_jax import sharding
from geode_jax.ops import gpu
from geode_jax.shapes import Array


class _Passes(NamedTuple):
    """A pair of kernels."""

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
"""Positions between two states that the backward pass keeps; it computes those in between again."""


def selective_scan(
    u_BLE: Array,
    delta_BLE: Array,
    A_EU: Array,
    B_BLU: Array,
    C_BLU: Array,
    D_E: Array,
    *,
    first_BL: Array | None = None,
    state_BUE: Array | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """All positions, in order; the state is fp32 whatever the dtype of the rest.

    Under a mesh (`jax.set_mesh`) the kernels run on each device's rows and channels.

    Args:
        u_BLE: input.
        delta_BLE: step size, positive; a position of step size 0 leaves the state as it is.
        A_EU: negative, fp32.
        B_BLU: what the input adds to each state.
        C_BLU: what each state adds to the output.
        D_E: skip connection, fp32.
        first_BL: bool, a segment begins here: it sees no state from before. None: nowhere.
        state_BUE: state before the first position; None: zeros.
        implementation: of `IMPLEMENTATIONS`; None: by `choose`. "tpu" runs in an interpreter
            elsewhere; "gpu" is for Hopper, and for 4, 8 or 16 states.

    Returns:
        y [B, L, E] in the dtype of u, and the state after the last position.

    Raises:
        ValueError: there is no such implementation, or it does not know the number of states.
    """
    (B, L, E), U = u_BLE.shape, A_EU.shape[1]
    if state_BUE is None:
        state_BUE = jnp.zeros((B, U, E), jnp.float32)
    if implementation is None:
        implementation = choose(sharding.platform(), L, U)
    if implementation not in IMPLEMENTATIONS:
        names = ", ".join(IMPLEMENTATIONS)
        raise ValueError(f"selective_scan: {implementation!r} is none of {names}")
    if implementation == "gpu" and not _gpu_supports(U):
        raise ValueError(f"selective_scan: no GPU kernel for {U} states")
    if implementation == "chunked":
        return _chunked(u_BLE, delta_BLE, A_EU, B_BLU, C_BLU, D_E, first_BL, state_BUE)
    first_BL = jnp.zeros((B, L)) if first_BL is None else first_BL
    first_BL = first_BL.astype(jnp.float32)
    mesh = jax.sharding.get_abstract_mesh()
    alone = mesh.empty or mesh.size == 1 or mesh.manual_axes
    spread = None if alone else _spread(mesh, B, E)
    arrays = u_BLE, delta_BLE, A_EU, B_BLU, C_BLU, D_E, first_BL, state_BUE
    return _by_kernels(implementation, spread, *arrays)


def choose(platform: str, positions: int, states: int) -> str:
    """The implementation for so many positions and states.

    A step of decoding is one position: a kernel has nothing to save there.
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


def _chunked(u_BLE, delta_BLE, A_EU, B_BLU, C_BLU, D_E, first_BL, state_BUE):
    B, L, E = u_BLE.shape
    chunk = min(CHUNK, L)
    chunks = -(-L // chunk)

    def by_chunk(x):
        """[B, L, ...] -> [chunks, chunk, B, ...]; zeros at the end, which leave the state."""
        x = jnp.moveaxis(x, 1, 0)
        x = jnp.pad(x, ((0, chunks * chunk - L), *((0, 0),) * (x.ndim - 1)))
        return x.reshape(chunks, chunk, *x.shape[1:])

    inputs = (u_BLE, delta_BLE, B_BLU, C_BLU)
    inputs = (*(x.astype(jnp.float32) for x in inputs), first_BL)

    # One position after the other: an associative scan of each chunk, whose steps move all its
    # states, takes several times as long on a CPU.
    def positions(state, x):
        return _positions(state, x, A_EU.T, D_E)

    state_BUE, y = jax.lax.scan(positions, state_BUE, jax.tree.map(by_chunk, inputs))
    y_BLE = jnp.moveaxis(y.reshape(chunks * chunk, B, E)[:L], 0, 1)
    return y_BLE.astype(u_BLE.dtype), state_BUE


# Sums are products of matrices where they can be: of the loops that elementwise products and
# `jnp.sum` make of them, XLA's CPU compiler does the exponentials of the summands again and again,
# in ten times the time. The derivative is written out for the same reason.
_product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def _decay_and_added(x, A_UE: Array) -> tuple[jax.Array, jax.Array]:
    """By what a position multiplies the states [..., B, U, E], and what it adds to them."""
    u, delta, b, _, first = x
    decay = jnp.exp(delta[..., None, :] * A_UE)
    decay = decay if first is None else jnp.where(first[..., None, None], 0.0, decay)
    return decay, (delta * u)[..., None, :] * b[..., None]


def _step(state_BUE: Array, x, A_UE: Array, D_E: Array) -> tuple[jax.Array, jax.Array]:
    u, _, _, c, _ = x
    decay, added = _decay_and_added(x, A_UE)
    state = decay * state_BUE + added
    return state, _product("bu,bue->be", c, state) + D_E * u


@jax.custom_vjp
def _positions(state_BUE: Array, inputs, A_UE: Array, D_E: Array) -> tuple[jax.Array, jax.Array]:
    """A chunk: the state after it, and y [T, B, E]; of its states the first alone is kept."""
    return jax.lax.scan(lambda state, x: _step(state, x, A_UE, D_E), state_BUE, inputs)


def _positions_forward(state_BUE, inputs, A_UE, D_E):
    return _positions(state_BUE, inputs, A_UE, D_E), (state_BUE, inputs, A_UE, D_E)


def _positions_backward(saved, slopes):
    """The two recurrences position by position, all else of the whole chunk at once."""
    state_BUE, inputs, A_UE, D_E = saved
    u, delta, b, c, _ = inputs
    of_last, of_y = slopes
    # What several of the following read is made once.
    decay, added = jax.lax.optimization_barrier(_decay_and_added(inputs, A_UE))

    def again(state, x):
        decay, added = x
        state = decay * state + added
        return state, state

    def back(of_after, x):
        decay, of_read = x
        of_state = of_after + of_read
        return of_state * decay, of_state

    _, after = jax.lax.scan(again, state_BUE, (decay, added))
    before = jnp.concatenate([state_BUE[None], after[:-1]])
    of_read = c[..., None] * of_y[..., None, :]
    of_first, of_state = jax.lax.scan(back, of_last, (decay, of_read), reverse=True)
    of_exponent = jax.lax.optimization_barrier(of_state * decay * before)
    of_added = _product("tbue,tbu->tbe", of_state, b)
    of_inputs = (
        of_added * delta + D_E * of_y,
        sum(of_exponent[..., i, :] * A_UE[i] for i in range(len(A_UE))) + of_added * u,
        _product("tbue,tbe->tbu", of_state, delta * u),
        _product("tbue,tbe->tbu", after, of_y),
        None,
    )
    of_A = jnp.sum(of_exponent * delta[..., None, :], axis=(0, 1))
    return of_first, of_inputs, of_A, jnp.sum(of_y * u, axis=(0, 1))


_positions.defvjp(_positions_forward, _positions_backward)


# --- By kernels -----------------------------------------------------------------------------------


class _Spread(NamedTuple):
    """Static: how rows and channels lie on a mesh."""

    mesh: jax.sharding.AbstractMesh
    rows: tuple[str, ...] | str | None
    inner: tuple[str, ...] | str | None

    def specs(self, letters: str) -> tuple[PartitionSpec, ...]:
        """Of arrays whose axes are named by words of the letters B, E, and others: whole."""
        on = {"B": self.rows, "E": self.inner}
        return tuple(PartitionSpec(*map(on.get, word)) for word in letters.split())

    def summed(self, x: Array, over: tuple[str, ...] | str | None) -> jax.Array:
        """Over the devices that each have a part of the sum."""
        return x if over is None else jax.lax.psum(x, over)


def _spread(mesh, rows: int, channels: int) -> _Spread:
    sizes = mesh.shape
    parts = sharding.spec(("batch", "inner"), (rows, channels), sizes)
    return _Spread(mesh, *parts)


# The derivative is of the whole, outside of `shard_map`, as in `ops.attention`.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _by_kernels(implementation, spread, u, delta, A, B, C, D, first, state):
    return _forward(implementation, spread, u, delta, A, B, C, D, first, state)[0]


def _forward(implementation: str, spread: _Spread | None, u, delta, A, B, C, D, first, state):
    function = _KERNELS[implementation]().forward
    if spread is not None:
        function = jax.shard_map(
            function,
            mesh=spread.mesh,
            in_specs=spread.specs("BLE BLE EU BLU BLU E BL BUE"),
            # What is kept of the channels has them with padding, and for TPUs as tiles.
            out_specs=spread.specs("BLE BUE BNUE"),
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
            dB, dC = (spread.summed(x, spread.inner) for x in (dB, dC))
            return du, ddelta, dA, dB, dC, dD, dstate

        function = jax.shard_map(
            own,
            mesh=spread.mesh,
            in_specs=spread.specs("BLE BLE EU BLU BLU E BL BNUE BLE BUE"),
            out_specs=spread.specs("BLE BLE EU BLU BLU E BUE"),
            check_vma=False,
        )
    *gradients, dstate = function(u, delta, A, B, C, D, first, before, *slopes)
    like = zip(gradients, (u, delta, A, B, C, D), strict=True)
    return *(g.astype(x.dtype) for g, x in like), jnp.zeros_like(first), dstate


_by_kernels.defvjp(_forward, _backward)
