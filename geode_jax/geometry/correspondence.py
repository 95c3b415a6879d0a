"""Patches of two views that show the same point, and the reprojection of depth between views.

Geometry of the cross-view and multi-view terms of the Hidden-CoT paper (Sec. III-D.2, eq. 1).
Cameras are camera-from-world with OpenCV axes; intrinsics are pixels of the patch grid with
integer patch centres: patch (row, column) has its centre at (v, u) = (row, column) and the
row-major index `row * gw + column`. In suffixes with two V, the first is the source view a, the
second the target view b.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from geode_jax.shapes import Array

# Single-pass bfloat16 products, the default on accelerators, lose centimetres.
_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def correspondences(
    points_SVP3: Float[Array, "S V P 3"],
    points_mask_SVP: Bool[Array, "S V P"],
    depth_SVP: Float[Array, "S V P"],
    extrinsic_SV34: Float[Array, "S V 3 4"],
    intrinsic_SV33: Float[Array, "S V 3 3"],
    grid: tuple[int, int],
    tolerance: float = 0.1,
) -> tuple[Int[jax.Array, "S V V P"], Bool[jax.Array, "S V V P"]]:
    """Returns, for every patch of every view, the patch of every other view that shows its point.

    The point at a patch is projected into the other views. A pair is kept if the point lies in
    front of the other camera, inside its grid, and at the depth that the other camera measures
    there, up to a relative tolerance; otherwise the point is occluded.

    Args:
        points_SVP3: world points at the patch centres, metres.
        points_mask_SVP: bool, True = known point; all False in padding views.
        depth_SVP: metres, the depth of each patch, for example averaged; 0 = unknown.
        extrinsic_SV34: camera-from-world.
        intrinsic_SV33: pixels of the patch grid.
        grid: (gh, gw) with gh * gw = P.
        tolerance: largest |z - depth| / z of a visible point; covers the average over a patch.

    Returns:
        index_SVVP, int32: [s, a, b, p] is the patch of view b that shows the point of patch p of
        view a, 0 if none does; and its bool mask, False for a = b. No gradient flows through
        either.
    """
    gh, gw = grid
    mask_SVP = jnp.asarray(points_mask_SVP, bool)
    points_SVP3 = jnp.where(mask_SVP[..., None], points_SVP3, 0.0).astype(jnp.float32)
    camera = _einsum("sbij,sapj->sabpi", extrinsic_SV34[..., :3], points_SVP3)
    camera = camera + extrinsic_SV34[:, None, :, None, :, 3]
    z = camera[..., 2]
    front = z > 1e-3
    safe_z = jnp.where(front, z, 1.0)
    k = intrinsic_SV33[:, None, :, None]
    u = k[..., 0, 0] * camera[..., 0] / safe_z + k[..., 0, 2]
    v = k[..., 1, 1] * camera[..., 1] / safe_z + k[..., 1, 2]
    inside = (u >= -0.5) & (u < gw - 0.5) & (v >= -0.5) & (v < gh - 0.5)
    candidate = front & inside
    column = jnp.clip(jnp.floor(jnp.where(candidate, u, 0.0) + 0.5).astype(jnp.int32), 0, gw - 1)
    row = jnp.clip(jnp.floor(jnp.where(candidate, v, 0.0) + 0.5).astype(jnp.int32), 0, gh - 1)
    index = row * gw + column
    seen = gather_views(jnp.asarray(depth_SVP, jnp.float32), index)
    visible = (seen > 0) & (jnp.abs(z - seen) <= tolerance * safe_z)
    other = ~jnp.eye(z.shape[1], dtype=bool)[None, :, :, None]
    mask = candidate & visible & other & mask_SVP[:, :, None, :]
    index = jnp.where(mask, index, 0)
    return jax.lax.stop_gradient(index), jax.lax.stop_gradient(mask)


def gather_views(
    value_SVP: Float[Array, "S V P"], index_SVVP: Int[Array, "S V V P"]
) -> Float[jax.Array, "S V V P"]:
    """Returns the values of view b at the patches of `correspondences`: [S, Va, Vb, P]."""

    def of_view(value_P, index_VP):
        return value_P.at[index_VP].get(mode="clip")

    over_views = jax.vmap(of_view, in_axes=(0, 1), out_axes=1)
    return jax.vmap(over_views)(value_SVP, index_SVVP)


def reprojection(
    extrinsic_SV34: Float[Array, "S V 3 4"],
    intrinsic_SV33: Float[Array, "S V 3 3"],
    grid: tuple[int, int],
) -> tuple[Float[jax.Array, "S V V P"], Float[jax.Array, "S V V"]]:
    """Returns the affine map from a patch's depth to its depth in another camera.

    Depth d at patch p of camera a is unprojected, moved to the world, and moved into camera b. The
    depth there is z_b = d * slope + offset, whose numbers depend on the cameras only.

    Args:
        extrinsic_SV34: camera-from-world.
        intrinsic_SV33: pixels of the patch grid.
        grid: (gh, gw).

    Returns:
        slope_SVVP and offset_SVV (metres); not finite for padding views with zero intrinsics.
    """
    gh, gw = grid
    # Division by the zero intrinsics of padding views gives inf; numpy would also warn.
    extrinsic_SV34, intrinsic_SV33 = jnp.asarray(extrinsic_SV34), jnp.asarray(intrinsic_SV33)
    row, column = jnp.meshgrid(jnp.arange(gh), jnp.arange(gw), indexing="ij")
    k = intrinsic_SV33[:, :, None]
    x = (column.reshape(-1) - k[..., 0, 2]) / k[..., 0, 0]
    y = (row.reshape(-1) - k[..., 1, 2]) / k[..., 1, 1]
    ray_SVP3 = jnp.stack([x, y, jnp.ones_like(x)], axis=-1)
    rotation, translation = extrinsic_SV34[..., :3], extrinsic_SV34[..., 3]
    # The third row of R_b R_a^T; world = R_a^T (camera - t_a).
    axis_SVV3 = _einsum("sbj,saij->sabi", rotation[:, :, 2], rotation)
    slope = _einsum("sabi,sapi->sabp", axis_SVV3, ray_SVP3)
    offset = translation[:, None, :, 2] - _einsum("sabi,sai->sab", axis_SVV3, translation)
    return slope, offset
