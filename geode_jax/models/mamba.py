"""Mamba-1 [Gu & Dao 2023]: a gated mixer around a short convolution and the selective scan.

I inner channels have U states each. Sizes, names and initialisation are those of the authors'
implementation (`mamba_ssm`), so that its weights fit. Sizes beside those of `shapes`: t inputs that
the convolution remembers, its taps - 1.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Bool, Float

from geode_jax import ranges
from geode_jax.models.layers import Projection, RMSNorm, param
from geode_jax.ops.selective_scan import selective_scan
from geode_jax.shapes import Array

STEP_SIZES = (1e-3, 1e-1)
"""Range of the initial step sizes, log-uniform for each channel [Gu & Dao 2023, Sec. 3.6]."""

PYTORCH_SCALE = 3**-0.5
"""`Projection.scale` that gives the standard deviation of PyTorch's default, U(±fan-in^-1/2)."""


@dataclasses.dataclass(frozen=True)
class MambaConfig:
    """Sizes of a Mamba block.

    Attributes:
        width: D.
        layers: number of blocks in the stack, which scales the initial output projections.
        expand: inner channels per unit of width, I = expand * D.
        states: U.
        taps: of the convolution.
        norm_eps: epsilon of the norm.
    """

    width: int
    layers: int
    expand: int = 2
    states: int = 16
    taps: int = 4
    norm_eps: float = 1e-5

    def __post_init__(self):
        sizes = {"width layers expand states taps": ranges.whole(1)}
        ranges.check(self, {**sizes, "norm_eps": ranges.real(0, above=True)})

    @property
    def inner(self) -> int:
        """I."""
        return self.expand * self.width

    @property
    def rank(self) -> int:
        """Rank of the projection of the step sizes."""
        return math.ceil(self.width / 16)


class MambaCache(NamedTuple):
    """What a mixer keeps of the positions so far."""

    window_BtI: Array  # the last taps - 1 inputs of the convolution, zero before the first
    state_BUI: Array  # float32


class CausalConvolution(nnx.Module):
    """Depthwise convolution over a position and the taps - 1 positions before it in its segment."""

    def __init__(self, channels: int, taps: int, *, rngs: nnx.Rngs):
        # PyTorch's default, whose fan-in is the taps. Not a matrix: no weight decay, no Muon.
        bound = taps**-0.5
        kernel, bias = (
            jax.random.uniform(rngs.params(), shape, minval=-bound, maxval=bound)
            for shape in ((taps, channels), (channels,))
        )
        self.kernel = param(kernel, None, "inner")
        self.bias = param(bias, "inner")

    def __call__(
        self,
        x_BLI: Float[Array, "B L I"],
        window_BtI: Float[Array, "B t I"] | None,
        first_BL: Bool[Array, "B L"] | None,
    ) -> tuple[Float[jax.Array, "B L I"], Float[jax.Array, "B t I"]]:
        """Returns the output, and the window for the positions that follow.

        Args:
            x_BLI: input.
            window_BtI: the taps - 1 inputs before x; None: zeros.
            first_BL: True at the first position of a segment; None: no segments.
        """
        B, L, channels = x_BLI.shape
        before = self.kernel.shape[0] - 1
        if window_BtI is None:
            window_BtI = jnp.zeros((B, before, channels), x_BLI.dtype)
        x = jnp.concatenate([window_BtI, x_BLI], axis=1)
        kernel = self.kernel[...].astype(x.dtype)
        if first_BL is None:
            own = None
        else:  # number of each position's segment; segment 0 continues the window
            segment = jnp.pad(jnp.cumsum(first_BL, axis=1), ((0, 0), (before, 0)))[..., None]
            own = segment[:, before:]
        y = self.bias[...].astype(x.dtype)
        for i, tap in enumerate(kernel):
            shifted = x[:, i : i + L]
            if own is not None:
                shifted = jnp.where(segment[:, i : i + L] == own, shifted, 0)
            # With an explicit broadcast, a tap's gradient is one sum over rows and positions.
            # Otherwise XLA's CPU compiler sums over the positions of each row, ten times as slowly.
            y = y + jnp.broadcast_to(tap, shifted.shape) * shifted
        window = x[:, L:]
        return y, window if own is None else jnp.where(segment[:, L:] == own[:, -1:], window, 0)


class MambaMixer(nnx.Module):
    """Projection to x and z, convolution and selective scan of x, gate by z, projection back."""

    def __init__(self, config: MambaConfig, *, rngs: nnx.Rngs):
        c, D, inner = config, config.width, config.inner
        self.config = c
        # x and z are a separate axis, so that each shard of the channels holds its x and its z.
        self.in_proj = Projection(
            (D,), (2, inner), ("embed", None, "inner"), bias=False, scale=PYTORCH_SCALE, rngs=rngs
        )
        self.conv = CausalConvolution(inner, c.taps, rngs=rngs)
        self.x_proj = Projection(
            (inner,),
            (c.rank + 2 * c.states,),
            ("inner", None),
            bias=False,
            scale=PYTORCH_SCALE,
            rngs=rngs,
        )
        self.dt_proj = Projection((c.rank,), (inner,), (None, "inner"), bias=True, rngs=rngs)
        bound = c.rank**-0.5
        self.dt_proj.kernel[...] = jax.random.uniform(
            rngs.params(), (c.rank, inner), minval=-bound, maxval=bound
        )
        low, high = map(math.log, STEP_SIZES)
        delta = jnp.exp(jax.random.uniform(rngs.params(), (inner,), minval=low, maxval=high))
        assert self.dt_proj.bias is not None
        self.dt_proj.bias[...] = delta + jnp.log(-jnp.expm1(-delta))  # the inverse of softplus
        # "S4D-real": A = -1, ..., -U in every channel (Sec. 3.6).
        A_log = jnp.log(jnp.arange(1, c.states + 1, dtype=jnp.float32))
        self.A_log = param(jnp.tile(A_log, (inner, 1)), "inner", None)
        self.D = param(jnp.ones((inner,)), "inner")
        self.out_proj = Projection(
            (inner,),
            (D,),
            ("inner", "embed"),
            bias=False,
            scale=PYTORCH_SCALE * c.layers**-0.5,
            rngs=rngs,
        )

    def __call__(
        self,
        x_BLD: Float[Array, "B L D"],
        cache: MambaCache | None = None,
        first_BL: Bool[Array, "B L"] | None = None,
    ) -> tuple[Float[jax.Array, "B L D"], MambaCache]:
        """See `MambaBlock`."""
        rank, U = self.config.rank, self.config.states
        x, z = jnp.moveaxis(self.in_proj(x_BLD), -2, 0)
        window, state = (None, None) if cache is None else cache
        with jax.named_scope("convolution"):
            x, window = self.conv(x, window, first_BL)
            x = jax.nn.silu(x)
        delta, b, c = jnp.split(self.x_proj(x), (rank, rank + U), axis=-1)
        # In float32: for delta = 1e-3 the bias is near -7, and bfloat16 would change delta by 3%.
        delta = jax.nn.softplus(self.dt_proj(delta.astype(jnp.float32)))
        with jax.named_scope("selective_scan"):
            y, state = selective_scan(
                x,
                delta,
                -jnp.exp(self.A_log[...]),
                b,
                c,
                self.D[...],
                first_BL=first_BL,
                state_BUI=state,
            )
        return self.out_proj(y * jax.nn.silu(z)), MambaCache(window, state)


class MambaBlock(nnx.Module):
    """x += mixer(norm(x))."""

    def __init__(self, config: MambaConfig, *, rngs: nnx.Rngs):
        self.norm = RMSNorm(config.width, eps=config.norm_eps)
        self.mixer = MambaMixer(config, rngs=rngs)

    def __call__(
        self,
        x_BLD: Float[jax.Array, "B L D"],
        cache: MambaCache | None = None,
        first_BL: Bool[Array, "B L"] | None = None,
    ) -> tuple[Float[jax.Array, "B L D"], MambaCache]:
        """Runs any number of positions; decoding runs one at a time.

        Args:
            x_BLD: hidden states.
            cache: of the positions before; None: there are none.
            first_BL: True at the first position of a segment of a packed row, which reads
                nothing before it; None: no segments.

        Returns:
            Hidden states, and the cache for the positions that follow.
        """
        out, cache = self.mixer(self.norm(x_BLD), cache, first_BL)
        return jnp.asarray(x_BLD) + out, cache
