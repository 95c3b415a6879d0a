"""GEODE stage 2: projector, decoder and regression head learn to answer (eq. 7)."""

import ml_collections

from configs.geode import stage_config


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """The configuration for an argument string; see the module's docstring."""
    return stage_config("joint", arg, {"train.steps": 700})
