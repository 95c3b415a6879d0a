"""Configuration classes refuse what lies outside of their documented ranges, in one line."""

import dataclasses

import pytest

from geode_jax.errors import UserError
from geode_jax.models.decoder import DecoderConfig
from geode_jax.models.drm import DrmConfig
from geode_jax.models.geode import GeodeConfig
from geode_jax.models.internvl import InternVLConfig
from geode_jax.models.mamba import MambaConfig
from geode_jax.models.vit import VitConfig
from geode_jax.objectives.geode import GeodeStageConfig
from geode_jax.objectives.hidden_cot import HiddenCoTConfig
from geode_jax.sources.datasets import Request
from geode_jax.training.optimizer import OptimizerConfig
from tests.helpers.tiny_models import STUDENT

DECODER = STUDENT.decoder
VIT = VitConfig(image_size=12, patch_size=3, width=8, layers=2, heads=2, mlp_width=12)
DRM = DrmConfig(
    width=8, heads=2, layers=1, slots=4, bands=2, visual_width=8, point_width=0, llm_width=16,
    max_frames=3,
)  # fmt: skip
GEODE = GeodeConfig(InternVLConfig(VIT, DECODER), DRM, drh_width=0, patch_grid=(2, 2))
NAN, INF = float("nan"), float("inf")

BROKEN = [
    (DECODER, {"layers": 0}, "layers: 0 is not a whole number of at least 1"),
    (DECODER, {"layers": 2.0}, "layers: 2.0 is not a whole number"),
    (DECODER, {"heads": True}, "heads: True is not a whole number"),
    (DECODER, {"kv_heads": 3}, "heads: 4 is no multiple of kv_heads, 3"),
    (DECODER, {"head_width": 3}, "head_width: 3 is odd"),
    (DECODER, {"mlp": "relu"}, "mlp: 'relu' is not one of gelu, swiglu"),
    (DECODER, {"norm": ["rms"]}, "norm: \\['rms'\\] is not one of layer, rms"),
    (DECODER, {"rope_theta": INF}, "rope_theta: inf is not a number above 0"),
    (DECODER, {"norm_eps": 0}, "norm_eps: 0 is not a number above 0"),
    (DECODER, {"cross_layers": (3,)}, "cross_layers: \\(3,\\) are not layers below 3"),
    (DECODER, {"remat": "some"}, "remat: 'some' is not one of none, full, dots"),
    (DECODER, {"dtype": "int8"}, "dtype: 'int8' is not one of float32"),
    (VIT, {"patch_size": 5}, "image_size: 12 is no multiple of patch_size, 5"),
    (VIT, {"heads": 3}, "width: 8 is no multiple of heads, 3"),
    (DRM, {"heads": 3}, "width: 8 is no multiple of heads, 3"),
    (DRM, {"frames": -1}, "frames: -1 is not a whole number of at least 0"),
    (DRM, {"slots": 0}, "slots: 0 is not"),
    (DRM, {"layers": 1_000_000}, "layers: 1000000 is not a whole number of .* at most 128"),
    (STUDENT.heads, {"detection_layers": 10_000}, "detection_layers: 10000 is not .* at most 128"),
    (STUDENT.heads, {"width": 2**63 - 1}, "width: 9223372036854775807 is not .* 2,147,483,647"),
    (STUDENT, {"thinking_tokens": 2**63}, "thinking_tokens: 9223372036854775808 is not"),
    (DECODER, {"width": 2**63}, "width: 9223372036854775808 is not"),
    (MambaConfig(8, 1), {"taps": 0}, "taps: 0 is not"),
    (STUDENT.heads, {"depth_bins": 1}, "depth_bins: 1 is not a whole number of at least 2"),
    (STUDENT, {"thinking_tokens": -1}, "thinking_tokens: -1 is not"),
    (STUDENT, {"patch_grid": (0, 2)}, "patch_grid: \\(0, 2\\) is not"),
    (GEODE, {"drh_width": -1}, "drh_width: -1 is not"),
    (HiddenCoTConfig(STUDENT), {"temperature": 0}, "temperature: 0 is not a number above 0"),
    (HiddenCoTConfig(STUDENT), {"terms": ("text", "x")}, "terms: .* are not some of"),
    (HiddenCoTConfig(STUDENT), {"log_variance_bounds": (1, -1)}, "are not low, high"),
    (GeodeStageConfig(GEODE, "drm"), {"stage": "last"}, "stage: 'last' is not one of"),
    (GeodeStageConfig(GEODE, "drm"), {"patch_weight": -1}, "patch_weight: -1 is not a number"),
    (GeodeStageConfig(GEODE, "drm"), {"slots": 5}, "slots: 5 of 4 rationale tokens"),
    (OptimizerConfig("adamw", 0.1, 0, 0, 1), {"name": "sgd"}, "name: 'sgd' is not one of"),
    (OptimizerConfig("adamw", 0.1, 0, 0, 1), {"learning_rate": NAN}, "nan is not a number above"),
    (OptimizerConfig("adamw", 0.1, 0, 0, 1), {"weight_decay": INF}, "inf is not a number of at"),
    (OptimizerConfig("adamw", 0.1, 0, 0, 1), {"final_fraction": 1.5}, "at most 1"),
    (OptimizerConfig("adamw", 0.1, 0, 0, 1), {"steps": 0}, "steps: 0 is not"),
    (Request("in", "out"), {"views": 0}, "views: 0 is not"),
    (Request("in", "out"), {"seed": -1}, "seed: -1 is not"),
    (Request("in", "out"), {"patch_grid": (8,)}, "--grid: \\(8,\\) are not"),
]


@pytest.mark.parametrize(
    ("good", "changes", "rule"), BROKEN, ids=lambda part: part if isinstance(part, str) else ""
)
def test_what_is_out_of_range_is_refused(good, changes, rule):
    with pytest.raises(UserError, match=f"({type(good).__name__}: )?{rule}"):
        dataclasses.replace(good, **changes)


def test_every_class_with_documented_ranges_is_here():
    checked = {type(good) for good, _, _ in BROKEN}
    assert {DecoderConfig, VitConfig, DrmConfig, GeodeConfig} <= checked
    assert all(hasattr(kind, "__post_init__") for kind in checked)
