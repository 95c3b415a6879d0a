"""What a model is shown in place of a batch's own scenes."""

import dataclasses

import numpy as np

from geode_jax.evaluate.evaluator import with_others_vision
from geode_jax.shapes import without_vision
from tests.tiny_models import tiny_batch

ONLY_TARGETS = ("target_depth", "teacher_", "topk_")


def test_another_room_is_seen_and_the_same_is_asked():
    batch = tiny_batch(scenes=4)
    other, rolled = with_others_vision(batch), []
    for field in dataclasses.fields(batch):
        before, after = (np.asarray(getattr(b, field.name)) for b in (batch, other))
        shape = field.name.rsplit("_", 1)[-1]
        asked = "Q" in shape or "R" in shape or field.name.startswith(ONLY_TARGETS)
        np.testing.assert_array_equal(
            after, before if asked else np.roll(before, 2, axis=0), err_msg=field.name
        )
        rolled += [field.name] if (before != after).any() else []
    assert {"vision_SVPC", "camera_SVC", "target_boxes_SN7"} <= set(rolled)


def test_without_vision_no_scene_has_a_view():
    batch = without_vision(tiny_batch())
    assert batch.view_mask_SV.size and not batch.view_mask_SV.any()
