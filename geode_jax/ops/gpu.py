"""Whether GPUs use this package's kernels; imports no Pallas, which takes most of a second."""

import jax

PLATFORMS = ("gpu", "cuda")
"""JAX's names of GPUs."""

use_kernels = jax.make_user_context(default_value=False)
"""Context manager: within `with use_kernels(True):`, attention and the selective scan use this
package's kernels on GPUs. Off by default, because no GPU has run them yet.

The value belongs to the calling thread and is part of the keys of JAX's caches of traced and
compiled programs: a program that was traced under one value is never reused under the other."""


def kernels_wanted(platform: str) -> bool:
    """Returns whether programs for this platform use the kernels for GPUs."""
    return platform in PLATFORMS and use_kernels.value
