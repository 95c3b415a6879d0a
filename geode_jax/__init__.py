"""Small vision-language models that understand 3D rooms, on JAX and Flax."""

__version__ = "0.1.0"
