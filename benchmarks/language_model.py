"""Our decoder against transformers' with the same weights: reading, learning, saying.

    python -m benchmarks.language_model [--rounds 7] [--compiled]

Two sizes of Qwen2's architecture: 0.15B, and that of the laptop's student. A model of transformers
with random weights is saved and imported by `geode_jax.weights`; logits, the loss's gradient and
the greedy text must agree before anything is timed. Theirs runs eagerly with scaled dot-product
attention; `--compiled` measures `torch.compile` beside it, where that works. fp32, which is what a
CPU is fast in.
"""

import argparse
import functools
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
import transformers
from flax import nnx

from benchmarks import ledger
from geode_jax.build import keep_freed_memory
from geode_jax.inference.generate import generate
from geode_jax.losses import token_cross_entropy
from geode_jax.models.decoder import Decoder
from geode_jax.models.decoding import for_decoding
from geode_jax.ops.attention import causal
from geode_jax.weights import load_pretrained

NEVER = -1
"""An end token that no model says."""

SIZES = {
    "Qwen-shaped 0.15B": dict(
        vocab_size=32_000,
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=2,
        intermediate_size=4096,
    ),
    "laptop student": dict(
        vocab_size=536,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=384,
    ),
}
READ = {"Qwen-shaped 0.15B": (1, 512), "laptop student": (16, 128)}
"""Rows and columns that are read, and learned from, at once."""
PROMPT, SAID = 64, 64


def both(sizes: dict) -> tuple[torch.nn.Module, Decoder]:
    """transformers' model with random weights, and ours from its files."""
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        **sizes, tie_word_embeddings=True, attn_implementation="sdpa", eos_token_id=None
    )
    theirs = transformers.Qwen2ForCausalLM(config).eval()
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        return theirs, load_pretrained(Path(folder))


def close(ours, theirs) -> None:
    """Within 1e-4 of the largest number."""
    ours, theirs = np.asarray(ours), theirs.detach().numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max())


class Ours:
    """What is timed of ours, compiled; each call awaits its result."""

    def __init__(self, model: Decoder):
        self.graph, self.params = nnx.split(model)
        self.ready = jax.jit(for_decoding)(model)
        self.optimizer = optax.adamw(1e-4)
        self.state = self.optimizer.init(self.params)

        def loss(params, ids):
            model = nnx.merge(self.graph, params)
            B, L = ids.shape
            positions = jnp.broadcast_to(jnp.arange(L), ids.shape)
            hidden, _ = model.run(model.embed(ids), positions, causal(B, L))
            paid = jnp.ones((B, L - 1), bool)
            labels = ids[:, 1:, None]
            total = model.token_loss(token_cross_entropy, hidden[:, :-1], labels, paid)
            return total / paid.size

        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def step(params, state, ids):
            value, gradient = jax.value_and_grad(loss)(params, ids)
            updates, state = self.optimizer.update(gradient, state, params)
            return optax.apply_updates(params, updates), state, value

        @functools.partial(jax.jit, static_argnums=2)
        def say(model, prompt, new):
            return generate(
                model,
                model.no_prefix(1),
                prompt[None],
                jnp.full((1, len(prompt)), prompt.shape[1]),
                max_new_tokens=new,
                eos_id=NEVER,
            ).tokens_SQA[0]

        self._forward = jax.jit(lambda params, ids: nnx.merge(self.graph, params)(ids))
        self._gradient = jax.jit(jax.grad(loss))
        self._step, self._say = step, say

    def forward(self, ids):
        return self._forward(self.params, ids).block_until_ready()

    def gradient(self, ids):
        return self._gradient(self.params, ids)

    def train(self, ids):
        self.params, self.state, value = self._step(self.params, self.state, ids)
        return value.block_until_ready()

    def say(self, ids, new: int):
        return self._say(self.ready, ids, new).block_until_ready()


class Theirs:
    """The same of theirs."""

    def __init__(self, model: torch.nn.Module, compiled: bool):
        self.model = model
        self.call = torch.compile(model) if compiled else model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=1e-4)

    def forward(self, ids):
        with torch.inference_mode():
            return self.call(ids, use_cache=False).logits

    def loss(self, ids):
        return self.call(ids, labels=ids, use_cache=False).loss

    def train(self, ids):
        self.optimizer.zero_grad()
        self.loss(ids).backward()
        self.optimizer.step()

    def say(self, ids, new: int):
        with torch.inference_mode():
            said = self.model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False
            )
        return said[:, ids.shape[1] :]


def check(ours: Ours, theirs: Theirs, ids: np.ndarray) -> None:
    """Logits, a gradient and greedy text agree."""
    tensor = torch.tensor(ids)
    close(ours.forward(ids), theirs.forward(tensor))
    theirs.loss(tensor).backward()
    gradient = nnx.merge(ours.graph, ours.gradient(ids)).embedding[...]
    close(gradient, theirs.model.get_input_embeddings().weight.grad)
    said = theirs.say(tensor[:1, :PROMPT], SAID).numpy()
    np.testing.assert_array_equal(ours.say(ids[:1, :PROMPT], SAID), said)


def measure(name: str, rounds: int, compiled: bool) -> list[dict]:
    """The rows of one size."""
    model, decoder = both(SIZES[name])
    ours, theirs = Ours(decoder), Theirs(model, compiled)
    read = READ[name]
    ids = np.random.default_rng(0).integers(0, SIZES[name]["vocab_size"], read)
    check(ours, theirs, ids)
    tensor, prompt = torch.tensor(ids), ids[:1, :PROMPT]
    asked = torch.tensor(prompt)
    against = f"{name} against {'torch.compile' if compiled else 'transformers'}"
    calls = {
        "forward": (lambda: ours.forward(ids), lambda: theirs.forward(tensor), list(read)),
        "training step with AdamW": (
            lambda: ours.train(ids),
            lambda: theirs.train(tensor),
            list(read),
        ),
        "prefill and one token": (
            lambda: ours.say(ids[:1], 1),
            lambda: theirs.say(tensor[:1], 1),
            [1, read[1]],
        ),
        "greedy text with a cache": (
            lambda: ours.say(prompt, SAID),
            lambda: theirs.say(asked, SAID),
            [1, PROMPT, SAID],
        ),
    }
    rows = []
    for what, (our_call, their_call, shape) in calls.items():
        times = ledger.alternate(our_call, their_call, rounds)
        rows.append(
            ledger.row(f"{against}: {what}", *times, unit="s", dtype="float32", shape=shape)
        )
        print("\n".join(ledger.table(rows)[-1:]), flush=True)
    return rows


def main() -> None:
    """Measures, prints a table and writes `language_model.json`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--compiled", action="store_true")
    arguments = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(ledger.threads())
    rows = []
    for name in SIZES:
        rows += measure(name, arguments.rounds, compiled=False)
        if arguments.compiled:
            rows += measure(name, arguments.rounds, compiled=True)
    ledger.write("language_model", rows)


if __name__ == "__main__":
    main()
