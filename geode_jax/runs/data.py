"""The data of a run: its export, tokenizer and pipelines."""

from collections.abc import Iterable
from pathlib import Path

from geode_jax.data.control import BOX, REG, control_of
from geode_jax.data.mixture import parse_mixture
from geode_jax.data.pipeline import Pipeline
from geode_jax.data.question_records import open_question_records
from geode_jax.data.settings import PipelineConfig, measure_lengths
from geode_jax.data.tokens import Tokenizer, load_tokenizer, train_tokenizer
from geode_jax.errors import UserError
from geode_jax.exports import Export
from geode_jax.exports.prompts import prompt
from geode_jax.models.internvl import INTERNVL_TOKENS
from geode_jax.runs import systems
from geode_jax.runs.identity import load_run_tokenizer, open_run
from geode_jax.runs.start import pretrained_folders
from geode_jax.runtime.distributed import is_main
from geode_jax.training.checkpoint_files import has_checkpoint

MIN_PIECE_COUNT = 50
"""A run of words that occurs less often in the training texts is no token of its own."""


def prepare_tokenizer(config, export: Export, workdir: Path) -> Tokenizer:
    """The run's tokenizer: the folder in the config, or one trained on the training questions.

    GEODE's has the control tokens, and learns rationales and questions about boxes too, which the
    student is not asked. A run that starts from another takes over its tokenizer.
    """
    folder = workdir / "tokenizer"
    # Without a checkpoint nothing has learned its tokens, and what they were made of may differ.
    made = has_checkpoint(workdir) or not is_main()
    if made and (folder / "tokenizer.json").exists():
        return load_tokenizer(folder)
    geode = config.system in systems.GEODE_STAGES
    if geode and config.init_from and not pretrained_folders(config.init_from):
        start = Path(config.init_from)
        tokenizer = load_run_tokenizer(start / "tokenizer", open_run(start)[1])
    elif config.tokenizer:
        tokenizer = load_tokenizer(config.tokenizer)
        if not geode:
            return tokenizer
        tokenizer = tokenizer.with_tokens((*INTERNVL_TOKENS, REG, BOX))
    else:
        records = open_question_records(export, config.data.on_bad_scene)
        tokenizer = _train_tokenizer(records.of_split("train"), export.categories, geode)
    tokenizer.save(folder)
    return tokenizer


def _train_tokenizer(records: Iterable[dict], nouns: list[str], geode: bool) -> Tokenizer:
    texts = []
    for record in records:
        if geode:
            texts += [prompt(record), " " + record["answer"], " " + record.get("rationale", "")]
        elif control_of(record) != BOX:
            texts += [prompt(record), " " + record["answer"]]
    count = min(MIN_PIECE_COUNT, max(2, len(texts) // 1000))
    tokenizer = train_tokenizer(texts, nouns, min_count=count)
    return tokenizer.with_tokens((REG, BOX)) if geode else tokenizer


def pipeline_config(config, export: Export, tokenizer: Tokenizer) -> PipelineConfig:
    """What training batches look like; lengths of 0 are measured on the train split."""
    data = config.data
    field, controls = systems.answer_field(config), systems.controls(config, tokenizer)
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
        seed=config.seed,
        workers=data.workers,
        on_bad_scene=data.on_bad_scene,
        answer_field=field,
        controls=controls,
        kind_weights=data.kind_weights.to_dict(),
        source_weights=parse_mixture(data.get("mixture", "")),
        fraction=data.get("fraction", 1.0),
        logits=config.loss.get("logits", False),
        depth_ratio=config.model.get("depth_cells", 1),
        vision=data.vision,
    )


def make_pipelines(config, export: Export, tokenizer: Tokenizer) -> dict[str, Pipeline]:
    """Pipelines of the train, val and test splits."""
    common = pipeline_config(config, export, tokenizer)
    splits = {"train": "train", "val": "val", "test": test_split(export)}
    # Evaluation asks every question once: how often training draws one plays no part.
    asked = common.asking_all()
    return {
        name: Pipeline(export, tokenizer, common if name == "train" else asked, split)
        for name, split in splits.items()
    }


def test_split(export: Export) -> str:
    """The split that is scored: val where an export has no test."""
    return "test" if export.scene_ids("test") else "val"
