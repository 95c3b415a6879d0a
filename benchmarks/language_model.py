"""Measures the decoder against transformers' with the same weights: forward, training, decoding.

    python -m benchmarks.language_model [--rounds 7]

Two sizes of Qwen2's architecture: 0.15B, and that of the laptop's student. `geode_jax.weights`
imports a model of transformers with random weights; logits, the gradient of the loss and the greedy
text must agree before anything is timed. Theirs runs eagerly with scaled dot-product attention in a
process of its own: with the settings that its users have, with our memory setting, and with
`torch.compile` if that works. Our forward pass and decoding use the matrices of `for_decoding`.
fp32, in which CPUs are fast.
"""

import functools
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
import transformers
from flax import nnx

from benchmarks import ledger
from geode_jax.models.decoder import Decoder
from geode_jax.models.decoding import for_decoding
from geode_jax.models.generate import generate
from geode_jax.objectives.losses import token_cross_entropy
from geode_jax.ops.attention import causal
from geode_jax.runtime.process import keep_freed_memory
from geode_jax.weights import load_pretrained

transformers.utils.logging.disable_progress_bar()

NO_END_TOKEN = -1
"""An id that no model predicts, so every answer has its full length."""

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
OTHERS = {
    "transformers": {},
    "transformers, our memory setting": {"keep_memory": True},
    "torch.compile": {"compiled": True},
}
READ = {"Qwen-shaped 0.15B": (1, 512), "laptop student": (16, 128)}
"""Rows and columns of a batch of the forward pass and of training."""
PROMPT_LENGTH, ANSWER_LENGTH = 64, 64


def save(sizes: dict, folder: str) -> None:
    """Saves a model of transformers with random weights."""
    torch.manual_seed(0)
    config = transformers.Qwen2Config(**sizes, tie_word_embeddings=True, eos_token_id=None)
    transformers.Qwen2ForCausalLM(config).save_pretrained(folder)


def close(ours, theirs: np.ndarray) -> None:
    """Asserts that two arrays agree within 1e-4 of the largest number."""
    np.testing.assert_allclose(np.asarray(ours), theirs, atol=1e-4 * np.abs(theirs).max())


class Ours:
    """The timed calls of this package, compiled; each waits for its result."""

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
            counted = jnp.ones((B, L - 1), bool)
            labels = ids[:, 1:, None]
            total = model.token_loss(token_cross_entropy, hidden[:, :-1], labels, counted)
            return total / counted.size

        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def step(params, state, ids):
            value, gradient = jax.value_and_grad(loss)(params, ids)
            updates, state = self.optimizer.update(gradient, state, params)
            return optax.apply_updates(params, updates), state, value

        @functools.partial(jax.jit, static_argnums=2)
        def decode(model, prompt, new):
            return generate(
                model,
                model.no_prefix(1),
                prompt[None],
                jnp.full((1, len(prompt)), prompt.shape[1]),
                max_new_tokens=new,
                eos_id=NO_END_TOKEN,
            ).tokens_SQA[0]

        self._forward = jax.jit(lambda model, ids: model(ids))
        self._gradient = jax.jit(jax.grad(loss))
        self._step, self._decode = step, decode

    def forward(self, ids):
        return self._forward(self.ready, ids).block_until_ready()

    def gradient(self, ids):
        return self._gradient(self.params, ids)

    def train(self, ids):
        self.params, self.state, value = self._step(self.params, self.state, ids)
        return value.block_until_ready()

    def decode(self, ids, new: int):
        return self._decode(self.ready, ids, new).block_until_ready()


class Theirs:
    """The timed calls of transformers."""

    def __init__(self, folder: str, compiled: bool):
        self.model = transformers.Qwen2ForCausalLM.from_pretrained(
            folder, attn_implementation="sdpa"
        ).eval()
        self.called = torch.compile(self.model) if compiled else self.model
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, weight_decay=1e-4)

    def forward(self, ids):
        with torch.inference_mode():
            return self.called(torch.tensor(ids), use_cache=False).logits.numpy()

    def gradient(self, ids):
        ids = torch.tensor(ids)
        self.optimizer.zero_grad()
        self.called(ids, labels=ids, use_cache=False).loss.backward()
        gradient = self.model.model.embed_tokens.weight.grad
        assert gradient is not None
        return gradient.numpy()

    def train(self, ids):
        self.gradient(ids)
        self.optimizer.step()

    def decode(self, ids, new: int):
        ids = torch.tensor(ids)
        with torch.inference_mode():
            answer = self.model.generate(  # pyright: ignore  # a mixin's, which stubs lack
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False
            )
        return answer[:, ids.shape[1] :].numpy()


def check(ours: Ours, theirs: ledger.OtherProcess, ids: np.ndarray) -> None:
    """Asserts that logits, a gradient and greedy text agree."""
    close(ours.forward(ids), theirs.get("forward", ids))
    gradient = nnx.merge(ours.graph, ours.gradient(ids)).embedding[...]
    close(gradient, theirs.get("gradient", ids))
    prompt = ids[:1, :PROMPT_LENGTH]
    answer = theirs.get("decode", prompt, ANSWER_LENGTH)
    np.testing.assert_array_equal(ours.decode(prompt, ANSWER_LENGTH), answer)


def measure(name: str, rounds: int, notes: list[str]) -> Iterator[dict]:
    """Yields the rows of one size; failures become notes."""
    read = READ[name]
    ids = np.random.default_rng(0).integers(0, SIZES[name]["vocab_size"], read)
    calls = {
        "forward": ("forward", (ids,), list(read)),
        "training step with AdamW": ("train", (ids,), list(read)),
        "prefill and one token": ("decode", (ids[:1], 1), [1, read[1]]),
        "greedy text with a cache": (
            "decode",
            (ids[:1, :PROMPT_LENGTH], ANSWER_LENGTH),
            [1, PROMPT_LENGTH, ANSWER_LENGTH],
        ),
    }
    with tempfile.TemporaryDirectory() as folder:
        save(SIZES[name], folder)
        for other, how in OTHERS.items():
            compiled = how.get("compiled", False)
            model = load_pretrained(Path(folder))
            assert isinstance(model, Decoder)
            ours = Ours(model)
            theirs = ledger.OtherProcess(
                Theirs, folder, compiled, keep_memory=how.get("keep_memory", False)
            )
            try:
                check(ours, theirs, ids)
            except RuntimeError as error:
                notes.append(f"{name}, {other}: {error}")
                continue
            for what, (method, args, shape) in calls.items():
                if compiled and method == "decode":  # `generate` runs eagerly
                    continue
                times = ledger.alternate(
                    functools.partial(getattr(ours, method), *args),
                    functools.partial(theirs.call, method, *args),
                    rounds,
                )
                facts = {"unit": "s", "dtype": "float32", "shape": shape}
                yield ledger.row(f"{name} against {other}: {what}", *times, **facts)
            theirs.close()


def main() -> None:
    """Measures, prints a table and writes `language_model.json`."""
    arguments = ledger.parser(__doc__, rounds=7).parse_args()
    keep_freed_memory()
    rows, notes = [], []
    for name in SIZES:
        for row in measure(name, arguments.rounds, notes):
            rows.append(row)
            print(ledger.table(rows)[-1], flush=True)
    ledger.write("language_model", rows, notes)


if __name__ == "__main__":
    main()
