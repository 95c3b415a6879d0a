"""The labels of a scene that moves to an export with more categories.

A label is the number of its noun in the manifest's `categories`. In an export whose list of nouns
is longer or in another order, the same noun has another number, and the teacher's probabilities
have more columns.

This module stands alone (Python 3.9, numpy), as the whole package does.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .contract import SPECS

NUMBERS = ("target/labels", "target/segmentation")
"""Tensors whose values are labels; -1 is none."""
COLUMNS = tuple(name for name, spec in SPECS.items() if "categories" in spec.dims.split())
"""Tensors with a column for every category, the last axis."""


def must_change(name: str, old: Sequence[str], new: Sequence[str]) -> bool:
    """Returns whether a tensor differs between two lists of categories.

    Args:
        name: of the tensor.
        old: the nouns of the tensor's export.
        new: the nouns of the other export, which has all of them.
    """
    if name in COLUMNS:
        return list(old) != list(new)
    return name in NUMBERS and list(old) != list(new)[: len(old)]


def renumbered(name: str, array: np.ndarray, old: Sequence[str], new: Sequence[str]) -> np.ndarray:
    """Returns a tensor of `NUMBERS` or `COLUMNS` for another list of categories.

    Every label keeps its noun and every probability its noun's column; nouns that `old` lacks have
    the probability 0.

    Args:
        name, old, new: as in `must_change`.
        array: the tensor; its dtype is kept, unless a label does not fit into it.
    """
    place = {noun: number for number, noun in enumerate(new)}
    numbers = np.array([place[noun] for noun in old], np.int32)
    if name in COLUMNS:
        columns = np.zeros((*array.shape[:-1], len(new)), array.dtype)
        columns[..., numbers] = array
        return columns
    fits = len(new) - 1 <= np.iinfo(array.dtype).max
    # The last entry of the table is what the label -1 becomes.
    return np.append(numbers, np.int32(-1))[array].astype(array.dtype if fits else np.int32)
