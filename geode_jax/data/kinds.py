"""Check of the kinds of questions that a configuration names."""

import difflib
from collections.abc import Iterable

from geode_jax.errors import UserError
from geode_jax.exports.kinds import KINDS


def check_known(names: Iterable[str], own: Iterable[str], where: str) -> None:
    """Refuses a name that is no kind of question.

    Args:
        names: the names in a configuration.
        own: the kinds of the export.
        where: beginning of the message, such as `data: kind_weights`.

    Raises:
        UserError: a name is neither in `KINDS` nor a kind of the export.
    """
    known = sorted({*KINDS, *own})
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            meant = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
            raise UserError(f"{where}: {name}: no kind of question; {meant}")
