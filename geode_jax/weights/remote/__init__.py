"""Modelling files that go into exported folders: PyTorch and transformers, nothing of ours."""
