"""Kinds of questions: which have a number for an answer, which an option, which a relation."""

from __future__ import annotations

RELATIONS = (
    "left_right",
    "above_below",
    "proximity",
    "contact",
    "size_comparison",
    "orientation",
)
"""Names of a question's `relation`; the number is the probability of the first alternative. The
spatial head has one output for each, in this order."""


NUMERIC_KINDS = (
    "object_counting",
    "object_abs_distance",
    "object_size_estimation",
    "room_size_estimation",
    "surface_distance",
    "camera_motion",
    "space_size",
)
"""Kinds whose answer is a number: they carry `value`, or an answer that reads as a number."""


VSI_NUMERIC_KINDS = frozenset(
    {
        "object_counting",
        "object_abs_distance",
        "object_size_estimation",
        "room_size_estimation",
    }
)
"""VSI-Bench types answered by a number."""


VSI_CHOICE_KINDS = frozenset(
    {
        "object_rel_distance",
        "object_rel_direction_easy",
        "object_rel_direction_medium",
        "object_rel_direction_hard",
        "route_planning",
        "obj_appearance_order",
    }
)
"""VSI-Bench types answered by an option's letter."""


RELATION_KINDS = ("proximity", "contact", "size_comparison", "orientation")
"""Sec. IV-B, "Specialized 3D Spatial Reasoning"; their mean is the paper's spatial accuracy."""


DIRECTION_KINDS = (
    "object_rel_direction_easy",
    "object_rel_direction_medium",
    "object_rel_direction_hard",
)


CHOICE_KINDS = ("object_rel_distance", *DIRECTION_KINDS, "route_planning", "obj_appearance_order")


TEXT_KINDS = ("scene_description",)


VSI_TASKS = (
    "object_counting",
    "object_abs_distance",
    "object_size_estimation",
    "room_size_estimation",
    "object_rel_distance",
    "object_rel_direction",
    "route_planning",
    "obj_appearance_order",
)
