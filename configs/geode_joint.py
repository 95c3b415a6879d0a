"""GEODE stage 2: projector, decoder and regression head learn to answer (Sec. 2.2, eq. 7).

COMMAND   python -m geode_jax.main --config=configs/geode_joint.py [--config.init_from=RUN]

ARG (they compose)
    laptop | full       sizes
    drm=on|off          Table 4: off leaves the visual tokens alone before the text
    drh=on|off          Table 4: off writes numbers as text
    spatio=4|8|16       M, as of the stage before
    drm_frames=8|16     Table 2: cameras and points of so many frames; the ViT's frames stay
    vision=off          the blind baseline: nothing stands before the text

PAYS      eq. 7: the words of the answers, and lambda times the squared error of values (their
          logarithms) and boxes at their control tokens. The rationale module is frozen.

RESULT    see the README; not yet measured with these steps.

OURS      lambda = 1, learning rate, steps, the regression head's size and the codes of values.
"""

import ml_collections

from configs.geode import stage_config

LAPTOP = {"train.steps": 500}


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """The configuration for an argument string; see the module's docstring."""
    return stage_config("joint", arg, LAPTOP)
