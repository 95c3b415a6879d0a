"""The table of data sets, and the one function that prepares any of them."""

from collections.abc import Callable

from geode_jax.errors import UserError
from geode_jax.sources.datasets import (
    Report,
    Request,
    arkitscenes,
    captions,
    conversations,
    front3d,
    images,
    own_questions,
    rationales,
    scannet,
    scannet_questions,
    scannetpp,
    vsi_bench,
)

SOURCES: dict[str, Callable[[Request], Report]] = {
    "scannet": scannet.prepare,
    "scannetpp": scannetpp.prepare,
    "arkitscenes": arkitscenes.prepare,
    "3d-front": front3d.prepare,
    "images": images.prepare,
    "scanqa": scannet_questions.scanqa,
    "sqa3d": scannet_questions.sqa3d,
    "vsi590k": conversations.vsi590k,
    "vica322k": conversations.vica322k,
    "vlm3r": conversations.vlm3r,
    "llava3d": conversations.llava3d,
    "ssr-cot": rationales.ssr_cot,
    "vica-thinking": rationales.vica_thinking,
    "jsonl": own_questions.own_questions,
    "cambrian-alignment": captions.cambrian_alignment,
    "s-mit": captions.s_mit,
    "vsi-bench": vsi_bench.prepare,
}
"""Name of a data set -> function that writes its export."""
DRAWS_SPLITS = ("scannet", "scannetpp", "arkitscenes", "3d-front", "images")
"""Data sets whose splits are drawn in the shares of a request."""


def prepare(source: str, request: Request) -> Report:
    """Writes the export of a data set; the same request continues an interrupted one.

    Raises:
        UserError: `source` is not in the table, the data set is not in its layout, or the source
            does not know an option.
        ExportError: the export cannot be written.
    """
    if source not in SOURCES:
        raise UserError(f"--source: {source!r} is none of {', '.join(SOURCES)}")
    if request.split and source not in DRAWS_SPLITS:
        own = "its own splits or those of --scenes"
        raise UserError(f"--split: {source} has {own}; {', '.join(DRAWS_SPLITS)} take shares")
    if request.metric and source != "images":
        raise UserError(f"--metric: is about the cameras of images, not of {source}")
    return SOURCES[source](request)
