"""One line read in both directions: parts, inverses, and what a table has to be."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geode_jax.weights.rules import Rule, find_problems, within

FUSED = Rule("{layer}.qkv", "blocks.qkv.kernel", "(qkv h e) d -> layer d qkv h e")
APART = Rule("{layer}.{qkv=q,k,v}", "blocks.qkv.kernel", "(qkv h e) d -> layer d qkv h e")
SHAPE = (2, 5, 3, 4, 2)  # layer d qkv h e


def random_tensors(rule: Rule, shape, seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    size = rule.tensor_shape(shape)
    return {key: random.standard_normal(size, np.float32) for key, _ in rule.tensors(shape)}


def read_whole(rule: Rule, shape, tensors) -> np.ndarray:
    part = tuple(slice(None) for _ in shape)
    return rule.read(shape, part, lambda key, slices: tensors[key][slices])


def test_one_tensor_or_three_make_the_same_parameter():
    fused = random_tensors(FUSED, SHAPE)
    assert {key: x.shape for key, x in fused.items()} == {"0.qkv": (24, 5), "1.qkv": (24, 5)}
    apart = {
        f"{layer}.{name}": x
        for layer in range(2)
        for name, x in zip("qkv", np.split(fused[f"{layer}.qkv"], 3), strict=True)
    }
    leaf = read_whole(FUSED, SHAPE, fused)
    np.testing.assert_array_equal(leaf, read_whole(APART, SHAPE, apart))
    # Layer 1, key, head 2, first channel: row 8 + 2 * 2 of the fused tensor.
    np.testing.assert_array_equal(leaf[1, :, 1, 2, 0], fused["1.qkv"][12])


@st.composite
def rules(draw) -> tuple[Rule, tuple[int, ...]]:
    """A rule with any grouping and order of up to five axes, of which some are in the key."""
    axes = draw(st.permutations(["a", "b", "c", "d", "one"]))[: draw(st.integers(1, 5))]
    sizes = {axis: draw(st.integers(1, 3)) for axis in axes}
    keyed = draw(st.lists(st.sampled_from(axes), unique=True, max_size=len(axes) - 1))
    free = [axis for axis in axes if axis not in keyed]
    cuts = sorted(draw(st.sets(st.integers(1, len(free)))) | {0, len(free)})
    groups = [free[a:b] for a, b in itertools.pairwise(cuts)]
    left = [f"({' '.join(g)})" if len(g) > 1 else g[0] for g in groups]
    left.insert(draw(st.integers(0, len(left))), "1")
    right = draw(st.permutations(axes))
    names = [
        f"{{{axis}={','.join('xyz'[: sizes[axis]])}}}" if draw(st.booleans()) else f"{{{axis}}}"
        for axis in keyed
    ]
    rule = Rule("t." + ".".join(names), "leaf", f"{' '.join(left)} -> {' '.join(right)}")
    return rule, tuple(sizes[axis] for axis in right)


@settings(max_examples=60)
@given(rules(), st.data())
def test_writing_inverts_reading_and_parts_are_of_the_whole(case, data):
    rule, shape = case
    tensors = random_tensors(rule, shape)
    leaf = read_whole(rule, shape, tensors)
    assert leaf.shape == shape
    assert sorted(leaf.ravel()) == sorted(np.concatenate([x.ravel() for x in tensors.values()]))
    written = dict(rule.write(leaf))
    assert written.keys() == tensors.keys()
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(written[key], tensor)
    bounds = [sorted(data.draw(st.tuples(*[st.integers(0, n)] * 2))) for n in shape]
    part = tuple(slice(a, max(b, a + 1)) if a < n else slice(n - 1, n)
                 for (a, b), n in zip(bounds, shape, strict=True))  # fmt: skip
    read = []

    def partly(key, slices):
        read.append(tensors[key][slices].size)
        return tensors[key][slices]

    np.testing.assert_array_equal(rule.read(shape, part, partly), leaf[part])
    assert sum(read) <= leaf.size


def test_a_part_reads_no_more_than_its_rows():
    tensors = random_tensors(FUSED, SHAPE)
    asked = []

    def read(key, slices):
        asked.append((key, slices))
        return tensors[key][slices]

    part = (slice(1, 2), slice(0, 3), slice(1, 3), slice(None), slice(None))
    FUSED.read(SHAPE, part, read)
    assert asked == [("1.qkv", (slice(8, 24), slice(0, 3)))]


def test_a_scalar_is_a_tensor_of_one():
    rule = Rule("t", "leaf", "1 -> ")
    ((key, tensor),) = rule.write(np.float32(3.5).reshape(()))
    assert (key, tensor.shape) == ("t", (1,))
    back = read_whole(rule, (), {key: tensor})
    assert (back.shape, back.dtype, back) == ((), np.float32, 3.5)


# --- Tables ---------------------------------------------------------------------------------------

TABLE = (APART, Rule("norm", "norm.scale", "d -> d"))
LEAVES = {"blocks.qkv.kernel": SHAPE, "norm.scale": (5,)}
TENSORS = {f"{i}.{name}": (8, 5) for i in range(2) for name in "qkv"} | {"norm": (5,)}


@pytest.mark.parametrize(
    ("leaves", "tensors", "said"),
    [
        ({}, {}, []),
        ({"head": (3,)}, {}, ["head: 0 rules fill it"]),
        ({"norm.scale": (5, 1)}, {}, ["norm.scale: a rule is for", "norm: unknown"]),
        (
            {"blocks.qkv.kernel": (2, 5, 2, 4, 2)},
            {},
            ["blocks.qkv.kernel: a rule", *[f"{key}: unknown" for key in TENSORS if key != "norm"]],
        ),
        (
            {},
            {"1.k": (8, 6), "norm": None, "more": (1,), "old.buffer": (1,)},
            ["1.k: 8x6 is not the model's 8x5", "norm: missing", "more: unknown"],
        ),
    ],
)
def test_all_problems_are_found_at_once(leaves, tensors, said):
    present = {key: shape for key, shape in (TENSORS | tensors).items() if shape is not None}
    found = find_problems(TABLE, LEAVES | leaves, present, (r"old\..*",))
    assert len(found) == len(said)
    for problem, start in zip(found, said, strict=True):
        assert problem.startswith(start)


def test_a_table_uses_every_name_once():
    found = find_problems((*TABLE, TABLE[1]), LEAVES, TENSORS)
    assert found == ["norm.scale: 2 rules fill it", "norm: two rules use it"]


def test_a_table_within_a_larger_one():
    (rule,) = within(TABLE[1:], "model.", "decoder.")
    assert (rule.key, rule.leaf, rule.axes) == ("model.norm", "decoder.norm.scale", "d -> d")
