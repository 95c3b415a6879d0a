"""Batches of scenes with their questions, as a pure function of (seed, step).

Scenes are read straight from the export's safetensors, questions from the ArrayRecord that
`question_records` made. Batches depend on no other state: a run that stops at step k continues with
`iterate(k, ...)`, with any number of workers, and gets the same batches.
"""

import functools
import itertools
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

from geode_jax.data.control import BOX
from geode_jax.data.kinds import check_known
from geode_jax.data.mixture import (
    check_sources,
    choose_scenes,
    scenes_per_epoch,
    stratified_part,
)
from geode_jax.data.packing import pack
from geode_jax.data.question_arrays import (
    TEACHER_LOGITS,
    add_teacher_logits,
    lay_out_questions,
    stack_questions,
)
from geode_jax.data.question_records import (
    ANSWER_FIELDS,
    answer_lengths,
    open_question_records,
    question_lengths,
)
from geode_jax.data.scene_arrays import (
    SceneShapes,
    batch_rows,
    empty_rows,
    export_sizes,
    scene_tensors,
    stack_rows,
)
from geode_jax.data.settings import PipelineConfig
from geode_jax.data.tokens import Tokenizer
from geode_jax.errors import UserError
from geode_jax.exports import Export, ExportError
from geode_jax.exports.prompts import prompt
from geode_jax.runtime.distributed import is_main
from geode_jax.shapes import Batch
from geode_jax.targets import left_out

_CACHE_BYTES = 256 * 2**20  # of tokenized questions, per process
_SCENE_ORDER, _QUESTION_DRAW, _EVAL_SCENES, _SCENE_CHOICE = range(4)  # independent streams


class OneScene(NamedTuple):
    """A scene's tensors, and its rows of a batch of one."""

    tensors: dict[str, np.ndarray]
    rows: dict[str, np.ndarray]


QUESTION_TARGETS = "objects, relation or value of a question"
TEACHER_RELATION = "teacher_relation of a question"
"""Fields of a question's record that a loss learns from besides its answer."""


class Pipeline:
    """Makes the batches of one split of an export; several threads may call it at the same time.

    Attributes:
        steps_per_epoch: number of steps in which every scene is seen once (up to S - 1 scenes of an
            epoch's order move to the next epoch; scenes of less weight are sampled).
        dropped: {reason: count} of what is left out. Questions: `kind <name>` (of an unwanted kind,
            or answered by a box without control tokens), `source <name>`, `no <field>`, `question
            too long`, `answer too long`, `longer than a packed row`, `outside data.fraction`, `bad
            question`. Others: `boxes beyond max_boxes`, `bad scene`. In training a question whose
            control token has no value to regress (`targets`) is left out, `nothing to regress:
            <why>`; a question answered in words is kept without its value, `value not regressed,
            answer in words kept: <why>`. Further `box of a named object that cannot be encoded`,
            and the counts of `targets.left_out` in the scenes read so far.
        bad_scenes: {scene id: error} of the scenes read so far.
        max_question_length, max_answer_length: longest question and answer of the wanted kinds in
            the split, with bos and eos; questions that do not fit count too.
        shapes: sizes of a batch's scene arrays.
        targets: what losses can learn from: the tensors that any scene of the split has, and
            `QUESTION_TARGETS` and `TEACHER_RELATION` if a used question has such a field.
    """

    def __init__(
        self,
        export: Export,
        tokenizer: Tokenizer,
        config: PipelineConfig,
        split: str,
        kinds: Sequence[str] | None = None,
    ):
        """Opens a split.

        Args:
            export: opened export.
            tokenizer: tokenizer of the run.
            config: settings of the batches.
            split: name of the split.
            kinds: kinds of questions to use; None for all.

        Raises:
            UserError: the split has no question that fits, a weight names no kind, or the teacher's
                logits do not fit the tokenizer.
            ExportError: `questions.jsonl` breaks the contract.
        """
        self.config, self.split, self._tokenizer, self._export = config, split, tokenizer, export
        self.dropped: Counter = Counter()
        self.bad_scenes: dict[str, str] = {}
        self._records = open_question_records(export, config.on_bad_scene)
        self.dropped += Counter({"bad question": len(self._records.dropped)})
        self._choose_questions(kinds)
        sizes = export_sizes(export, config.vision)
        topk = sizes.topk if config.logits else 0
        if topk:
            self._check_logits()
        self.shapes = SceneShapes(
            views=sizes.views,
            grid=export.patch_grid,
            token_width=self._token_width(sizes),
            view_tokens=sizes.view_tokens,
            depth_ratio=config.depth_ratio,
            boxes=config.max_boxes,
            camera_width=self._camera_width(sizes),
            categories=len(export.categories) if sizes.has_detection_probs else 0,
            features=sizes.features,
            depth_bins=sizes.depth_bins,
            topk=topk,
            vision=config.vision,
            token_dtype=self._token_dtype(),
            image=sizes.image,
            points=sizes.points,
            point_width=sizes.point_width,
            point_frames=sizes.point_frames,
        )
        self.targets = frozenset[str]().union(*(sizes.tensors[i] for i in self._scene_ids))
        self.targets |= self._question_targets
        beyond = [max(sizes.box_counts[i] - config.max_boxes, 0) for i in self._scene_ids]
        self.dropped += Counter({"boxes beyond max_boxes": sum(beyond)})
        scenes = scenes_per_epoch(self._scene_weights)
        self.steps_per_epoch = max(1, scenes // config.scenes_per_batch)
        self._questions: dict[int, dict[str, np.ndarray]] = {}
        self._cached_bytes = 0
        self._orders: dict[int, np.ndarray] = {}
        self._counted: set[str] = set()  # scenes whose targets were counted
        self._lock = threading.Lock()

    def _check_logits(self) -> None:
        why, remedy = "", "loss.logits=False trains without them"
        if self._export.manifest.get("teacher_tokenizer") != self._tokenizer.sha256:
            why = (
                "over another vocabulary (manifest teacher_tokenizer is not the sha256 of this "
                "run's tokenizer.json; set the config's tokenizer to the teacher's folder)"
            )
        elif self._records.dropped:
            why = "assigned by question number, which skipped bad questions have shifted"
        if why:
            raise UserError(f"{self._export.folder}: the teacher's logits are {why}; {remedy}")

    def _token_width(self, sizes) -> int:
        if self.config.vision == "vggt/tokens":
            return self._export.token_width
        widths = {"teacher/features": sizes.features, "internvit/tokens": sizes.view_width}
        if not widths.get(self.config.vision, sizes.image[0]):
            missing = f"no scene has {self.config.vision} to train on"
            raise UserError(f"{self._export.folder}: {missing}")
        return widths.get(self.config.vision, 0)

    def _token_dtype(self) -> str:
        # The manifest's dtype is that of VGGT's tokens alone.
        own = {"vggt/tokens": self._export.manifest["dtype"], "internvit/tokens": "bfloat16"}
        return own.get(self.config.vision, "float32")

    def _camera_width(self, sizes) -> int:
        # Camera tokens belong to VGGT's tokens, not to another encoder's features.
        vggt = self.config.vision == "vggt/tokens"
        return self._export.token_width if vggt and sizes.has_camera_tokens else 0

    def _choose_questions(self, kinds: Sequence[str] | None) -> None:
        """Chooses the scenes and questions that are used, and counts the others."""
        config = self.config
        lengths = question_lengths(self._records, self.split, self._tokenizer)
        if not config.asks:
            lengths = lengths | {"question": np.ones_like(lengths["question"])}  # the bos
        kind, source = lengths["kind"], lengths["source"]
        answer = answer_lengths(lengths, config.answer_field, bool(config.controls))
        boxes = lengths["control"] == BOX
        keep = np.ones(len(kind), bool)
        own = set(kind.tolist())
        check_known(config.kind_weights, own, "data: kind_weights")
        absent = sorted(config.kind_weights.keys() - own)
        if absent and is_main():
            has = f"split {self.split} of {self._export.folder} has no questions of these kinds"
            print(f"note: data.kind_weights: {has}: {', '.join(absent)}", flush=True)

        def drop(reason: str, bad: np.ndarray) -> None:
            self.dropped += Counter({reason: int((keep & bad).sum())})
            keep[bad] = False

        for name in sorted(own):
            unwanted = kinds is not None and name not in kinds
            if unwanted or config.kind_weights.get(name, 1) == 0:
                drop(f"kind {name}", kind == name)
            elif not config.controls:
                drop(f"kind {name}", (kind == name) & boxes)
        sources = sorted(set(source.tolist()))
        check_sources(config.source_weights, sources, "data: source_weights")
        for name, weight in config.source_weights.items():
            if weight == 0:
                drop(f"source {name}", source == name)
        wanted = keep.copy()
        drop(f"no {config.answer_field}", answer == 0)
        by_token = bool(config.controls) and config.answer_field == "answer"
        whys = sorted(set(lengths["not_regressed"].tolist()) - {""})
        for why in whys if by_token and self.split == "train" else ():
            drop(f"nothing to regress: {why}", lengths["not_regressed"] == why)
        self.max_question_length = int(lengths["question"].max(where=keep, initial=0))
        self.max_answer_length = int(answer.max(where=keep, initial=0))
        drop("question too long", lengths["question"] > config.question_length)
        drop("answer too long", answer > config.answer_length)
        drop("longer than a packed row", lengths["question"] + answer - 1 > config.row_length)
        fits = keep.copy()
        share: float | np.ndarray
        if isinstance(config.fraction, Mapping):
            check_sources(config.fraction, sources, "data: fraction")
            share = np.array([config.fraction.get(name, 1.0) for name in source.tolist()])
        else:
            share = config.fraction
        if np.min(share) < 1:
            part = stratified_part((source, kind), keep, share, config.seed)
            drop("outside data.fraction", ~part)
        if self.split == "train":  # other splits use every question
            for why in whys:
                left = int((keep & (lengths["not_regressed"] == why)).sum())
                self.dropped += Counter({f"value not regressed, answer in words kept: {why}": left})
            bad_objects = int(lengths["bad_objects"][keep].sum())
            self.dropped += Counter({"box of a named object that cannot be encoded": bad_objects})
        if not keep.any():
            why = ", ".join(f"{n} {reason}" for reason, n in self.dropped.items())
            raise UserError(
                f"{self._export.folder}: no question to use in split {self.split}"
                + (f" ({why})" if why else "")
            )
        if self.split == "train":
            self._refuse_lost_source(source, wanted, fits)
        of_source = np.array([config.source_weights.get(name, 1.0) for name in source.tolist()])
        weights = of_source * [config.kind_weights.get(name, 1.0) for name in kind.tolist()]
        scene_weights = []
        self._scene_ids: list[str] = []
        self._used: list[np.ndarray] = []  # numbers of a scene's used questions, and their weights
        self._weights: list[np.ndarray] = []
        all_ids = self._records.scene_ids(self.split)
        first = np.searchsorted(lengths["scene"], np.arange(len(all_ids) + 1))
        for scene_id, (a, b) in zip(all_ids, itertools.pairwise(first), strict=True):
            if keep[a:b].any():
                self._scene_ids.append(scene_id)
                self._used.append(np.flatnonzero(keep[a:b]))
                self._weights.append(weights[a:b][keep[a:b]])
                scene_weights.append(of_source[a:b][keep[a:b]].max())
        self._scene_weights = np.array(scene_weights) / max(scene_weights)
        named = {"spatial": QUESTION_TARGETS, "teacher_relation": TEACHER_RELATION}
        self._question_targets = {of for name, of in named.items() if lengths[name][keep].any()}

    def _refuse_lost_source(self, source: np.ndarray, wanted: np.ndarray, fits: np.ndarray) -> None:
        """Refuses a data set of which too few of the wanted questions can be learned.

        Args:
            source: strings [n], the data set of each question.
            wanted: bool [n], the questions that no setting leaves out.
            fits: bool [n], those of them that can be learned.

        Raises:
            UserError: their share is below `min_learned` in one of the data sets.
        """
        for name in sorted(set(source[wanted].tolist())):
            total = int((source[wanted] == name).sum())
            learned = int((source[fits] == name).sum())
            if learned < self.config.min_learned * total:
                whys = ", ".join(f"{n} {why}" for why, n in self.dropped.items() if n)
                raise UserError(
                    f"{self._export.folder}: data set {name}: only {learned} of {total} training "
                    f"questions can be learned (left out in all data sets: {whys}); "
                    f"data.mixture={name}=0 leaves the data set out, and data.min_learned=0 "
                    "trains on what is left"
                )

    # --- The order: pure functions of the seed ----------------------------------------------------

    def _random(self, *stream: int) -> np.random.Generator:
        return np.random.default_rng((self.config.seed, *stream))

    def _order(self, epoch: int) -> np.ndarray:
        """Returns the scenes of an epoch in order; a permutation if all have the same weight."""
        with self._lock:
            if epoch not in self._orders:
                if len(self._orders) > 2:
                    self._orders.clear()
                scenes = np.arange(len(self._scene_ids))
                if (self._scene_weights < 1).any():
                    scenes = choose_scenes(self._scene_weights, self._random(_SCENE_CHOICE, epoch))
                self._orders[epoch] = self._random(_SCENE_ORDER, epoch).permutation(scenes)
            return self._orders[epoch]

    def _draw(self, epoch: int, scene: int, round_: int) -> np.ndarray:
        """Returns the scene's questions in the order in which they are packed.

        Weighted sampling without replacement: questions are sorted by exponential times with the
        weights as rates (Efraimidis & Spirakis 2006). If an epoch has fewer scenes than a batch, a
        scene comes in several rounds, which continue in the same order.
        """
        weights = self._weights[scene]
        times = self._random(_QUESTION_DRAW, epoch, scene).exponential(size=len(weights))
        order = np.argsort(times / weights)
        q = self.config.questions_per_scene
        return np.roll(order, -round_ * q) if len(order) > q else order

    def batch(self, step: int, rows: slice | None = None) -> Batch:
        """Returns the batch of a global step.

        Args:
            step: global step, from 0.
            rows: the scenes of the batch to make (`slice(a, b)`); None for all.

        Returns:
            A `Batch` of numpy arrays.

        Raises:
            ExportError: a scene breaks the contract and `on_bad_scene` is "stop".
            UserError: every scene is bad.
        """
        epoch, in_epoch = divmod(step, self.steps_per_epoch)
        order = self._order(epoch)
        found = []
        for slot in range(self.config.scenes_per_batch)[rows or slice(None)]:
            position = in_epoch * self.config.scenes_per_batch + slot
            round_, position = divmod(position, len(order))
            scene, tensors = self._read_good(np.roll(order, -position))
            placed = self._place(scene, self._draw(epoch, scene, round_))
            questions = self._question_rows(scene, placed, tensors)
            found.append((batch_rows(tensors, self.shapes), questions))
        return _stacked(found)

    # --- Reading ----------------------------------------------------------------------------------

    def _read_good(self, candidates: Iterable[int]) -> tuple[int, dict[str, np.ndarray]]:
        """Returns the first of the candidates that can be read, and its tensors."""
        for scene in candidates:
            tensors = self._read_scene(int(scene))
            if tensors is not None:
                return int(scene), tensors
        raise UserError(f"{self._export.folder}: every scene of split {self.split} is bad")

    def _read_scene(self, scene: int) -> dict[str, np.ndarray] | None:
        scene_id = self._scene_ids[scene]
        if scene_id in self.bad_scenes:
            return None
        try:
            return self._read_tensors(scene_id)
        except ExportError as error:
            if self.config.on_bad_scene == "stop":
                raise
            with self._lock:
                self.bad_scenes[scene_id] = str(error)
                self.dropped["bad scene"] = len(self.bad_scenes)
            return None

    def _read_tensors(self, scene_id: str) -> dict[str, np.ndarray]:
        tensors = self._export.read_scene(scene_id, scene_tensors(self.config.vision))
        if self.config.vision not in tensors:
            raise ExportError(f"scene {scene_id}", f"tensor {self.config.vision}", "missing")
        if scene_id not in self._counted:
            found = left_out(tensors)
            with self._lock:
                if scene_id not in self._counted:
                    self._counted.add(scene_id)
                    self.dropped += found
        return tensors

    def _question_arrays(self, scene: int) -> dict[str, np.ndarray]:
        """Returns the used questions of a scene as arrays [n, ...], cached for later epochs."""
        arrays = self._questions.get(scene)
        if arrays is None:
            config = self.config
            arrays = stack_questions(
                self._used_records(scene),
                self._tokenizer,
                config.question_length,
                config.answer_length,
                config.answer_field,
                config.controls,
                config.asks,
            )
            if self.shapes.topk:
                tensors = self._export.read_scene(self._scene_ids[scene], TEACHER_LOGITS)
                add_teacher_logits(arrays, tensors, self._used[scene], self.shapes.topk)
            size = sum(array.nbytes for array in arrays.values())
            with self._lock:
                if self._cached_bytes + size <= _CACHE_BYTES:
                    self._cached_bytes += size
                    self._questions[scene] = arrays
        return arrays

    def _used_records(self, scene: int) -> list[dict]:
        records = self._records.read(self._scene_ids[scene])
        return [records[i] for i in self._used[scene]]

    def _place(self, scene: int, candidates, *, in_order: bool = False) -> list[tuple]:
        """Places questions of a scene in its packed rows; see `packing.pack`."""
        arrays, config = self._question_arrays(scene), self.config
        return pack(
            candidates,
            arrays["question_length_SQ"],
            arrays["answer_length_SQ"],
            config.rows_per_scene,
            config.row_length,
            config.questions_per_scene,
            in_order=in_order,
        )

    def _question_rows(self, scene: int, placed: list[tuple], tensors) -> dict[str, np.ndarray]:
        """Returns the rows of Q questions of a scene; see `lay_out_questions`."""
        config = self.config
        return lay_out_questions(
            self._question_arrays(scene),
            placed,
            tensors,
            config.questions_per_scene,
            config.rows_per_scene,
            config.row_length,
            self._tokenizer.pad_id,
        )

    def one_scene(self, scene_id: str) -> OneScene:
        """Reads a scene of any split for `one_question`.

        Raises:
            ExportError: the scene is unknown or breaks the contract.
        """
        tensors = self._read_tensors(scene_id)
        return OneScene(tensors, stack_rows([batch_rows(tensors, self.shapes)]))

    def one_question(self, record: Mapping[str, Any], scene: OneScene) -> Batch:
        """Returns a batch of one scene and one question about it, without an answer.

        The question need not be in the export. The configured length is doubled until it fits.

        Args:
            record: `kind`, `question`, and optionally `options` and `unit`.
            scene: result of `one_scene`.
        """
        record = {**record, **dict.fromkeys(ANSWER_FIELDS, "")}
        tokenizer, config = self._tokenizer, self.config
        length, answer = config.question_length, config.answer_length
        while length < 1 + len(tokenizer.encode(prompt(record))):
            length *= 2
        arrays = stack_questions(
            [record], tokenizer, length, answer, config.answer_field, asks=config.asks
        )
        columns, pad_id = length + answer, tokenizer.pad_id
        questions = lay_out_questions(arrays, [(0, 0)], scene.tensors, 1, 1, columns, pad_id)
        rows = {name: array[None] for name, array in questions.items()}
        return Batch(**scene.rows, **rows)

    # --- Iterating --------------------------------------------------------------------------------

    def iterate(
        self, start_step: int, num_steps: int, rows: slice | None = None
    ) -> Iterator[tuple[int, Batch]]:
        """Yields (step, batch) from `start_step`, prepared ahead by grain.

        Batches and their order do not depend on `workers`.

        Args:
            start_step: first global step.
            num_steps: number of steps.
            rows: as in `batch`.

        Raises:
            ExportError, UserError: as `batch`.
        """
        # Threads, because grain's processes would copy each batch (100 MB of VGGT's tokens) twice
        # more. One more batch than workers keeps every worker busy.
        workers = self.config.workers
        reading = grain.ReadOptions(num_threads=workers, prefetch_buffer_size=workers + 1)
        steps = grain.MapDataset.range(start_step, start_step + num_steps)
        batches = steps.map(lambda step: self.batch(int(step), rows)).to_iter_dataset(reading)
        iterator = iter(batches)
        try:
            yield from enumerate(iterator, start=start_step)
        finally:
            iterator.close()  # ends its threads

    def question_count(self, max_scenes: int | None = None) -> int:
        """Returns how many questions `eval_batches` yields, those of bad scenes included."""
        return sum(len(used) for used in self._used[:max_scenes])

    def eval_batches(
        self,
        max_scenes: int | None = None,
        seed: int | None = None,
        *,
        shuffled: bool = False,
        rows: slice | None = None,
        first: int = 0,
    ) -> Iterator[tuple[list[list[dict]], Batch]]:
        """Yields batches with every question of the split's scenes once, in order.

        A row of a batch holds a scene and up to Q of its questions; a scene with more takes
        several rows. The last batch is filled with rows that hold no question.

        Args:
            max_scenes: largest number of scenes; None for all.
            seed: seed of the choice and order of the scenes; None takes the first ones, sorted.
            shuffled: whether every scene gets the questions of the next one (the last scene those
                of the first).
            rows: the scenes of every batch to make; None for all.
            first: number of batches to skip, unread.

        Yields:
            The records of every row (one list per row, in the order of the batch), and the batch
            of the wanted rows.
        """
        order = np.arange(len(self._scene_ids))
        if seed is not None:
            order = np.random.default_rng((seed, _EVAL_SCENES)).permutation(order)
        order = order[:max_scenes]
        wanted = range(self.config.scenes_per_batch)[rows or slice(None)]
        found, arrays, skipped = [], [], 0
        for records, make in self._eval_rows(order, shuffled):
            if len(found) in wanted and skipped == first:
                arrays.append(make())
            found.append(records)
            if len(found) == self.config.scenes_per_batch:
                if skipped == first:
                    yield found, _stacked(arrays)
                else:
                    skipped += 1
                found, arrays = [], []
        if found and skipped == first:
            empty = (empty_rows(self.shapes), self._question_rows(int(order[0]), [], {}))
            while len(found) < self.config.scenes_per_batch:
                if len(found) in wanted:
                    arrays.append(empty)
                found.append([])
            yield found, _stacked(arrays)

    def _eval_rows(self, order: np.ndarray, shuffled: bool) -> Iterator[tuple]:
        """Yields the records of every row and a function that makes its scene and question arrays.

        Scenes in the rows of other processes are read only with `on_bad_scene` "skip", to check
        whether they are left out.
        """
        beside = np.roll(order, int(shuffled))
        for scene, other in zip(order.tolist(), beside.tolist(), strict=True):
            read = functools.cache(self._read_scene)
            if self.config.on_bad_scene == "skip" and (read(scene) is None or read(other) is None):
                continue
            records = self._used_records(scene)
            start = 0
            while start < len(records):
                placed = self._place(scene, range(start, len(records)), in_order=True)

                def make(placed=placed, scene=scene, other=other, read=read):
                    own, seen = read(scene), read(other)
                    assert own is not None and seen is not None  # bad scenes were left out above
                    rows = self._question_rows(scene, placed, own)
                    return batch_rows(seen, self.shapes), rows

                own = records[start : start + len(placed)]
                start += len(placed)
                yield own, make


def _stacked(rows: Sequence[tuple[dict, dict]]) -> Batch:
    """Returns rows of scenes and of their questions as one batch."""
    scenes, questions = zip(*rows, strict=True)
    return Batch(**stack_rows(scenes), **stack_rows(questions))
