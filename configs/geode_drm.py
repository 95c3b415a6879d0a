"""GEODE stage 1: the rationale module learns to say what stands where (eq. 4)."""

import ml_collections

from configs.geode import stage_config


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """The configuration for an argument string; see the module's docstring."""
    return stage_config(
        "drm",
        arg,
        {"train.steps": 900, "loss.alignment_weight": 4.0, "loss.correspondence_weight": 1.0},
    )
