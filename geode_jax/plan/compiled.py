"""Compiles the real steps for devices that are absent, and collects the compiler's figures."""

import contextlib
import dataclasses
import importlib.metadata
import re
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx

from geode_jax.errors import UserError
from geode_jax.measure.cost import parameter_counts
from geode_jax.measure.flops import count_flops, model_flops
from geode_jax.objectives.base import Objective
from geode_jax.plan.described import Described, abstract_batch, describe
from geode_jax.plan.hlo import Collective, Module
from geode_jax.runs.settings import Settings
from geode_jax.shapes import Batch
from geode_jax.sharding import batch_sharding, make_mesh, replicated
from geode_jax.training.optimizer import make_optimizer
from geode_jax.training.step import TrainState, blueprint, make_train_step

GPU_OPTIONS = {"xla_gpu_enable_triton_gemm": False}
"""Without a GPU to autotune on, the compiler finds no Triton tiles for some products."""

KERNEL = re.compile(r"\b(?:attention|selective_scan)_(?:forward|backward)(?:_\w+)?\b")
"""Names of the kernels of `ops` in compiled programs."""


@dataclasses.dataclass(frozen=True)
class Program:
    """Figures of one compiled step, per device unless stated otherwise.

    Attributes:
        arguments, outputs, temporaries: bytes; `outputs` without those that reuse an argument's
            memory. 0 if the compiler ran out of device memory.
        peak: bytes in use at the peak; if the compiler ran out of memory, the bytes it needed.
        refused: the compiler's message if it ran out of memory, else "".
        flops: FLOPs of matrix products on all devices, as written (with rematerialisation).
        device_flops: FLOPs of the compiled program on one device.
        collectives: exchanges with other devices.
        unknown_loops: loops with an unknown number of iterations, which count once.
        kernels: names of this package's kernels that the program calls.
        seconds: compile time.
    """

    arguments: int
    outputs: int
    temporaries: int
    peak: int
    refused: str
    flops: int
    device_flops: int
    collectives: tuple[Collective, ...]
    unknown_loops: int
    kernels: tuple[str, ...]
    seconds: float


@dataclasses.dataclass(frozen=True)
class Run:
    """The steps of a configuration on a mesh, as shapes.

    Attributes:
        settings: settings with the planned `data.scenes_per_batch`.
        data: description of the data.
        objective, mesh: as in a run.
        make_optimizer: maps parameters to their optimizer.
        graph, optimizer, state: result of `training.step.blueprint`.
        compiler: name and version of the compiler's package.
        compiler_options: options of every compilation.
    """

    settings: Settings
    data: Described
    objective: Objective
    mesh: jax.sharding.Mesh
    make_optimizer: Callable[[nnx.State], optax.GradientTransformation]
    graph: nnx.GraphDef
    optimizer: optax.GradientTransformation
    state: TrainState
    compiler: str
    compiler_options: dict[str, bool]

    @property
    def steps(self) -> int:
        """Number of training steps."""
        train, scenes = self.settings.train, self.settings.data.scenes_per_batch
        return train.steps or train.epochs * max(1, self.data.scenes // scenes)

    @property
    def shards(self) -> int:
        """Number of devices over which the scenes of a batch are spread."""
        return self.mesh.shape["data"] * self.mesh.shape["fsdp"]

    def batch(self) -> Batch:
        """Returns the shapes of a batch with the shardings of `sharding.shard_batch`."""
        sharding = batch_sharding(self.mesh, self.settings.data.scenes_per_batch)
        return abstract_batch(self.settings, self.data, sharding)

    def parameters(self) -> dict[str, int]:
        """Returns the numbers of all `parameters` and of the `trainable` ones."""
        learned = parameter_counts(self.state.params)["parameters"]
        return {
            "parameters": learned + parameter_counts(self.state.frozen)["parameters"],
            "trainable": learned,
        }

    def state_bytes(self) -> int:
        """Returns the bytes of parameters and optimizer state on one device, without a batch."""
        leaves = jax.tree.leaves(self.state)
        return sum(
            int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize
            for leaf in leaves
        )

    def decoder_bytes(self) -> int:
        """Returns the bytes of the decoder's matrices on all devices, in the activations' dtype."""
        decoders = []
        for part in (self.state.params, self.state.frozen):
            decoders += [leaf for path, leaf in nnx.to_flat_state(part) if "decoder" in path]
        width = 2 if self.settings.dtype in ("bfloat16", "float16") else 4
        return width * sum(int(np.prod(leaf.shape)) for leaf in decoders)

    def model_flops(self) -> int:
        """Returns the model FLOPs of a training step."""
        micro = self.settings.train.microbatches
        return model_flops(self.objective, self.make_optimizer, self.mesh, self.batch(), micro)

    def train_step(self) -> Program:
        """Compiles the training step."""
        step = make_train_step(
            self.objective,
            self.graph,
            self.optimizer,
            self.state,
            self.settings.train.microbatches,
        )
        return self._compiled(step, 1)

    def answers(self) -> Program:
        """Compiles greedy answering of a batch, each answer `data.answer_length` tokens long."""

        def answer(state, batch):
            model = nnx.merge(self.graph, state.params, state.frozen)
            encoded = self.objective.encode_scene(model, batch)
            return self.objective.answer(model, encoded, batch, self.data.eos_id)

        step = jax.jit(answer, out_shardings=replicated(self.mesh))
        return self._compiled(step, self.data.answer_length)

    def _compiled(self, step: Any, trips: int) -> Program:
        args = self.state, self.batch()
        started = time.monotonic()
        with jax.set_mesh(self.mesh), _quietly():
            flops = count_flops(step, *args, while_trips=trips)
            lowered = step.lower(*args)
            try:
                compiled = lowered.compile(compiler_options=self.compiler_options)
            except Exception as error:  # plugins raise any type
                peak = missing_memory(str(error))
                if peak is None:
                    raise
                words = " ".join(str(error).split())[:400]
                seconds = time.monotonic() - started
                return Program(0, 0, 0, peak, words, flops, 0, (), 0, (), seconds)
        text = _text(compiled, self.compiler)
        memory, module = compiled.memory_analysis(), Module(text)
        kept = memory.output_size_in_bytes - memory.alias_size_in_bytes
        return Program(
            arguments=memory.argument_size_in_bytes,
            outputs=kept,
            temporaries=memory.temp_size_in_bytes,
            peak=memory.argument_size_in_bytes + kept + memory.temp_size_in_bytes,
            refused="",
            flops=flops,
            device_flops=module.flops(),
            collectives=tuple(module.collectives(tuple(self.mesh.shape.values()))),
            unknown_loops=module.unknown_loops,
            kernels=tuple(sorted(set(KERNEL.findall(text)))),
            seconds=time.monotonic() - started,
        )


def make_run(
    settings: Settings,
    devices: Sequence,
    mesh: tuple[int, int, int] | None = None,
    scenes: int | None = None,
) -> Run:
    """Returns the steps of a configuration on these devices.

    Args:
        settings: settings of the run.
        devices: result of `topology.devices_of`.
        mesh: sizes of data, fsdp, model; None: those of the configuration.
        scenes: scenes of a batch; None: those of the configuration.

    Raises:
        UserError: a field that breaks its rule, or a mesh that does not fit the devices.
    """
    if scenes:
        settings = settings.with_scenes(scenes)
    try:
        planned_mesh = make_mesh(mesh or settings.mesh, list(devices))
    except ValueError as error:
        raise UserError(f"--mesh: {error}") from None
    data = describe(settings)
    objective = settings.system.make_objective(settings, data, data, data)
    optimizer_config = settings.optimizer.over(100)

    def optimizer_of(params):
        return make_optimizer(optimizer_config, params)

    graph, optimizer, state = blueprint(objective, optimizer_of, planned_mesh)
    platform = devices[0].platform
    package = {"tpu": "libtpu", "gpu": "jax-cuda13-pjrt"}.get(platform, "jaxlib")
    return Run(
        settings,
        data,
        objective,
        planned_mesh,
        optimizer_of,
        graph,
        optimizer,
        state,
        compiler=f"{package} {importlib.metadata.version(package)}",
        compiler_options=GPU_OPTIONS if platform == "gpu" else {},
    )


def _text(compiled: Any, compiler: str) -> str:
    """Returns the compiled program's text; jax reads only programs of its compiler's version."""
    try:
        return compiled.as_text()
    except Exception as error:  # of any type
        raise UserError(
            f"plan: jax {jax.__version__} cannot read the programs of {compiler}; install the "
            "version that the extra `plan` names"
        ) from error


def missing_memory(error: str) -> int | None:
    """Returns the bytes that a compiler's error message asks for, 0 if it has no figure.

    None: the error is not about memory.
    """
    if "RESOURCE_EXHAUSTED" not in error and "out of memory" not in error.lower():
        return None
    found = re.search(r"[Uu]sed ([\d.]+)([KMGT]?) of|\(([\d.]+)([KMGT]?)\) exceeds", error)
    if not found:
        return 0
    number, unit = (text for text in found.groups() if text is not None)
    return int(float(number) * 1024 ** " KMGT".index(unit or " "))


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Silences the warning about donated arguments that the compiler cannot reuse."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Some donated buffers were not usable")
        yield
