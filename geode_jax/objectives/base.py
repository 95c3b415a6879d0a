"""What training asks of an objective."""

from collections.abc import Mapping
from typing import Any, Protocol

from flax import nnx

from geode_jax.data.tokens import Tokenizer
from geode_jax.models.generate import Sampling
from geode_jax.shapes import Array, Batch

Terms = dict[str, tuple[Array, Array]]
"""Loss name -> (sum, count) over the examples that carry its target."""


class Objective(Protocol):
    """What differs between the systems; see `objectives/`.

    Attributes:
        judge: the validation loss whose lowest value is of the best checkpoint.
    """

    judge: str

    def build(self, rngs: nnx.Rngs) -> nnx.Module:
        """The model with freshly initialised parameters."""
        ...

    @property
    def trainable(self) -> Any:
        """nnx filter of the parameters that learn; the others get no gradient and no moments."""
        ...

    def terms(self, model: nnx.Module, batch: Batch) -> Terms:
        """Every loss as (sum, count)."""
        ...

    def total(self, model: nnx.Module, terms: Terms) -> tuple[Array, dict]:
        """The loss of a whole batch's `terms`, linear in their sums, and weights for the log."""
        ...

    @property
    def looks_before_asked(self) -> bool:
        """Whether `look` does without the questions, so that it serves whatever is asked later."""
        ...

    def look(self, model: nnx.Module, batch: Batch) -> Any:
        """What the questions of a scene share, for `answer`."""
        ...

    def answer(
        self,
        model: nnx.Module,
        looked: Any,
        batch: Batch,
        eos_id: int,
        sampling: Sampling | None = None,
    ) -> dict[str, Array]:
        """Answers to the batch's questions, greedy without `sampling`: `tokens` [S, Q, A], and
        what `say` reads."""
        ...

    def say(
        self, out: dict, place: tuple[int, int], record: Mapping[str, Any], tokenizer: Tokenizer
    ) -> dict[str, Any]:
        """What `answer`, fetched, says to the question of a record that stands at (row, column):
        `prediction` and whatever goes with it."""
        ...
