"""The systems that a configuration can name: one row each.

A new system is a file beside `runs.student` and `runs.geode`, and a row here; its end and its
described data have rows in `results.systems` and `plan.described`.
"""

from collections.abc import Mapping
from typing import Any

from geode_jax.runs.geode import STAGES
from geode_jax.runs.settings import System
from geode_jax.runs.student import HIDDEN_COT

SYSTEMS: Mapping[str, System[Any]] = {s.name: s for s in (HIDDEN_COT, *STAGES.values())}
"""The value of `config.system` -> the system."""
