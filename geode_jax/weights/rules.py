"""Reversible rules between the tensors of a checkpoint and the parameters of a model.

    Rule(
        "encoder.layers.{layer}.attn.qkv.weight",
        "blocks.attention.qkv.kernel",
        "(qkv h e) d -> layer d qkv h e",
    )

names the tensor, the parameter (a leaf of the model, its path joined by dots), and the axes of the
tensor and of the leaf. Axes in parentheses form one axis of the tensor, row-major; `1` is an axis
of length 1. An axis in braces in the tensor's name is not an axis of the tensor: there is a tensor
for each of its indices, named by the index or, as in `{qkv=q,k,v}`, by an entry of that list. So
the same axes describe a checkpoint with query, key and value in one tensor, and one with three.

Sizes are those of the leaf. Import and export read the same line, so each inverts the other.
"""

import dataclasses
import functools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

Shape = tuple[int, ...]
Index = tuple[int | slice, ...]

_BRACES = re.compile(r"\{(\w+)(?:=([\w,]+))?\}")


@dataclasses.dataclass(frozen=True)
class Rule:
    """One rule; the docstring of the module describes its form.

    Attributes:
        key: name of the tensors.
        leaf: path of the parameter.
        axes: axes of a tensor -> axes of the leaf.
    """

    key: str
    leaf: str
    axes: str

    @functools.cached_property
    def _listed(self) -> dict[str, list[str]]:
        """Axes in braces -> names of their indices; empty: they are numbered."""
        return {
            axis: names.split(",") if names else [] for axis, names in _BRACES.findall(self.key)
        }

    @functools.cached_property
    def _groups(self) -> list[list[str]]:
        """For each axis of a tensor, the axes of the leaf that form it."""
        left, _ = self.axes.split(" -> ")
        groups = [text.strip("()").split() for text in re.findall(r"\([^)]*\)|\S+", left)]
        return [[a for a in group if a not in self._listed] for group in groups]

    @functools.cached_property
    def _leaf_axes(self) -> list[str]:
        return self.axes.split(" -> ")[1].split()

    @functools.cached_property
    def _flat(self) -> list[str]:
        """The axes of the leaf in the order of the tensor."""
        return [a for group in self._groups for a in group if a != "1"]

    def _sizes(self, shape: Shape) -> dict[str, int]:
        return dict(zip(self._leaf_axes, shape, strict=True)) | {"1": 1}

    def fits(self, shape: Shape) -> bool:
        """True if a leaf of this shape has the axes of the rule."""
        known = dict(zip(self._leaf_axes, shape, strict=False))
        return len(shape) == len(self._leaf_axes) and all(
            not names or known[axis] == len(names) for axis, names in self._listed.items()
        )

    def tensors(self, shape: Shape) -> Iterator[tuple[str, Index]]:
        """Yields name and index into the leaf of each tensor of a leaf of this shape."""
        sizes = self._sizes(shape)
        for position in np.ndindex(*(sizes[axis] for axis in self._listed)):
            at = dict(zip(self._listed, position, strict=True))

            def name(match, at=at):
                axis = match[1]
                return self._listed[axis][at[axis]] if match[2] else str(at[axis])

            yield (
                _BRACES.sub(name, self.key),
                tuple(at.get(a, slice(None)) for a in self._leaf_axes),
            )

    def tensor_shape(self, shape: Shape) -> Shape:
        """Returns the shape of each tensor of a leaf of this shape."""
        sizes = self._sizes(shape)
        return tuple(math.prod(sizes[a] for a in group) for group in self._groups)

    def read(
        self, shape: Shape, part: tuple[slice, ...], read: Callable[[str, tuple], np.ndarray]
    ) -> np.ndarray:
        """Returns a part of a leaf; no more of its tensors is read than needed.

        Args:
            shape: shape of the whole leaf.
            part: a slice for each axis of the leaf.
            read: maps the name of a tensor and a slice for each of its axes to that part.
        """
        sizes = self._sizes(shape)
        wanted = {a: range(sizes[a])[s] for a, s in zip(self._leaf_axes, part, strict=True)}
        wanted["1"] = range(1)
        # If several axes form one, only the outermost is read in part; the others are cut here.
        slices, lengths, cut = [], [], []
        for first, *inner in self._groups:
            step = math.prod(sizes[a] for a in inner)
            slices.append(slice(wanted[first].start * step, wanted[first].stop * step))
            if first != "1":
                lengths += [len(wanted[first]), *(sizes[a] for a in inner)]
                cut += [slice(None), *(slice(wanted[a].start, wanted[a].stop) for a in inner)]
        pieces = [
            read(key, tuple(slices)).reshape(lengths)[tuple(cut)]
            for key, index in self.tensors(shape)
            if all(
                isinstance(i, slice) or i in wanted[a]
                for a, i in zip(self._leaf_axes, index, strict=True)
            )
        ]
        stacked = [len(wanted[axis]) for axis in self._listed]
        whole = np.stack(pieces).reshape((*stacked, *pieces[0].shape))
        order = [*self._listed, *self._flat]
        return whole.transpose([order.index(axis) for axis in self._leaf_axes])

    def write(self, leaf: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        """Yields name and value of each tensor of a leaf: the inverse of `read`."""
        kept = [axis for axis in self._leaf_axes if axis not in self._listed]
        order = [kept.index(axis) for axis in self._flat]
        shape = self.tensor_shape(leaf.shape)
        for key, index in self.tensors(leaf.shape):
            yield key, leaf[index].transpose(order).reshape(shape)


def within(rules: Sequence[Rule], key: str, leaf: str) -> tuple[Rule, ...]:
    """Returns the rules of a part of a larger model: names and paths get these prefixes."""
    return tuple(Rule(key + rule.key, leaf + rule.leaf, rule.axes) for rule in rules)


def find_problems(
    rules: Sequence[Rule],
    leaves: Mapping[str, Shape],
    tensors: Mapping[str, Shape],
    ignored: Sequence[str] = (),
) -> list[str]:
    """Returns the mismatches between a checkpoint and a model, one line each.

    Without mismatches, the rules fill every leaf once and use every tensor once, except tensors
    whose names match `ignored` (regular expressions).
    """
    filled = Counter(rule.leaf for rule in rules)
    found = [f"{leaf}: {filled[leaf]} rules fill it" for leaf in leaves if filled[leaf] != 1]
    expected: dict[str, Shape] = {}
    for rule in rules:
        shape = leaves.get(rule.leaf)
        if shape is None or not rule.fits(shape):
            has = "has no such leaf" if shape is None else f"has {_text(shape)}"
            found.append(f"{rule.leaf}: a rule is for {rule.axes!r}, the model {has}")
            continue
        for key, _ in rule.tensors(shape):
            if key in expected:
                found.append(f"{key}: two rules use it")
            expected[key] = rule.tensor_shape(shape)
    for key, shape in expected.items():
        if key not in tensors:
            found.append(f"{key}: missing")
        elif tensors[key] != shape:
            found.append(f"{key}: {_text(tensors[key])} is not the model's {_text(shape)}")
    skip = re.compile("|".join(ignored) or r"(?!)")
    unknown = [key for key in tensors if key not in expected and not skip.fullmatch(key)]
    return found + [f"{key}: unknown" for key in unknown]


def _text(shape: Shape) -> str:
    return "x".join(map(str, shape)) or "scalar"
