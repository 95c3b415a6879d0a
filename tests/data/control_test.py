import pytest

from geode_jax.data.control import BASE_UNIT, BOX, REG, base_unit, control_of
from geode_jax.errors import UserError


def test_a_box_or_a_number_answers_by_a_token():
    assert control_of({"kind": "object_counting", "answer": "3"}) == REG
    assert control_of({"kind": "weight", "answer": "3 kg", "value": 3.0}) == REG
    assert control_of({"kind": "object_box", "box": [1.0] * 7}) == BOX
    assert control_of({"kind": "size", "box": [1.0] * 7, "value": 1.0}) == BOX
    assert control_of({"kind": "proximity", "answer": "chair"}) == ""


def test_an_unknown_unit_is_one_line():
    assert base_unit({"id": "q"}) == 1
    assert [base_unit({"unit": unit}) for unit in BASE_UNIT] == list(BASE_UNIT.values())
    with pytest.raises(UserError, match=r"question q: unit 'feet' is not one of m, cm, m2, items"):
        base_unit({"id": "q", "unit": "feet"})
