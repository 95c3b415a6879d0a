"""The settings of a run, typed: what a configuration becomes once it is read and checked.

`runs.config` makes them from a file in `configs` or a run's `config.json`. The settings of one
system alone stand beside it, in `runs.student` and `runs.geode`.
"""

import abc
import dataclasses
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Generic, Literal, Protocol, Self, TypeVar

from geode_jax.data.control import BOX, REG
from geode_jax.data.mixture import parse_fraction, parse_mixture
from geode_jax.data.scene_arrays import SceneShapes
from geode_jax.errors import UserError
from geode_jax.objectives.base import Objective
from geode_jax.training.optimizer import OptimizerConfig

Rule = tuple[str, Callable[[Any, Any], bool], str]
"""Field names with spaces between, a predicate of (value, settings), and the rule in words."""


def at_least(least: float) -> tuple[Callable[[Any, Any], bool], str]:
    """The predicate and the words of a rule for numbers from `least`."""
    return lambda value, _: value >= least, f"at least {least}"


def at_most(most: float) -> tuple[Callable[[Any, Any], bool], str]:
    """The predicate and the words of a rule for numbers up to `most`."""
    return lambda value, _: value <= most, f"at most {most:,}"


MOST_SIZE = 1 << 20
"""Largest size of a part of a batch, or of a part of a model that is no width."""


def one_of(choices: Sequence[str]) -> tuple[Callable[[Any, Any], bool], str]:
    """The predicate and the words of a rule for some values."""
    return lambda value, _: value in choices, f"one of {', '.join(choices)}"


POSITIVE: tuple[Callable[[Any, Any], bool], str] = (
    lambda value, _: 0 < value < float("inf"),
    "positive",
)

PATH: tuple[Callable[[Any, Any], bool], str] = (
    lambda value, _: (
        "\0" not in value
        and len(value.encode(errors="surrogatepass")) < 4096
        and all(len(name.encode(errors="surrogatepass")) <= 255 for name in re.split("[/,]", value))
    ),
    "a path: file systems hold names of up to 255 bytes",
)
"""The predicate and the words of a rule for paths, several with commas between them."""

Dtype = Literal["float32", "bfloat16", "float16"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Which export a run learns from, and what its batches look like.

    Attributes:
        root: folder in which rooms and converted RGB-D folders are kept.
        export: "rooms", or the folder of an export.
        rooms_scenes: training and val scenes of the rooms.
        rooms_seed: seed of the rooms.
        rooms_images: side in pixels of the rooms' pictures; 0: rooms without pictures.
        rgbd: an RGB-D folder to convert; "": none.
        rgbd_intrinsic: fx, fy, cx, cy in pixels, for a folder without `intrinsic/`; else empty.
        rgbd_depth_scale: stored depth units in a metre.
        vision: the tensor that the model sees, see `data.settings.PipelineConfig`.
        scenes_per_batch: scenes of a training step.
        questions_per_scene: questions drawn for each of them.
        question_length: tokens of a question; 0: the longest of the training split.
        answer_length: tokens of an answer; 0: the longest of the training split.
        max_boxes: boxes of a scene.
        rows_per_scene: packed rows of text of a scene.
        row_length: tokens of such a row.
        workers: threads that make batches.
        on_bad_scene: "stop" or "skip", see `data.settings.PipelineConfig`.
        on_missing_targets: what happens where no training scene has what a term of the loss
            learns from: "stop" refuses the run, "skip" trains on the other terms.
        stand_in_tokens: trains on real scenes whose `vggt/tokens` are made from their true depth.
        kind_weights: kind of question -> its weight in the draw; 1 where it is not named.
        mixture: weights of data sets, as "scanqa=2,vsi590k=0.5".
        fraction: share of the training questions of every data set and kind, in (0, 1]; or shares
            of single data sets, as "s-mit=0.25,cambrian-alignment=0.1", the others being whole.
        min_learned, asks_rationales: see `data.settings.PipelineConfig`.
    """

    root: str
    export: str
    rooms_scenes: int
    rooms_seed: int
    rooms_images: int = 0
    rgbd: str
    rgbd_intrinsic: Annotated[
        tuple[()] | tuple[float, float, float, float], "fx, fy, cx, cy, or empty"
    ] = ()
    rgbd_depth_scale: float = 1000.0
    vision: str
    scenes_per_batch: int
    questions_per_scene: int
    question_length: int
    answer_length: int
    max_boxes: int
    rows_per_scene: int
    row_length: int
    workers: int
    on_bad_scene: str
    on_missing_targets: Literal["stop", "skip"] = "stop"
    stand_in_tokens: bool = False
    kind_weights: Mapping[str, float]
    mixture: str = ""
    fraction: Annotated[float | str, "a number, or text such as s-mit=0.25,own=0.5"] = 1.0
    min_learned: float = 0.5
    asks_rationales: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """The optimizer but for the length of its schedule, see `training.optimizer.OptimizerConfig`.

    Attributes:
        name: "adamw", or "muon" for the trunk's matrices beside AdamW.
        learning_rate: peak of the schedule.
        weight_decay: decoupled, on matrices only.
        warmup_steps: linear from 0.
        final_fraction: share of the peak at the end.
        clip_norm: bound of the gradient's global norm.
    """

    name: Literal["adamw", "muon"]
    learning_rate: float
    weight_decay: float
    warmup_steps: int
    final_fraction: float
    clip_norm: float

    def over(self, steps: int) -> OptimizerConfig:
        """Returns the optimizer of a training of so many steps."""
        return OptimizerConfig(steps=steps, **vars(self))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How long a run trains, and when it is evaluated and saved.

    Attributes:
        steps: optimizer steps; 0: `epochs` decides.
        epochs: visits of every training scene.
        microbatches: parts of a batch whose gradients are summed.
        eval_every: steps between evaluations on the val split.
        checkpoint_every: steps between checkpoints.
        checkpoint_minutes: minutes after which a checkpoint is due anyway; 0: steps alone decide.
        patience: evaluations without a better loss that end the training; 0: it never ends early.
        max_skipped: steps in a row without a finite loss and gradient, after which a run is given
            up.
    """

    steps: int
    epochs: int
    microbatches: int
    eval_every: int
    checkpoint_every: int
    checkpoint_minutes: float = 0
    patience: int
    max_skipped: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalSettings:
    """What a run is scored on.

    Attributes:
        reference: whose answers are learned and scored against, "truth" or "teacher".
        val_scenes: scenes of every evaluation during training.
        test_scenes: scenes of the evaluation at the end.
        examples: answers that the report shows.
        blind: work directory of a run without vision, shown beside this one if it is there.
    """

    reference: Literal["truth", "teacher"]
    val_scenes: int
    test_scenes: int
    examples: int
    blind: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossSettings:
    """What the losses of all systems share.

    Attributes:
        vision: False trains the blind baseline, which sees nothing of the scene.
    """

    vision: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(abc.ABC):
    """The settings of a run. A system's own subclass adds `model` and narrows `loss`.

    Attributes:
        system: the system that the configuration names.
        seed: of parameters, scene order and drawn questions.
        mesh: devices along the axes data, fsdp, model; -1: the remaining ones.
        tokenizer: folder of a Hugging Face tokenizer; "": one is trained on the questions.
        init_from: a run, or pretrained folders with commas between, see `runs.start`; "": none.
        data, loss, optimizer, train, eval: see their classes.
        values: the configuration as `config.json` has it: checksums and comparisons of runs are
            made of these, so a run saved before a field existed keeps its checksum.
    """

    system: "System[Any]"
    seed: int
    mesh: Annotated[tuple[int, int, int], "sizes of data, fsdp, model"]
    tokenizer: str
    init_from: str = ""
    data: DataSettings
    loss: LossSettings
    optimizer: OptimizerSettings
    train: TrainSettings
    eval: EvalSettings
    values: Mapping[str, Any] = dataclasses.field(default_factory=dict, repr=False, compare=False)

    RULES: ClassVar[tuple[Rule, ...]] = (
        (
            "seed data.rooms_seed data.rooms_images data.question_length data.answer_length "
            "optimizer.warmup_steps optimizer.weight_decay optimizer.final_fraction train.steps "
            "train.patience train.max_skipped train.checkpoint_minutes eval.examples",
            *at_least(0),
        ),
        (
            "train.epochs train.microbatches train.eval_every train.checkpoint_every "
            "eval.val_scenes eval.test_scenes data.scenes_per_batch data.questions_per_scene "
            "data.rows_per_scene data.row_length data.workers",
            *at_least(1),
        ),
        # Random numbers of larger seeds are those of their last 32 bits.
        ("seed", *at_most(2**32 - 1)),
        ("data.rooms_seed", *at_most(999_999)),  # the test rooms have larger ones
        (
            "data.scenes_per_batch data.questions_per_scene data.question_length "
            "data.answer_length data.max_boxes data.rows_per_scene data.row_length "
            "data.rooms_images",
            *at_most(MOST_SIZE),
        ),
        ("data.workers", *at_most(1024)),
        ("train.steps train.epochs", *at_most(2**31 - 1)),  # steps are counted in 32 bits
        ("data.root data.export data.rgbd tokenizer init_from eval.blind", *PATH),
        ("data.rooms_scenes", *at_least(4)),  # fewer have no val or no test split
        ("optimizer.learning_rate optimizer.clip_norm", *POSITIVE),
        # Their own errors name the bad part.
        ("data.mixture", lambda v, _: parse_mixture(v) is not None, "weights"),
        (
            "data.fraction",
            lambda v, _: bool(parse_fraction(v)) if isinstance(v, str) else 0 < v <= 1,
            "in (0, 1]",
        ),
        ("data.min_learned", lambda v, _: 0 <= v <= 1, "in [0, 1]"),
        ("mesh", lambda v, _: all(x >= -1 for x in v), "sizes of data, fsdp, model"),
        (
            "train.microbatches",
            lambda v, c: c.data.scenes_per_batch % v == 0,
            "a divisor of data.scenes_per_batch",
        ),
    )
    """Rules of every system; a subclass appends its own, and a system may have more."""

    def __post_init__(self):
        for names, holds, rule in (*self.RULES, *self.system.rules):
            for name in names.split():
                value = operator.attrgetter(name)(self)
                if not holds(value, self):
                    raise refusal(name, value, rule)

    @property
    def answer_field(self) -> str:
        """The field of a question's record that is learned."""
        if self.system.learns_rationales:
            return "rationale"
        return {"truth": "answer", "teacher": "teacher_answer"}[self.eval.reference]

    def controls(self, tokenizer: "Vocabulary") -> tuple[int, int] | None:
        """Returns the ids of the control tokens; None: numbers are written as text."""
        if not self.system.has_controls(self):
            return None
        return tokenizer.id_of(REG), tokenizer.id_of(BOX)

    @property
    @abc.abstractmethod
    def dtype(self) -> Dtype:
        """The dtype of the decoder's activations."""

    @property
    def depth_ratio(self) -> int:
        """Cells of the target depth along a side of a patch."""
        return 1

    @property
    def teacher_logits(self) -> bool:
        """True if the teacher's logits are read with its answers."""
        return False

    def with_scenes(self, count: int) -> Self:
        """Returns the same settings with another number of scenes in a batch."""
        data = dataclasses.replace(self.data, scenes_per_batch=count)
        return dataclasses.replace(self, data=data)

    def begun(self) -> Self:
        """Returns the settings of a run that has begun: the check of `data.min_learned` is over."""
        return dataclasses.replace(self, data=dataclasses.replace(self.data, min_learned=0.0))


def refusal(name: str, value: Any, rule: str) -> UserError:
    """Returns the error for a field whose value breaks a rule."""
    text = str(value) if value != "" else repr(value)
    shown = text if len(text) <= 200 else f"{text[:197]}..."
    return UserError(f"config: {name}: {shown} is not {rule}")


# --- Systems --------------------------------------------------------------------------------------


class Nouns(Protocol):
    """The part of an export that a model's sizes depend on."""

    @property
    def categories(self) -> Sequence[str]:
        """Names of the categories."""
        ...


class Vocabulary(Protocol):
    """The part of a tokenizer that a model's sizes depend on."""

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""
        ...

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text."""
        ...

    def id_of(self, token: str) -> int:
        """Returns the id of a token."""
        ...


class Shaped(Protocol):
    """The part of a pipeline that a model's sizes depend on."""

    @property
    def shapes(self) -> SceneShapes:
        """Shapes of a scene's arrays."""
        ...


@dataclasses.dataclass(frozen=True)
class TokenizerRules:
    """How a system makes its tokenizer.

    Attributes:
        trained: tokens added to a tokenizer that is trained on the questions.
        given: tokens added to the folder that a configuration names. A folder to which none are
            added is shared: it is read where it lies, and not kept with the run.
        reads_rationales: rationales and questions about boxes are training texts, too.
    """

    trained: tuple[str, ...] = ()
    given: tuple[str, ...] = ()
    reads_rationales: bool = False

    @property
    def shares_folder(self) -> bool:
        """True if a folder that the configuration names is used as it is."""
        return not self.given


S = TypeVar("S", bound=Settings)


@dataclasses.dataclass(frozen=True)
class System(Generic[S]):
    """A system that a configuration can name; `runs.systems.SYSTEMS` has them all.

    Rooms above `runs` have tables of their own, whose keys are `settings` (`results.systems`,
    `plan.described`).

    Attributes:
        name: the value of `config.system`.
        settings: the class of its settings, with their rules.
        make_objective: returns the objective; sizes come from the settings and the data.
        tokenizer: how its tokenizer is made.
        rules: rules beside those of `settings`.
        learns_rationales: the text that is learned is a question's rationale, not its answer.
        learned: names of the parts that have learned when its training ends, which another run may
            start from; empty: no run can.
        check_start: raises a UserError if `learned`, of where a run starts from, lacks a part that
            must have learned.
        starts_fresh: False if a run must start from another run or from pretrained folders.
        has_controls: returns whether control tokens stand for numbers and boxes.
        has_thinking_tokens: answers come with decoded thinking tokens.
        reads_true_boxes: true boxes stand before its text, so the model cannot be published.
    """

    name: str
    settings: type[S]
    make_objective: Callable[[S, Nouns, Vocabulary, Shaped], Objective]
    tokenizer: TokenizerRules
    rules: tuple[Rule, ...] = ()
    learns_rationales: bool = False
    learned: frozenset[str] = frozenset()
    check_start: Callable[[S, frozenset[str]], None] = lambda *_: None
    starts_fresh: bool = True
    has_controls: Callable[[S], bool] = lambda _: False
    has_thinking_tokens: bool = False
    reads_true_boxes: bool = False
