"""Pretrained weights: Hugging Face folders in and out, through reversible rules."""

from geode_jax.weights.convert import load_pretrained, save_pretrained

__all__ = ["load_pretrained", "save_pretrained"]
