"""The selective scan of Mamba-1 [Gu & Dao 2023, Eq. 2a with the discretisation of Sec. 3.2].

    h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t        y_t = C_t h_t + D u_t

for each of E channels, which have U states each; u, delta and D are of a channel, B and C of all
channels of a position. States are [B, U, E]: the channels, of which there are many, come last.
"""

import jax
import jax.numpy as jnp

from geode_jax.shapes import Array

CHUNK = 16
"""Positions between two states that the backward pass keeps; it computes those in between again."""


def selective_step(
    state_BUE: Array,
    u_BE: Array,
    delta_BE: Array,
    A_EU: Array,
    B_BU: Array,
    C_BU: Array,
    D_E: Array,
    first_B: Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """One position: the next state, fp32, and y [B, E] in the dtype of u; see `selective_scan`."""
    u, delta, b, c = (x.astype(jnp.float32) for x in (u_BE, delta_BE, B_BU, C_BU))
    decay = jnp.exp(delta[:, None] * A_EU.T)
    if first_B is not None:
        decay = jnp.where(first_B[:, None, None], 0.0, decay)
    state = decay * state_BUE + (delta * u)[:, None] * b[..., None]
    y = jnp.sum(c[..., None] * state, axis=1) + D_E * u
    return state, y.astype(u_BE.dtype)


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
) -> tuple[jax.Array, jax.Array]:
    """All positions, in order; the state is fp32 whatever the dtype of the rest.

    Args:
        u_BLE: input.
        delta_BLE: step size, positive; a position of step size 0 leaves the state as it is.
        A_EU: negative, fp32.
        B_BLU: what the input adds to each state.
        C_BLU: what each state adds to the output.
        D_E: skip connection, fp32.
        first_BL: bool, a segment begins here: it sees no state from before. None: nowhere.
        state_BUE: state before the first position; None: zeros.

    Returns:
        y [B, L, E] in the dtype of u, and the state after the last position.
    """
    B, L, E = u_BLE.shape
    if state_BUE is None:
        state_BUE = jnp.zeros((B, A_EU.shape[1], E), jnp.float32)
    chunk = min(CHUNK, L)
    chunks = -(-L // chunk)

    def by_chunk(x):
        """[B, L, ...] -> [chunks, chunk, B, ...]; zeros at the end, which leave the state."""
        x = jnp.moveaxis(x, 1, 0)
        x = jnp.pad(x, ((0, chunks * chunk - L), *((0, 0),) * (x.ndim - 1)))
        return x.reshape(chunks, chunk, *x.shape[1:])

    def position(state, x):
        u, delta, b, c, first = x
        return selective_step(state, u, delta, A_EU, b, c, D_E, first)

    # One position after the other: forward and backward of [8, 256, 128, 16] take 76 ms of a CPU
    # core so, and 298 ms by an associative scan of each chunk, whose steps move all its states.
    def positions(state, x):
        return jax.lax.scan(position, state, x)

    inputs = jax.tree.map(by_chunk, (u_BLE, delta_BLE, B_BLU, C_BLU, first_BL))
    # The loop separates the two passes by itself; a barrier against merging them only costs.
    remat = jax.checkpoint(positions, prevent_cse=False)
    state_BUE, y = jax.lax.scan(remat, state_BUE, inputs)
    y_BLE = jnp.moveaxis(y.reshape(chunks * chunk, B, E)[:L], 0, 1)
    return y_BLE, state_BUE
