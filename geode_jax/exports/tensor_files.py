"""The bytes of safetensors files, for `files.write_bytes`.

By hand, because safetensors' numpy writer needs ml_dtypes for bf16 and changed its arguments
between versions (an exporter takes whatever version its environment has), and because it leaves
files that only their owner can read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

STORED = {"bfloat16": "BF16", "bool": "BOOL"}
STORED.update({f"float{bits}": f"F{bits}" for bits in (16, 32, 64)})
STORED.update({f"int{bits}": f"I{bits}" for bits in (8, 16, 32, 64)})
STORED.update({f"uint{bits}": f"U{bits}" for bits in (8, 16, 32, 64)})
"""numpy's names of dtypes -> safetensors' names."""


def chunks(
    tensors: Mapping[str, tuple[str, np.ndarray]], metadata: Mapping[str, str] | None = None
) -> Iterator[Any]:
    """The bytes of a file, one chunk after another.

    Args:
        tensors: name -> (safetensors' name of the dtype, little-endian C-ordered array).
        metadata: texts for the header.
    """
    # Wide types first, as the library does: every tensor is then aligned.
    order = sorted(tensors, key=lambda name: (-tensors[name][1].itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in order:
        dtype, array = tensors[name]
        offsets = [end, end + array.nbytes]
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": offsets}
        end = offsets[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in order:
        yield tensors[name][1].reshape(-1).view(np.uint8)
