"""Pretrained weights: Hugging Face folders are read and written through reversible rules."""

from geode_jax.weights.convert import load_pretrained, save_pretrained

__all__ = ["load_pretrained", "save_pretrained"]
