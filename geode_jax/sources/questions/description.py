"""Asker of a one-sentence description of the room."""

from collections.abc import Iterator

from geode_jax.sources.questions.asker import Asker
from geode_jax.sources.questions.words import with_count


def scene_description(asker: Asker) -> Iterator[dict]:
    """Yields the one description: a word for the room's size, and up to four categories.

    The categories are those with most pixels in all views, the most numerous named first.
    """
    area = asker.seen.floor
    size = "small" if area < 18 else "medium" if area < 32 else "large"
    groups: dict[str, list[int]] = {}
    for n, name in enumerate(asker.names):
        groups.setdefault(name, []).append(n)
    pixels = {name: asker.seen.rays[:, rows].sum() for name, rows in groups.items()}
    shown = sorted(groups, key=lambda name: -pixels[name])[:4]
    shown.sort(key=lambda name: (-len(groups[name]), name))
    words = [with_count(name, len(groups[name])) for name in shown]
    listed = f"{', '.join(words[:-1])} and {words[-1]}" if len(words) > 1 else words[0]
    rationale = (
        f"The room measures {area:.1f} square meters, so it is {size}. "
        f"The views show {listed} best."
    )
    answer = f"A {size} room with {listed}."
    yield asker.draft("Describe this room in one sentence.", answer, (), rationale)
