"""The interface between a system's losses and answers, and the code that trains and runs it."""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, TypeVar

from flax import nnx
from flax.nnx import filterlib
from jaxtyping import Float, Float32, Int, Shaped

from geode_jax.data.tokens import Tokenizer
from geode_jax.models.generate import Sampling
from geode_jax.models.internvl import InternVLConfig
from geode_jax.shapes import Array, Batch

Pair = tuple[Float32[Array, ""], Float32[Array, ""]]
"""One loss as (sum, count) over the examples that carry its target."""

Terms = dict[str, Pair]
"""Loss name -> (sum, count)."""

ModelT = TypeVar("ModelT", bound=nnx.Module)


class ScenePrediction(NamedTuple):
    """Output of the dense heads, for a batch of scenes with Y detected objects each.

    Attributes:
        depth_SVhw: metres.
        boxes_SY7: boxes of the objects, as in `geometry.boxes`.
        categories_SY: index of each object's most probable category.
        probability_SY: probability of that category.
    """

    depth_SVhw: Array
    boxes_SY7: Array
    categories_SY: Array
    probability_SY: Array


class TrainingObjective(Protocol[ModelT]):
    """The part of `Objective` that the training step uses."""

    @property
    def trainable(self) -> filterlib.Filter:
        """nnx filter of the trained parameters; the others get no gradient and no moments."""
        ...

    def build(self, rngs: nnx.Rngs) -> ModelT:
        """Returns the model with freshly initialised parameters."""
        ...

    def terms(self, model: ModelT, batch: Batch) -> Terms:
        """Returns every loss as (sum, count)."""
        ...

    def total(self, model: ModelT, terms: Terms) -> tuple[Float[Array, ""], dict]:
        """Returns the total loss and, for the log, the weights of its terms.

        The total is linear in the sums of `terms`, which are those of a whole batch.
        """
        ...


class Objective(TrainingObjective[ModelT], Protocol[ModelT]):
    """What differs between the systems: one class of each module beside this one implements it."""

    @property
    def selection_metric(self) -> str:
        """Name of the validation loss that selects the best checkpoint."""
        ...

    @property
    def internvl(self) -> InternVLConfig | None:
        """Sizes of the model's InternVL, which pretrained weights can fill; None if it has none."""
        ...

    def missing_targets(self, targets: frozenset[str]) -> dict[str, str]:
        """Returns the terms of the loss that can learn nothing, and the arrays that each needs.

        Args:
            targets: `Pipeline.targets` of the training split.
        """
        ...

    def learned_targets(self, targets: frozenset[str]) -> dict[str, list[str]]:
        """Returns what the terms of the loss learn from, for a run's log: {term: targets}.

        Args:
            targets: `Pipeline.targets` of the training split.
        """
        ...

    def prefix_length(self, views: int) -> int:
        """Returns the largest number of positions before a question, in scenes of `views` views."""
        ...

    def with_slots(self, slots: int) -> "Objective[ModelT]":
        """Returns the objective whose answers see only the first `slots` rationale tokens.

        Raises:
            UserError: the model has no rationale tokens, or fewer.
        """
        ...

    @property
    def caches_scene(self) -> bool:
        """True if `encode_scene` does not depend on the questions.

        Its result can then be cached per scene.
        """
        ...

    def encode_scene(self, model: ModelT, batch: Batch) -> Any:
        """Returns what all questions of a scene share, an argument of `answer`."""
        ...

    def answer(
        self,
        model: ModelT,
        encoded: Any,
        batch: Batch,
        eos_id: Int[Array, ""] | int,
        sampling: Sampling | None = None,
    ) -> dict[str, Shaped[Array, "S ..."]]:
        """Generates answers to the batch's questions.

        Args:
            model: of `build`.
            encoded: `encode_scene` of the same batch.
            batch: its answers only set the largest length, A.
            eos_id: token that ends an answer.
            sampling: None decodes greedily.

        Returns:
            `tokens` [S, Q, A], and further arrays that `decode_answer` reads.
        """
        ...

    def decode_answer(
        self,
        answers: Mapping[str, Any],
        place: tuple[int, int],
        record: Mapping[str, Any],
        tokenizer: Tokenizer,
    ) -> dict[str, Any]:
        """Returns one generated answer as text: `prediction`, and fields of the system's own.

        Args:
            answers: of `answer`, as NumPy arrays.
            place: (row, column) of the question in the batch.
            record: the question's record.
            tokenizer: of the run.
        """
        ...

    def predict_scene(self, model: ModelT, batch: Batch) -> ScenePrediction | None:
        """Returns what the dense heads predict; None if the model has no such heads."""
        ...
