import dataclasses
from collections import Counter

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from geode_jax.data.mixture import (
    OWN,
    choose_scenes,
    parse_fraction,
    parse_mixture,
    scenes_per_epoch,
    stratified_part,
)
from geode_jax.data.pipeline import Pipeline
from geode_jax.data.settings import PipelineConfig
from geode_jax.data.tokens import Tokenizer, train_tokenizer
from geode_jax.errors import UserError
from geode_jax.exports import Export, ExportWriter
from geode_jax.runs.config import make_settings
from geode_jax.runs.config_file import read_settings
from tests.helpers.batches import asked
from tests.helpers.exports import HEADER, TOKEN_WIDTH
from tests.helpers.runs import tiny_config

SOURCES = {"both": ("a", "b", None), "only_a": ("a",), "only_b": ("b",), "own": (None,)}
"""Sort of scene -> sources of its questions, ten of each kind of each."""
EPOCHS = 600


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> Export:
    """Four scenes of each sort."""
    folder = tmp_path_factory.mktemp("mixed") / "export"
    with ExportWriter(folder, **HEADER) as writer:
        for sort, sources in SOURCES.items():
            for i in range(4):
                scene_id = f"{sort}_{i}"
                number = 4 * list(SOURCES).index(sort) + i
                tokens = np.full((1, 6, TOKEN_WIDTH), number, np.float32)
                writer.add_scene(scene_id, {"vggt/tokens": tokens}, split="train")
                writer.add_questions(
                    {
                        "id": f"{scene_id}_{source}_{kind}_{n}",
                        "scene_id": scene_id,
                        "kind": kind,
                        "question": f"{source or OWN} {kind} {n}",
                        "answer": f"{n}",
                    }
                    | ({"source": source} if source else {})
                    for source in sources
                    for kind in ("x", "y")
                    for n in range(10)
                )
    return Export(folder)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["a b own x y 0 1 2 3 4 5 6 7 8 9"], [], min_count=1)


@pytest.fixture(scope="module")
def config(mixed) -> PipelineConfig:
    return PipelineConfig(str(mixed.folder), 1, 1, 12, 4, 0, 1, 16, seed=3)


def numbers(pipeline: Pipeline, epoch: int) -> list[int]:
    """The scenes of an epoch in order, by the numbers that the fixture `mixed` gave them."""
    first = epoch * pipeline.steps_per_epoch
    batches = (pipeline.batch(first + step) for step in range(pipeline.steps_per_epoch))
    return [int(batch.vision_SVPC.flat[0]) for batch in batches]


def drawn(pipeline: Pipeline, tokenizer: Tokenizer, epochs: int) -> Counter:
    """(sort of scene, source, kind) of the question of every scene of many epochs."""
    found: Counter = Counter()
    for epoch in range(epochs):
        seen = set()
        for step in range(pipeline.steps_per_epoch):
            batch = pipeline.batch(epoch * pipeline.steps_per_epoch + step)
            (((question, _),),) = asked(batch, tokenizer)
            number = int(batch.vision_SVPC.flat[0])
            source, kind, _ = question.split()
            found[list(SOURCES)[number // 4], source, kind] += 1
            seen.add(number)
        assert len(seen) == pipeline.steps_per_epoch
    return found


def test_weights_of_sources_and_kinds_give_their_proportions(mixed, tokenizer, config):
    weights = {"source_weights": {"a": 3.0, "b": 0.75}, "kind_weights": {"y": 0.5}}
    pipeline = Pipeline(mixed, tokenizer, dataclasses.replace(config, **weights), "train")
    # Scenes with "a" weigh 3, with "b" alone 0.75, the own ones 1: 8 + 4 / 4 + 4 / 3 a epoch.
    assert pipeline.steps_per_epoch == 10
    found = drawn(pipeline, tokenizer, EPOCHS)
    total = sum(found.values())
    share = 10 / (8 + 1 + 4 / 3)  # of what the weights say, for whole scenes

    def seen(sort: str, source: str | None = None, kind: str | None = None) -> float:
        return sum(
            n
            for (s, o, k), n in found.items()
            if s == sort and source in (None, o) and kind in (None, k)
        )

    for sort, scenes in (("both", 4), ("only_a", 4), ("only_b", 1), ("own", 4 / 3)):
        assert seen(sort) / EPOCHS == pytest.approx(scenes * share, rel=0.03)
    for source, weight in (("a", 3.0), ("b", 0.75), ("own", 1.0)):
        assert seen("both", source) / seen("both") == pytest.approx(weight / 4.75, abs=0.03)
    assert sum(n for (*_, kind), n in found.items() if kind == "y") / total == pytest.approx(
        1 / 3, abs=0.03
    )


def test_without_weights_every_epoch_is_a_permutation_of_all_scenes(mixed, tokenizer, config):
    pipeline = Pipeline(mixed, tokenizer, config, "train")
    assert pipeline.steps_per_epoch == 16
    alike = dataclasses.replace(config, source_weights={"a": 2, "b": 2, "own": 2})
    same = Pipeline(mixed, tokenizer, alike, "train")
    for epoch in range(3):
        # As numpy draws it: published runs depend on it.
        expected = np.random.default_rng((3, 0, epoch)).permutation(16)
        scenes = [sorted(mixed.scene_ids("train"))[i] for i in expected]
        expected = [4 * list(SOURCES).index(name[:-2]) + int(name[-1]) for name in scenes]
        assert numbers(pipeline, epoch) == numbers(same, epoch) == expected


def test_a_source_of_weight_0_is_never_drawn_and_counted(mixed, tokenizer, config):
    none = dataclasses.replace(config, source_weights={"a": 0.0, "own": 0.0})
    pipeline = Pipeline(mixed, tokenizer, none, "train")
    assert pipeline.dropped == {"source a": 160, "source own": 160}
    assert {sort for sort, *_ in drawn(pipeline, tokenizer, 3)} == {"both", "only_b"}
    assert not Pipeline(mixed, tokenizer, none.asking_all(), "train").dropped


def test_a_source_that_is_not_there_is_refused(mixed, tokenizer, config):
    wrong = dataclasses.replace(config, source_weights={"scanqs": 2.0})
    with pytest.raises(UserError, match="scanqs: the questions are of a, b, own"):
        Pipeline(mixed, tokenizer, wrong, "train")
    wrong = dataclasses.replace(config, fraction={"s-mit": 0.5})
    with pytest.raises(UserError, match="data: fraction: s-mit: the questions are of a, b, own"):
        Pipeline(mixed, tokenizer, wrong, "train")


def used(pipeline: Pipeline) -> list[dict]:
    return [record for rows, _ in pipeline.eval_batches() for row in rows for record in row]


def test_a_fraction_has_the_same_share_of_every_source_and_kind(mixed, tokenizer, config):
    tenth = dataclasses.replace(config, fraction=0.1)
    pipeline = Pipeline(mixed, tokenizer, tenth, "train")
    records = used(pipeline)
    strata = Counter((record.get("source"), record["kind"]) for record in records)
    assert strata == {(s, k): 8 for s in ("a", "b", None) for k in "xy"}
    assert pipeline.dropped == {"outside data.fraction": 480 - 48}
    again = used(Pipeline(mixed, tokenizer, tenth, "train"))
    other = used(Pipeline(mixed, tokenizer, dataclasses.replace(tenth, seed=4), "train"))
    ids = {record["id"] for record in records}
    assert ids == {record["id"] for record in again} != {record["id"] for record in other}
    # Of one data set alone, the same questions as above; the others are whole.
    apart = dataclasses.replace(config, fraction={"a": 0.1, "own": 0.5})
    of_each = used(Pipeline(mixed, tokenizer, apart, "train"))
    assert Counter((record.get("source"), record["kind"]) for record in of_each) == {
        ("a", "x"): 8, ("a", "y"): 8, ("b", "x"): 80, ("b", "y"): 80, (None, "x"): 40,
        (None, "y"): 40,
    }  # fmt: skip
    assert {r["id"] for r in of_each if r.get("source") == "a"} < ids
    assert len(used(Pipeline(mixed, tokenizer, apart.asking_all(), "train"))) == 480
    fifth = dataclasses.replace(config, fraction=0.2)
    larger = used(Pipeline(mixed, tokenizer, fifth, "train"))
    assert ids < {record["id"] for record in larger}


@given(
    st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from("xyz"), st.booleans()), min_size=1),
    st.floats(0.01, 1.0),
    st.integers(0, 5),
)
def test_a_stratified_part_is_of_the_kept_rows(rows, fraction, seed):
    a, b, keep = (np.array(column) for column in zip(*rows, strict=True))
    part = stratified_part((a, b), keep, fraction, seed)
    assert not (part & ~keep).any()
    for stratum in set(zip(a.tolist(), b.tolist(), strict=True)):
        inside = (a == stratum[0]) & (b == stratum[1])
        there = int((inside & keep).sum())
        assert (part & inside).sum() == (max(1, round(fraction * there)) if there else 0)


@given(st.lists(st.floats(1e-3, 1.0), min_size=1, max_size=30), st.integers(0, 9))
def test_chosen_scenes_are_different_and_of_one_number(weights, seed):
    weights = np.array([*weights, 1.0])
    chosen = choose_scenes(weights, np.random.default_rng(seed))
    assert len(set(chosen.tolist())) == len(chosen) == scenes_per_epoch(weights) >= 1


def test_mixtures_are_read():
    assert parse_mixture("") == {}
    assert parse_mixture("scanqa=2,vica-thinking=0.5,own=0") == {
        "scanqa": 2.0,
        "vica-thinking": 0.5,
        "own": 0.0,
    }
    for bad in ("scanqa", "scanqa=", "=1", "a=-1", "a=nan", "a=inf", "a=1,a=2", "a=x"):
        with pytest.raises(UserError, match="is not SOURCE=WEIGHT"):
            parse_mixture(bad)


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.1, float("nan")])
def test_fractions_are_checked(fraction, tmp_path, config):
    whole = tiny_config(tmp_path)
    with whole.unlocked():
        whole.data.fraction = fraction
    with pytest.raises(UserError, match=r"data\.fraction"):
        make_settings(whole)
    with whole.unlocked():
        whole.data.update(fraction=0.1, mixture="scanqa=2,")
        make_settings(whole)
        whole.data.mixture = "scanqa"
    with pytest.raises(UserError, match=r"data\.mixture: 'scanqa'"):
        make_settings(whole)
    with pytest.raises(UserError, match="fraction: all"):
        dataclasses.replace(config, fraction=fraction)
    with pytest.raises(UserError, match="fraction: a"):
        dataclasses.replace(config, fraction={"a": fraction})


def test_fractions_of_data_sets_are_one_field_on_the_command_line():
    given = "s-mit=0.25,cambrian-alignment=0.1"
    settings = read_settings("geode_align", [f"data.fraction={given}"])
    assert parse_fraction(settings.data.fraction) == {"s-mit": 0.25, "cambrian-alignment": 0.1}
    assert settings.values["data"]["fraction"] == given
    # The configuration that is made next has the default, as saved runs have it: a number.
    assert read_settings("geode_align").values["data"]["fraction"] == 1.0
    assert read_settings("hidden_cot", ["data.fraction=0.1"]).data.fraction == 0.1
    for bad in ("s-mit=2", "s-mit=0", "s-mit", "=0.5", "a=0.1,a=0.2", "a=nan", "a=x"):
        with pytest.raises(UserError, match=r"data\.fraction: .* is not SOURCE=FRACTION"):
            read_settings("hidden_cot", [f"data.fraction={bad}"])
    for bad in ("", "0", "2"):
        with pytest.raises(UserError, match=r"data\.fraction: .* is not in \(0, 1\]"):
            read_settings("hidden_cot", [f"data.fraction={bad}"])
