"""The model card of an exported run: use, scores, data, and the licence terms it inherits."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from geode_jax.evaluate import vsi_bench
from geode_jax.evaluate.scores import loss_table, score_table
from geode_jax.exports import files
from geode_jax.exports.prompts import prompt


class Term(NamedTuple):
    """A row of the licence table.

    Attributes:
        pattern: regular expression that matches the names of the asset, up to case.
        asset: name of the model or data set.
        licence: its licence, as its owners state it.
        identifier: the Hub's identifier for a model under these terms; "" if the terms do not
            extend to models.
    """

    pattern: str
    asset: str
    licence: str
    identifier: str


_GATED = "gated, not to be redistributed"

LICENCE_TERMS = (
    Term(r"llava.?3d", "LLaVA-3D", "CC BY-NC-SA 4.0", "cc-by-nc-sa-4.0"),
    Term(r"scanqa", "ScanQA", "CC BY-NC-SA 3.0", "cc-by-nc-sa-3.0"),
    Term(r"vggt", "VGGT-1B weights", "CC-BY-NC-4.0; a commercial checkpoint is gated",
         "cc-by-nc-4.0"),
    Term(r"sonata", "Sonata weights", "CC-BY-NC-4.0 (code: Apache-2.0)", "cc-by-nc-4.0"),
    Term(r"scannet", "ScanNet, ScanNet++", _GATED, "other"),
    Term(r"arkit", "ARKitScenes", _GATED, "other"),
    Term(r"3d.?(front|future)", "3D-FRONT, 3D-FUTURE", _GATED, "other"),
    Term(r"sqa3d", "SQA3D", "CC-BY-4.0", ""),
    Term(r"qwen2\.?5.?1\.5b", "Qwen2.5-1.5B", "Apache-2.0", ""),
    Term(r"intern(vit|vl)", "InternViT", "MIT", ""),
)  # fmt: skip
"""The licence table, strictest terms first. Not legal advice."""


def inherited(
    producer: Mapping[str, str], origins: Sequence[str], sources: Sequence[str] = ()
) -> tuple[str, list[Term]]:
    """Finds the licence terms that a model inherits.

    Args:
        producer: of the export's manifest.
        origins: names of the pretrained models that the run started from.
        sources: names of the data sets whose questions were added to the export.

    Returns:
        The Hub's identifier of the resulting licence, and the matching rows of the licence table. A
        model that was trained on synthetic rooms alone inherits no terms; an origin or a source
        that the table does not have makes it "other".
    """
    given = (*origins, *sources)
    names = " ".join([*producer.values(), *given])
    found = [term for term in LICENCE_TERMS if _covers(term, names)]
    bound = [term.identifier for term in found if term.identifier]
    if bound:
        return bound[0], found
    known = all(any(_covers(term, name) for term in LICENCE_TERMS) for name in given)
    return "apache-2.0" if known and producer["licence"] == "CC0-1.0" else "other", found


def _covers(term: Term, names: str) -> bool:
    return re.search(term.pattern, names, re.IGNORECASE) is not None


def write_card(
    path: Path,
    *,
    name: str,
    system: str,
    auto_class: str,
    manifest: Mapping[str, Any],
    origins: Sequence[str],
    sources: Sequence[str],
    summary: Mapping[str, Any],
    step: int,
) -> None:
    """Writes the model card, a README.md.

    Args:
        path: of the file.
        name: of the run.
        system: name of the run's system.
        auto_class: name of the class of transformers that loads the folder.
        manifest: of the export that the run was trained on.
        origins: names of the pretrained models that the run started from.
        sources: names of the data sets whose questions were added to the export.
        summary: content of `summary.json`; empty if the run has not ended.
        step: training step of the checkpoint.
    """
    producer = manifest["producer"]
    identifier, found = inherited(producer, origins, sources)
    splits = [scene["split"] for scene in manifest["scenes"]]
    counts = ", ".join(f"{splits.count(s)} {s}" for s in dict.fromkeys(splits))
    added = f", with those of {', '.join(sources)}" if sources else ""
    rows = [f"| {term.asset} | {term.licence} |" for term in found]
    rows.append(f"| {producer['project']} (the data) | {producer['licence']} |")
    rows.append("| geode_jax (this folder's code) | Apache-2.0 |")
    text = f"""---
library_name: transformers
license: {identifier}
tags:
- geode_jax
- 3d
---

# {name}

A `{system}` model trained with geode_jax, step {step}.

{_use(auto_class)}

## Scores

{_scores(summary)}

## Data

{producer["project"]}, {producer["commit"]}: {len(splits)} scenes ({counts}),
{manifest["questions"]["count"]} questions{added}. Features: {producer["weights"]}.
{f"Started from: {', '.join(origins)}." if origins else "Started from random weights."}

## Licence

What the model derives from, and the terms as their owners state them. {_verdict(identifier, found)}

| asset | licence |
|---|---|
{chr(10).join(rows)}
"""
    files.write_text(path, text)


def _use(auto_class: str) -> str:
    if auto_class == "AutoModelForCausalLM":
        return """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

DIR = "."  # this folder
model, tokenizer = AutoModelForCausalLM.from_pretrained(DIR), AutoTokenizer.from_pretrained(DIR)
```"""
    question = {"kind": "object_counting", "question": "How many chair(s) are in this room?"}
    return f"""```python
from transformers import AutoModel, AutoTokenizer

DIR = "."  # this folder
model = AutoModel.from_pretrained(DIR, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(DIR, trust_remote_code=True)
scene = model.encode_scene(...)  # a scene's arrays, see its docstring
prompt = {prompt(question)!r}
ids, mask = model.encode_prompts(tokenizer, [[prompt]])  # a list of prompts for each scene
print(model.decode_answers(model.answer(scene, ids, mask), tokenizer))
```

A question of VSI-Bench's kinds has that benchmark's prompt, as here: the model learned no other
wording. All other kinds of questions are their own prompt."""


def _scores(summary: Mapping[str, Any]) -> str:
    blocks = []
    if "vsi" in summary:
        blocks.append(vsi_bench.table(summary["vsi"]))
    if "scores" in summary:
        blocks.append(score_table(summary["scores"]))
    if not blocks and "val" in summary:
        blocks.append(loss_table(summary["val"]))
    notes = "".join(f"\n- {note}" for note in summary.get("notes", ()))
    if not blocks:
        return "The run has not been scored."
    return "\n\n".join(f"```\n{block}\n```" for block in blocks) + (f"\n{notes}" if notes else "")


def _verdict(identifier: str, found: Sequence[Term]) -> str:
    if "-nc" in identifier:
        return "The model is for non-commercial use."
    if identifier == "other":
        return "These terms apply to the model."
    return "The model inherits no terms from the data." if not found else ""
