"""A batch without what its scenes look like."""

from geode_jax.shapes import without_vision
from tests.helpers.tiny_models import tiny_batch


def test_without_vision_no_scene_has_a_view():
    batch = without_vision(tiny_batch())
    assert batch.view_mask_SV.size and not batch.view_mask_SV.any()
