"""Notes that several results have in common: what a reader must know to trust the scores."""

from collections.abc import Mapping

from geode_jax.exports import Export
from geode_jax.sources.rooms import export as rooms


def synthetic_notes(export: Export) -> list[str]:
    """Returns a note on the data if the export has the synthetic rooms of this package."""
    # Merged exports name the projects of all parts.
    if rooms.PRODUCER["project"] not in export.manifest["producer"]["project"]:
        return []
    tokens = ", and their vision tokens are a fixed function of the true geometry"
    made = tokens if export.manifest["tokens_contain_depth"] else ""
    return [f"rooms are synthetic{made}: no number here compares with the papers' numbers"]


def left_out_notes(dropped: Mapping[str, int]) -> list[str]:
    """Returns a note with the number of left-out questions per reason, if there are any."""
    listed = ", ".join(f"{count} x {reason}" for reason, count in sorted(dropped.items()) if count)
    return [f"left out of the test: {listed}"] if listed else []
