"""The data of a run: its export, tokenizer and pipelines."""

from collections.abc import Iterable
from pathlib import Path

from geode_jax.data.control import BOX, control_of
from geode_jax.data.mixture import parse_fraction, parse_mixture
from geode_jax.data.pipeline import Pipeline
from geode_jax.data.question_records import open_question_records
from geode_jax.data.settings import PipelineConfig, measure_lengths
from geode_jax.data.tokens import Tokenizer, load_tokenizer, train_tokenizer
from geode_jax.errors import UserError
from geode_jax.exports import Export
from geode_jax.exports.prompts import prompt
from geode_jax.runs.identity import load_run_tokenizer, open_run
from geode_jax.runs.settings import Settings, TokenizerRules
from geode_jax.runs.start import pretrained_folders
from geode_jax.runtime.distributed import is_main
from geode_jax.training.checkpoint_files import has_checkpoint

MIN_PIECE_COUNT = 50
"""A run of words that occurs less often in the training texts is no token of its own."""


def prepare_tokenizer(settings: Settings, export: Export, workdir: Path) -> Tokenizer:
    """Returns the run's tokenizer: the configured folder, or one trained on the training questions.

    GEODE's has the control tokens, and learns rationales and questions about boxes, too, which the
    student is not asked. A run that starts from another takes over its tokenizer.
    """
    folder = workdir / "tokenizer"
    # Without a checkpoint nothing has learned its tokens, and its training texts may differ.
    made = has_checkpoint(workdir) or not is_main()
    if made and (folder / "tokenizer.json").exists():
        return load_tokenizer(folder)
    rules = settings.system.tokenizer
    if settings.init_from and not pretrained_folders(settings.init_from):
        start = Path(settings.init_from)
        tokenizer = load_run_tokenizer(start / "tokenizer", open_run(start)[1])
    elif settings.tokenizer:
        tokenizer = load_tokenizer(settings.tokenizer)
        if rules.shares_folder:
            return tokenizer
        tokenizer = tokenizer.with_tokens(rules.given)
    else:
        records = open_question_records(export, settings.data.on_bad_scene)
        tokenizer = _train_tokenizer(records.of_split("train"), export.categories, rules)
    tokenizer.save(folder)
    return tokenizer


def _train_tokenizer(records: Iterable[dict], nouns: list[str], rules: TokenizerRules) -> Tokenizer:
    texts = []
    for record in records:
        if rules.reads_rationales:
            texts += [prompt(record), " " + record["answer"], " " + record.get("rationale", "")]
        elif control_of(record) != BOX:
            texts += [prompt(record), " " + record["answer"]]
    count = min(MIN_PIECE_COUNT, max(2, len(texts) // 1000))
    tokenizer = train_tokenizer(texts, nouns, min_count=count)
    return tokenizer.with_tokens(rules.trained) if rules.trained else tokenizer


def pipeline_config(settings: Settings, export: Export, tokenizer: Tokenizer) -> PipelineConfig:
    """Returns what training batches look like; lengths of 0 are measured on the train split."""
    data, field, controls = settings.data, settings.answer_field, settings.controls(tokenizer)
    question, answer = data.question_length, data.answer_length
    if not (question and answer):
        longest = measure_lengths(export, tokenizer, "train", answer_field=field, controls=controls)
        if not longest:
            raise UserError(f"{export.folder}: no question of the train split has a {field}")
        question = question or longest.question
        answer = answer or longest.answer
    return PipelineConfig(
        export=str(export.folder),
        scenes_per_batch=data.scenes_per_batch,
        questions_per_scene=data.questions_per_scene,
        question_length=question,
        answer_length=answer,
        max_boxes=data.max_boxes,
        rows_per_scene=data.rows_per_scene,
        row_length=data.row_length,
        seed=settings.seed,
        workers=data.workers,
        on_bad_scene=data.on_bad_scene,
        answer_field=field,
        asks_rationales=data.asks_rationales,
        controls=controls,
        kind_weights=data.kind_weights,
        source_weights=parse_mixture(data.mixture),
        fraction=parse_fraction(data.fraction),
        min_learned=data.min_learned,
        logits=settings.teacher_logits,
        depth_ratio=settings.depth_ratio,
        vision=data.vision,
    )


def make_pipelines(settings: Settings, export: Export, tokenizer: Tokenizer) -> dict[str, Pipeline]:
    """Returns the pipelines of the train, val and test splits."""
    common = pipeline_config(settings, export, tokenizer)
    splits = {"train": "train", "val": "val", "test": test_split(export)}
    # Evaluation asks every question once, however often training draws it.
    whole = common.asking_all()
    return {
        name: Pipeline(export, tokenizer, common if name == "train" else whole, split)
        for name, split in splits.items()
    }


def test_split(export: Export) -> str:
    """Returns the split that is scored: val where an export has no test."""
    return "test" if export.scene_ids("test") else "val"
