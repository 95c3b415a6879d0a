"""Margins by which an answer must be clear for its question to be asked."""

MAX_CONTACT_GAP, MIN_SEPARATION = 0.02, 0.25
"""Largest gap of things in contact, least gap of things that are not, metres."""
MAX_SURFACE_GAP = 0.05
"""Largest distance between the nearest vertices of two scanned things in contact, metres: meshes of
scans have a vertex every 2 to 3 cm, and none on the patch where two things touch."""
MAX_APART = 1.0
"""Largest gap of things that are asked about although they do not touch, metres: whether things
further apart touch needs no look."""
MIN_VOLUME_RATIO = 1.3
"""The larger of two volumes must be at least this many times the smaller."""
MIN_CENTRE_DISTANCE = 0.7
"""Centres must be this far apart, metres, for a direction from one to the other."""
APPEARANCE_PIXELS, HIDDEN_PIXELS = 8, 5
"""A view shows an object with at least this many pixels, and hides one with fewer than that many;
in between it is left open."""
AMBIGUITY_PIXELS = 8
"""Pixels, over all views, with which an object that does not count as visible makes the number of
objects of its category ambiguous."""
LEFT_RIGHT_MARGIN, CLASS_MARGIN = 20.0, 10.0
"""Degrees between a direction and the line straight ahead or behind; between a direction and the
other boundaries of its class."""


def is_clear(angle: float, bounds: tuple[float, ...], margin: float = LEFT_RIGHT_MARGIN) -> bool:
    """Returns whether an angle is at least `margin` from every bound, all in degrees."""
    return all(abs(angle - bound) >= margin for bound in bounds)
