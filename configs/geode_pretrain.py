"""GEODE, laptop only: what stands in for pretrained weights before the stages."""

import ml_collections

from configs.geode import stage_config


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """The configuration for an argument string; see the module's docstring."""
    return stage_config("pretrain", arg, {"train.steps": 600})
