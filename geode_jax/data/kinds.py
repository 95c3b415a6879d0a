"""Names of the kinds of questions that this code makes or reads.

An export may have kinds of its own besides; what names a kind in a configuration must name one of
either.
"""

import difflib
from collections.abc import Iterable

from geode_jax.errors import UserError
from geode_jax.exports import NUMERIC_KINDS
from geode_jax.exports.kinds import VSI_CHOICE_KINDS, VSI_NUMERIC_KINDS
from geode_jax.sources.questions import room
from geode_jax.sources.rgbd import questions as rgbd_questions

_BENCHMARKS = VSI_NUMERIC_KINDS | VSI_CHOICE_KINDS | set(NUMERIC_KINDS)
_DATA_SETS = (
    *("scanqa", "caption", "instruction", "ssr_cot", "vica_thinking"),
    *(f"sqa3d_{begin}" for begin in ("what", "is", "how", "can", "which", "other")),
)
KINDS = frozenset(
    {
        *room.KINDS,
        *rgbd_questions.KINDS,
        *_BENCHMARKS,
        *(f"{kind}_open" for kind in _BENCHMARKS),
        *_DATA_SETS,
    }
)
"""Every kind of the rooms, of RGB-D folders, of the benchmarks and of the data sets' readers."""


def check_known(names: Iterable[str], own: Iterable[str], where: str) -> None:
    """Refuses what is the name of no kind.

    Args:
        names: those of a configuration.
        own: the kinds of the export.
        where: begins the message, such as `data: kind_weights`.

    Raises:
        UserError: a name is neither in `KINDS` nor in the export.
    """
    known = sorted(KINDS | set(own))
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            meant = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
            raise UserError(f"{where}: {name}: no kind of question; {meant}")
