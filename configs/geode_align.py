"""GEODE stage 0: the projector learns to show the frozen decoder what the frozen ViT sees."""

import ml_collections

from configs.geode import stage_config


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """The configuration for an argument string; see the module's docstring."""
    return stage_config("align", arg, {"train.steps": 150})
