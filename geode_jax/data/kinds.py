"""Names of kinds that a configuration may use: those of `exports.kinds`, and the export's own."""

import difflib
from collections.abc import Iterable

from geode_jax.errors import UserError
from geode_jax.exports.kinds import KINDS, NUMERIC_KINDS, VSI_CHOICE_KINDS

KNOWN = {*KINDS, *(f"{kind}_open" for kind in (*NUMERIC_KINDS, *VSI_CHOICE_KINDS))}
"""VSI-590K asks some tasks of VSI-Bench without options: such kinds end in `_open`."""


def check_known(names: Iterable[str], own: Iterable[str], where: str) -> None:
    """Refuses what is the name of no kind.

    Args:
        names: those of a configuration.
        own: the kinds of the export.
        where: begins the message, such as `data: kind_weights`.

    Raises:
        UserError: a name is neither in `KNOWN` nor in the export.
    """
    known = sorted(KNOWN | set(own))
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            meant = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
            raise UserError(f"{where}: {name}: no kind of question; {meant}")
