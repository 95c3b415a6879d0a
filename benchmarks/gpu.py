"""Measures the rows that need a GPU; results are compared before they are timed.

    python -m benchmarks.gpu [--rows A1 C1 ...] [--rounds 20]
    python -m benchmarks.gpu --compile h100:1x1     without a GPU: compile each of our programs
    python -m benchmarks.gpu --small                without a GPU: run the script at toy sizes

| row | what | against |
|---|---|---|
| A1 | attention forward, 16 heads of 64, 10,992 tokens (VGGT's global layers) | cuDNN |
| A2 | attention forward, causal, 16 heads of 128, rows of 4,096 | cuDNN |
| A3 | as A2, 2,176 tokens, which all see the first 2,048 | cuDNN with the mask as an array |
| A4 | A2 forward and backward | cuDNN |
| M1 | selective scan of 3,072 channels, 4,096 positions, and gradients, fp32 | associative scan |
| C1 | cross-entropy, 4,096 tokens, 151,936 entries, and gradients | all logits at once |
| T1 | training step of Qwen2.5-1.5B, 2 rows of 4,096: TFLOP/s | the chip's peak: MFU |
| D1 | greedy text of Qwen2.5-1.5B, 64 + 256 tokens: GB/s of weights | the chip's bandwidth |
| D2 | as D1: tokens/s | transformers (needs PyTorch with CUDA) |
| D3 | one query, 12 heads of 128 over 2, to 32,768 keys: GB/s of cache | XLA, keys not split |
| L1 | `full` student: an answer of 64 tokens to 8 views | the paper's 15,330 ms (Table IV) |

In bfloat16 unless stated otherwise, with jax 0.10 or newer on CUDA 13. A row that fails prints its
error, and the others continue. Weights and inputs are random, since zeros would run faster.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from benchmarks import ledger
from configs import hidden_cot
from geode_jax.measure.chips import Chip, chip_of
from geode_jax.models.decoder import QWEN2P5_1P5B, Decoder
from geode_jax.models.decoding import for_decoding, with_decoding
from geode_jax.models.generate import generate
from geode_jax.objectives.losses import token_cross_entropy
from geode_jax.ops.attention import Intervals, attention, causal
from geode_jax.ops.cross_entropy import token_loss
from geode_jax.ops.gpu import use_kernels
from geode_jax.ops.selective_scan import selective_scan
from geode_jax.plan.compiled import make_run
from geode_jax.plan.topology import Topology, devices_of, parse_topology
from geode_jax.runs.config import make_settings
from geode_jax.sharding import make_mesh

NO_END_TOKEN = -1
"""An id that no model predicts, so every answer has its full length."""

LEAST_SECONDS = 0.05
"""Minimum duration of a measurement, in which calls follow each other without waiting."""


@dataclasses.dataclass
class Row:
    """A row to measure.

    Attributes:
        name: name of the row.
        ours: function of `args`.
        theirs: another function of `args`, or a known result in the unit of the row.
        args: shapes of arrays, which are filled with random numbers.
        unit: unit of the row.
        work: work of a call, in units of the row times seconds; None: the row is a time.
        tolerance: largest difference of results relative to the largest number; None: not compared.
    """

    name: str
    ours: Callable
    theirs: Callable | float
    args: tuple
    unit: str
    work: float | None = None
    tolerance: float | None = 0.02


def shape(*size: int, dtype=jnp.bfloat16) -> jax.ShapeDtypeStruct:
    """Returns the shape of an array."""
    return jax.ShapeDtypeStruct(size, dtype)


def filled(tree: Any) -> Any:
    """Returns arrays of normal random numbers, or of random integers 0 and 1."""
    keys = iter(jax.random.split(jax.random.key(0), len(jax.tree.leaves(tree))))

    def one(x):
        if jnp.issubdtype(x.dtype, jnp.floating):
            return jax.random.normal(next(keys), x.shape, x.dtype)
        return jnp.asarray(np.random.default_rng(0).integers(0, 2, x.shape), x.dtype)

    return jax.tree.map(one, tree)


def differentiated(f: Callable) -> Callable:
    """Returns a function for output and gradients; its last argument is the cotangent."""

    def both(*args):
        out, vjp = jax.vjp(f, *args[:-1])
        return out, *vjp(args[-1])

    return both


# --- The rows -------------------------------------------------------------------------------------


class Rows:
    """Each method whose name is capitalised makes a row.

    Args:
        small: use toy sizes, and only operations that every platform has.
        where: topology to compile for; None: measure on this machine.
    """

    def __init__(self, small: bool = False, where: Topology | None = None):
        self.small, self.where = small, where
        self.devices = (jax.devices() if where is None else devices_of(where))[:1]
        self.kernel = None if small else "gpu"

    def _attention(self, name, B, L, H, E, prefix, *, causally, backward=False) -> Row:
        if self.small:
            B, L, H, prefix = 1, 160, 2, min(prefix, 32)
        own = causal(B, L) if causally else Intervals(*(jnp.full((B, 1), x) for x in (0, 0, L)))
        rows = own._replace(prefix_end=jnp.full_like(own.end, prefix))
        mask = None
        if prefix:
            column = np.arange(L)
            mask = jnp.asarray((column < prefix) | (column <= column[:, None]))[None, None]

        def ours(q, k, v):
            return attention(q, k, v, rows, implementation=self.kernel)

        def theirs(q, k, v):
            return jax.nn.dot_product_attention(
                *(q, k, v),
                mask=mask,
                is_causal=causally and mask is None,
                implementation=None if self.small else "cudnn",
            )

        x = shape(B, L, H, E)
        flops = 4 * B * H * L * L * E / (2 if causally else 1) * (3.5 if backward else 1)
        if backward:
            both = differentiated(ours), differentiated(theirs)
            return Row(name, both[0], both[1], (x,) * 4, "TFLOP/s", flops / 1e12)
        return Row(name, ours, theirs, (x,) * 3, "TFLOP/s", flops / 1e12)

    def A1(self) -> Row:
        return self._attention("attention, full", 1, 10_992, 16, 64, 0, causally=False)

    def A2(self) -> Row:
        return self._attention("attention, causal", 4, 4096, 16, 128, 0, causally=True)

    def A3(self) -> Row:
        return self._attention("attention, prefix", 4, 2176, 16, 128, 2048, causally=True)

    def A4(self) -> Row:
        name = "attention, causal, forward and backward"
        return self._attention(name, 4, 4096, 16, 128, 0, causally=True, backward=True)

    def M1(self) -> Row:
        L, E, U = (40, 64, 4) if self.small else (4096, 3072, 16)

        def steps(delta):
            return jax.nn.softplus(delta - 4)

        def ours(u, delta, A, B, C, D):
            return selective_scan(u, steps(delta), -jnp.exp(A), B, C, D)[0]

        def theirs(u, delta, A, B, C, D):
            decay = jnp.exp(steps(delta)[..., None] * -jnp.exp(A))
            added = (steps(delta) * u)[..., None] * B[:, :, None]

            def join(a, b):
                return b[0] * a[0], b[0] * a[1] + b[1]

            states = jax.lax.associative_scan(join, (decay, added), axis=1)[1]
            return jnp.sum(states * C[:, :, None], axis=-1) + D * u

        f32 = functools.partial(shape, dtype=jnp.float32)
        args = (
            f32(1, L, E),
            f32(1, L, E),
            f32(E, U),
            f32(1, L, U),
            f32(1, L, U),
            f32(E),
            f32(1, L, E),
        )
        name = "selective scan, forward and backward"
        both = differentiated(ours), differentiated(theirs)
        return Row(name, both[0], both[1], args, "s", tolerance=1e-3)

    def C1(self) -> Row:
        T, D, X = (64, 32, 500) if self.small else (4096, 1536, 151_936)

        def ours(x, matrix, labels):
            counted = jnp.ones(labels.shape, bool)
            args = x, matrix, labels[..., None], counted
            return token_loss(token_cross_entropy, *args, tied=True) / counted.size

        def theirs(x, matrix, labels):
            logits = jnp.einsum("std,xd->stx", x, matrix, preferred_element_type=jnp.float32)
            label = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
            return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - label)

        args = shape(1, T, D), shape(X, D), shape(1, T, dtype=jnp.int32)
        both = [jax.value_and_grad(f, (0, 1)) for f in (ours, theirs)]
        return Row("cross-entropy with gradients", both[0], both[1], args, "s")

    def _qwen(self) -> tuple[nnx.GraphDef, nnx.State]:
        config = QWEN2P5_1P5B
        if self.small:
            config = dataclasses.replace(
                config, vocab_size=500, width=64, layers=2, heads=4, head_width=16, mlp_width=96
            )
        config = dataclasses.replace(config, remat="none" if self.small else "dots")
        return nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))

    def T1(self) -> Row:
        graph, state = self._qwen()
        B, L = (1, 32) if self.small else (2, 4096)
        optimizer = optax.adamw(1e-4)

        def loss(state, ids):
            model = nnx.merge(graph, state)
            positions = jnp.broadcast_to(jnp.arange(L), (B, L))
            hidden, _ = model.run(model.embed(ids), positions, causal(B, L))
            counted = jnp.broadcast_to(jnp.arange(L) < L - 1, (B, L))
            labels = jnp.roll(ids, -1, axis=1)[..., None]
            return model.token_loss(token_cross_entropy, hidden, labels, counted) / (B * L - B)

        def step(state, moments, ids):
            value, gradient = jax.value_and_grad(loss)(state, ids)
            updates, moments = optimizer.update(gradient, moments, state)
            return optax.apply_updates(state, updates), moments, value

        c = nnx.merge(graph, state).config
        matrices = sum(x.size for x in jax.tree.leaves(state))  # counts the tied head once
        attention_flops = 6 * c.layers * L * c.heads * c.head_width
        args = state, jax.eval_shape(optimizer.init, state), shape(B, L, dtype=jnp.int32)
        work = (6 * matrices + attention_flops) * B * L / 1e12
        peak = 1.0 if self.small else self.chip().flops / 1e12
        return Row("training step of Qwen2.5-1.5B, MFU", step, peak, args, "TFLOP/s", work, None)

    def _decoding(self) -> tuple[Callable, tuple, int, int]:
        graph, state = self._qwen()
        prompt, new = (8, 8) if self.small else (64, 256)
        ready = nnx.eval_shape(for_decoding, nnx.merge(graph, state))
        graph, state = nnx.split(ready)

        def decode(state, ids):
            model = nnx.merge(graph, state)
            length = jnp.full((1, 1), prompt)
            prefix = model.no_prefix(1)
            return generate(
                model, prefix, ids, length, max_new_tokens=new, eos_id=NO_END_TOKEN
            ).tokens_SQA

        size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
        return decode, (state, shape(1, 1, prompt, dtype=jnp.int32)), size, new

    def D1(self) -> Row:
        decode, args, size, new = self._decoding()
        roof = 1.0 if self.small else self.chip().hbm_bandwidth / 1e9
        return Row("greedy text, weights read", decode, roof, args, "GB/s", size * new / 1e9, None)

    def D2(self) -> Row:
        import torch
        import transformers

        if not (self.small or self.where or torch.cuda.is_available()):
            raise RuntimeError("PyTorch sees no GPU")
        decode, args, _, new = self._decoding()
        if self.where:
            return Row("greedy text", decode, 0.0, args, "tokens/s", new, None)
        c, device = QWEN2P5_1P5B, "cuda" if torch.cuda.is_available() else "cpu"
        sizes: dict[str, Any] = dict(
            vocab_size=c.vocab_size,
            hidden_size=c.width,
            num_hidden_layers=c.layers,
            num_attention_heads=c.heads,
            num_key_value_heads=c.kv_heads,
            intermediate_size=c.mlp_width,
        )
        if self.small:
            sizes |= dict(
                vocab_size=500, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
                intermediate_size=96,
            )  # fmt: skip
        config = transformers.Qwen2Config(**sizes, tie_word_embeddings=True, eos_token_id=None)
        with torch.device(device):
            model: Any = transformers.Qwen2ForCausalLM(config)  # its stubs lack `generate`
            model = model.to(torch.bfloat16).eval()
            ids = torch.zeros((1, args[1].shape[-1]), dtype=torch.long)

        def theirs(*_):
            with torch.inference_mode():
                answer = model.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False
                )
            return np.asarray(answer.cpu())

        # In bfloat16 greedy texts soon differ; `benchmarks.language_model` compares them in fp32.
        return Row("greedy text", decode, theirs, args, "tokens/s", new, None)

    def D3(self) -> Row:
        M = 160 if self.small else 32_768
        rows = Intervals(*(jnp.full((1, 1), x) for x in (0, 0, M)))
        cache = shape(1, M, 2, 128)
        both = [
            functools.partial(attention, intervals=rows, implementation=implementation)
            for implementation in (self.kernel, "dense")
        ]
        args = shape(1, 1, 12, 128), cache, cache
        work = 2 * cache.size * 2 / 1e9
        return Row("attention of one query", both[0], both[1], args, "GB/s", work)

    def L1(self) -> Row:
        config = hidden_cot.get_config("laptop" if self.small else "full")
        run = make_run(make_settings(config), self.devices, (1, 1, 1), 1)
        objective = run.objective
        model = nnx.merge(run.graph, run.state.params, run.state.frozen)
        graph, state = nnx.split(nnx.eval_shape(with_decoding, model))

        def answer(state, batch):
            model = nnx.merge(graph, state)
            encoded = objective.encode_scene(model, batch)
            return objective.answer(model, encoded, batch, NO_END_TOKEN)["tokens"]

        plain = jax.tree.map(lambda x: shape(*x.shape, dtype=x.dtype), (state, run.batch()))
        return Row("an answer of the full student", answer, 15_330.0, plain, "ms", None, None)

    def chip(self) -> Chip:
        """Returns the data sheet of the device."""
        if self.where is not None:
            return self.where.chip
        device = jax.devices()[0]
        if (found := chip_of(device)) is None:
            raise RuntimeError(f"no data sheet of {device.device_kind}")
        return found


# --- Measuring ------------------------------------------------------------------------------------


def timed(call: Callable[[], Any]) -> float:
    """Returns the mean duration of calls that follow each other."""
    out = jax.block_until_ready(call())
    started, calls = time.perf_counter(), 0
    while time.perf_counter() - started < LEAST_SECONDS:
        out = call()
        calls += 1
    jax.block_until_ready(out)
    return (time.perf_counter() - started) / calls


def measured(key: str, row: Row, rounds: int) -> dict:
    """Compares the results of a row, times them in alternation, and returns the ledger's row."""
    args, work, known = filled(row.args), row.work, row.theirs
    ours = functools.partial(jax.jit(row.ours), *args)

    def value(seconds: float) -> float:
        if work is None:
            return seconds * (1000 if row.unit == "ms" else 1)
        return work / seconds

    if callable(known):
        jitted = jax.jit(known) if row.tolerance is not None else known
        theirs = functools.partial(jitted, *args)
        if row.tolerance is not None:
            for a, b in zip(jax.tree.leaves(ours()), jax.tree.leaves(theirs()), strict=True):
                a, b = (np.asarray(x, np.float32) for x in (a, b))
                np.testing.assert_allclose(a, b, atol=row.tolerance * np.abs(b).max())
        pairs = [(value(timed(ours)), value(timed(theirs))) for _ in range(rounds)]
        our_values, their_values = [a for a, _ in pairs], [b for _, b in pairs]
    else:
        our_values = [value(timed(ours)) for _ in range(rounds)]
        their_values = [float(known)] * rounds
    return ledger.row(
        f"{key}: {row.name}",
        our_values,
        their_values,
        unit=row.unit,
        dtype=next(str(x.dtype) for x in jax.tree.leaves(row.args) if x.dtype != jnp.int32),
        shape=list(jax.tree.leaves(row.args)[-1].shape),
        more_is_better=work is not None,
    )


def compiled(key: str, row: Row, mesh: jax.sharding.Mesh) -> str:
    """Compiles our side for an absent device; returns a line with the compiler's figures."""
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def put(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole)

    with jax.set_mesh(mesh):
        program = jax.jit(row.ours).lower(*jax.tree.map(put, row.args)).compile()
    text, memory = program.as_text(), program.memory_analysis()
    assert text is not None and memory is not None  # the compiler of GPUs has both
    kernels = text.count('custom_call_target="mosaic_gpu')
    temporary = memory.temp_size_in_bytes / 1e9
    return f"{key}: {row.name}: compiled, {kernels} kernels of ours, {temporary:.2f} GB temporaries"


def main() -> None:
    """Measures, prints a table and writes `gpu.json`."""
    parser = ledger.parser(__doc__, rounds=20)
    names = [name for name in vars(Rows) if name[0].isupper()]
    parser.add_argument("--rows", nargs="+", choices=names, default=names)
    parser.add_argument("--compile", metavar="TOPOLOGY")
    parser.add_argument("--small", action="store_true")
    arguments = parser.parse_args()
    where = parse_topology(arguments.compile) if arguments.compile else None
    rows = Rows(arguments.small, where)
    mesh = make_mesh((1, 1, 1), rows.devices) if where else None
    found, failed = [], []
    for key in arguments.rows:
        try:
            if mesh is None:
                found.append(measured(key, getattr(rows, key)(), arguments.rounds))
                print(ledger.table(found)[-1], flush=True)
            else:
                print(compiled(key, getattr(rows, key)(), mesh), flush=True)
        except Exception as error:  # any library's; the other rows continue
            failed.append(f"{key}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
            print(f"failed: {failed[-1]}", flush=True)
    if found and not arguments.small:
        ledger.write("gpu", found, failed)
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    with use_kernels(True):
        main()
