"""All targets of the campaign."""

from tests.campaign import outside, own, texts

TARGETS = outside.TARGETS | own.TARGETS | texts.TARGETS
"""All targets by name."""
