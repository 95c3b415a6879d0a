"""Asks exported folders in a process that cannot import jax: folders, questions, an answer file.

python without_jax.py FOLDER QUESTIONS.npz OUT.npz ...
"""

import json
import sys

import numpy as np
import torch


class NoJax:
    """Refuses jax, and whatever of ours would import it."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("jax", "jaxlib", "flax", "geode_jax"):
            raise ImportError(f"{name}: not here")
        return None


sys.meta_path.insert(0, NoJax())

from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer  # noqa: E402


def main(folder: str, source: str, out: str) -> None:
    given = dict(np.load(source))
    if "tokens" in given:
        model = AutoModelForCausalLM.from_pretrained(folder)
        with torch.no_grad():
            logits = model(torch.tensor(given["tokens"])).logits
        np.savez(out, logits=logits.numpy())
        return
    model, info = AutoModel.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True
    )
    assert not any(info.values()), info
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    arrays = {
        name.removeprefix("scene/"): torch.tensor(array)
        for name, array in given.items()
        if name.startswith("scene/")
    }
    prompts, units = json.loads(str(given["prompts"])), json.loads(str(given["units"]))
    ids, mask = model.encode_prompts(tokenizer, prompts)
    with torch.no_grad():
        scene = model.encode_scene(**arrays)
        logits = model(scene, ids, mask, torch.tensor(given["answers"]))
    said = model.answer(scene, ids, mask)
    results = {"logits": logits.numpy()[:, :, ids.shape[-1] - 1 :]}
    if hasattr(said, "tokens"):
        results |= {"values": said.values.numpy(), "boxes": said.boxes.numpy()}
        texts = [
            [one["text"] for one in row] for row in model.decode_answers(said, tokenizer, units)
        ]
        tokens = said.tokens
    else:
        texts, tokens = model.decode_answers(said, tokenizer), said
    np.savez(out, tokens=tokens.numpy(), texts=json.dumps(texts), **results)


if __name__ == "__main__":
    for i in range(1, len(sys.argv), 3):
        main(*sys.argv[i : i + 3])
