"""Control tokens: where GEODE answers by a value instead of words (Sec. 2.2)."""

from collections.abc import Mapping
from typing import Any

from geode_jax.errors import UserError
from geode_jax.exports import NUMERIC_KINDS

REG, BOX = "<REG>", "<3DBBOX>"
"""The tokens: a number, a box. The state at one of them is regressed, see `models.drh`."""

BASE_UNIT = {
    **{"m": 1.0, "cm": 0.01, "m2": 1.0, "items": 1.0},
    **{"ft": 0.3048, "in": 0.0254, "ft2": 0.09290304},
}
"""What one of a unit is in the unit that is regressed. VSI-Bench asks for sizes in centimetres and
for distances in metres: without this, one hundredth of a size would weigh as much as a distance."""


def control_of(record: Mapping[str, Any]) -> str:
    """The token that answers a question: BOX, REG, or "" where words do."""
    if "box" in record:
        return BOX
    return REG if "value" in record or record["kind"] in NUMERIC_KINDS else ""


def base_unit(record: Mapping[str, Any]) -> float:
    """What one of a question's unit is in the unit that is regressed; 1 where it names none.

    Raises:
        UserError: an unknown unit.
    """
    unit = record.get("unit")
    if unit is not None and unit not in BASE_UNIT:
        known = ", ".join(BASE_UNIT)
        raise UserError(f"question {record.get('id')}: unit {unit!r} is not one of {known}")
    return BASE_UNIT.get(unit, 1.0)
