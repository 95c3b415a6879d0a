"""GEODE stage 2: projector, decoder and regression head learn to answer (Sec. 2.2, eq. 7).

COMMAND   python -m geode_jax.main --config=configs/geode_joint.py [--config.init_from=RUN]

ARG (they compose)
    laptop | full       sizes
    drm=on|off          Table 4: off leaves the visual tokens alone before the text
    drh=on|off          Table 4: off writes numbers as text
    spatio=4|8|16       rationale tokens, as in the stage before
    drm_frames=8|16     Table 2: cameras and points of so many frames; the ViT's frames stay
    vision=off          the blind baseline: nothing precedes the text
    regression=raw      eq. 6 as printed: squared errors of the numbers themselves, in their units

LOSS      eq. 7: the words of the answers, and lambda times the squared error of values (their
          logarithms) and boxes at their control tokens. The rationale module is frozen.

RESULT    (of 2026-11-22, rooms version 5; not measured again since)
          laptop, 100 held-out rooms, seeds 0 and 1, VSI-Bench's average over rooms' questions: both
          51.8, 49.7; drh=off 46.0, 45.4; drm=off 37.8, 35.8; neither 33.6, 35.7; blind 35.8, 34.3;
          frequency 31.8. Numbers of both: 72.5, 72.7 (blind 40.4, 40.4); choices are at chance.

OURS      lambda = 1, learning rate, steps, the regression head's size and the codes of values.
"""

import ml_collections

from geode_jax.configs.geode import stage_config

LAPTOP = {"train.steps": 500}


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """The configuration for an argument string; see the module's docstring."""
    return stage_config("joint", arg, LAPTOP)
