"""Small vision-language models that understand 3D rooms, on JAX and Flax."""

from geode_jax.runtime.user_cache import name_a_home as _name_a_home

__version__ = "0.1.0"

_name_a_home()  # before any other library is imported, in workers too
