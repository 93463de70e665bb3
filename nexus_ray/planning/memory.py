"""Memory of every stage by formula: what one worker holds at the worst moment, and what the node shares.

Each function names the tensors that are alive together, in the order of the code that it plans for. Measured
constants say how they were measured. `benchmarks/plan_accuracy.py` compares these figures with measured peaks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from nexus_ray.config import Config
from nexus_ray.planning.activations import Workload, layer_working, saved_for_backward
from nexus_ray.planning.losses import LossBuffers, loss_buffers, micro_batches, online_teacher, worker_steps
from nexus_ray.planning.needs import MIB, Device, Part, Phase, StageNeeds, phase
from nexus_ray.planning.sizes import ModelSizes
from nexus_ray.planning.storage import target_bytes, target_bytes_per_token
from nexus_ray.planning.text import SourceText
from nexus_ray.planning.weights import (
    BaseWeights,
    OverlaySize,
    base_part,
    base_weights,
    compute_device,
    compute_dtype,
    overlay_part,
    overlay_size,
    overlay_width,
)

_FLOAT32 = 4
# Anonymous memory (RssAnon in /proc/self/status) of a process apart from its tensors, measured on Linux.
WORKER_PROCESS = 360 * MIB  # a Ray actor that has imported nexus_ray.training.distil and ray.train
CONVERT_PROCESS = 285 * MIB  # `nexus-ray convert` after its last layer: imports, tables, stacks and arenas of threads
CUDA_CONTEXT = 500 * MIB  # driver context and kernels on each device; assumed, not measured
_KERNELS = 18 * MIB  # compiled kernels of the shapes that `cluster.configure_torch` lets oneDNN keep, and tables
_TARGET_TABLES = 64  # files of targets that a worker keeps open, uncompressed
_SHARD_COPIES = 2  # of a shard's targets while they are written


@dataclass(frozen=True)
class Worker:
    """What all stages of a run with a model in memory have in common.

    Attributes:
        config: the run.
        sizes: of the base.
        device: where the model is.
        devices: how many one worker spreads it over.
        dtype: of the model's computation.
        weights: of the base.
        overlay: counts of the shared experts.
        text: training text by source.
    """

    config: Config
    sizes: ModelSizes
    device: Device
    devices: int
    dtype: torch.dtype
    weights: BaseWeights
    overlay: OverlaySize
    text: Mapping[str, SourceText]

    @classmethod
    def of(cls, config: Config, sizes: ModelSizes, text: Mapping[str, SourceText] | None = None) -> Worker:
        """The worker of a run."""
        device, dtype = compute_device(config), compute_dtype(config)
        weights = base_weights(sizes, packed=config.model.experts == "packed", dtype=dtype, device=device)
        devices = max(1, int(config.resources.gpus_per_worker))
        return cls(config, sizes, device, devices, dtype, weights, overlay_size(sizes, config), text or {})

    def work(self, sequences: int, length: int | None = None) -> Workload:
        """A forward pass of this many sequences."""
        convert = self.config.convert
        return Workload(
            sequences=sequences,
            length=length or self.config.data.sequence_length,
            itemsize=self.dtype.itemsize,
            experts=self.config.model.experts,
            width=overlay_width(self.sizes, self.config),
            token_gate=convert.token_gate,
            learn_scale=convert.learn_scale,
        )

    def fixed(self) -> tuple[Part, Part]:
        """The process and the base's weights, on one device."""
        process = Part("process", WORKER_PROCESS + _KERNELS, "interpreter, torch, transformers, Ray")
        if self.device == "cuda":
            process = Part("CUDA context", CUDA_CONTEXT)
        packed = self.config.model.experts == "packed"
        return process, base_part(self.sizes, self.weights, packed=packed, dtype=self.dtype, devices=self.devices)

    def logits(self, sequences: int, length: int | None = None, itemsize: int | None = None) -> int:
        """Bytes of [sequences, length, vocabulary] values, by default in the compute type."""
        tokens = sequences * (length or self.config.data.sequence_length)
        return tokens * self.sizes.vocabulary * (itemsize or self.dtype.itemsize)

    def activation_block(self, sequences: int, length: int | None = None) -> int:
        """Bytes of the largest activations of a layer."""
        work = self.work(sequences, length)
        return work.tokens * max(2 * work.width * work.itemsize, self.sizes.dimensions.hidden_size * _FLOAT32)

    def stage(self, name: str, processes: int, *phases: Phase) -> StageNeeds:
        """The needs of a stage whose workers hold the model."""
        host = WORKER_PROCESS + self.sizes.largest_tensor_bytes if self.device == "cuda" else 0
        return StageNeeds(name, processes, self.device, self.devices, phases, self.weights.mapped, host)


def stage_needs(config: Config, sizes: ModelSizes, text: Mapping[str, SourceText]) -> list[StageNeeds]:
    """Memory of every stage that loads the model or writes its weights, in order."""
    worker = Worker.of(config, sizes, text)
    workers = config.resources.workers
    stages = [
        worker.stage("collect", workers, *_inference(worker, config.collect.batch_sequences, student=False)),
        convert_needs(worker),
        worker.stage("precompute", workers, *_precompute(worker)),
        training_needs(worker),
        worker.stage("evaluate", workers, *_inference(worker, config.evaluate.batch_sequences, student=True)),
        worker.stage("serve", config.serve.replicas, *_serving(worker)),
    ]
    return [stage for stage in stages if stage.phases]


def convert_needs(worker: Worker) -> StageNeeds:
    """Conversion streams layer by layer in one process on the CPU; `lstsq` also runs the base."""
    if worker.config.convert.initialisation == "lstsq":
        return worker.stage("convert", 1, *_least_squares(worker))
    parts = (
        Part("process", CONVERT_PROCESS, "interpreter, torch, threads"),
        Part("one layer", _layer_in_the_making(worker), "matrices in float32; one layer at a time"),
    )
    return StageNeeds("convert", 1, "cpu", 1, (phase("averaging", *parts),))


def _layer_in_the_making(worker: Worker) -> int:
    """Gate and up, and the down projection as summed, arranged and scaled; while experts are aligned, the reference,
    the total and the next one with a copy of gates and ups of two, and three [width, width] similarities."""
    hidden, inner = worker.sizes.dimensions.hidden_size, worker.sizes.dimensions.intermediate_size
    if worker.config.convert.initialisation.startswith("aligned_"):
        return ((3 * 3 + 2 * 2) * hidden + 3 * inner) * inner * _FLOAT32
    return (2 + 3) * hidden * inner * _FLOAT32


def _forward(worker: Worker, sequences: int, length: int | None = None) -> Part:
    """Activations of a pass without gradients: the residual stream, one layer at work, all router logits."""
    work, dimensions = worker.work(sequences, length), worker.sizes.dimensions
    stream = 4 * work.tokens * dimensions.hidden_size * _FLOAT32
    size = stream + layer_working(worker.sizes, work) + work.tokens * dimensions.layers * dimensions.experts * _FLOAT32
    return Part("activations", size, f"{work.tokens:,} tokens", worker.activation_block(sequences, length))


def _vocabulary_part(name: str, size: int, copies: int = 1, note: str = "") -> Part:
    """Values over the vocabulary: `copies` tensors of `size` bytes each."""
    return Part(name, copies * size, note, size)


def _inference(worker: Worker, sequences: int, *, student: bool) -> list[Phase]:
    """Logits in the compute type and in float32, next to those of the batch before where it keeps them."""
    fixed = (*worker.fixed(), overlay_part(worker.overlay)) if student else worker.fixed()
    single, cast = worker.logits(sequences, itemsize=_FLOAT32), worker.logits(sequences)
    both = _vocabulary_part("logits", single, note="float32")
    own = _vocabulary_part("logits, own type", cast if worker.dtype != torch.float32 else 0)
    before = _vocabulary_part("earlier logits", 0 if student else single)
    return [
        phase("layers", *fixed, _forward(worker, sequences), before),
        phase("logits", *fixed, both, own, before),
    ]


def _precompute(worker: Worker) -> list[Phase]:
    """Float32 logits, a copy without the kept tokens and the exponentials of their sum; the targets of a shard."""
    config = worker.config
    if config.train.mode == "online":
        return []
    sequences = config.targets.batch_sequences
    logits = worker.logits(sequences, itemsize=_FLOAT32)
    shard = max((_shard_targets(worker, name) for name in worker.text), default=0)
    rows = Part("targets", _SHARD_COPIES * shard, "of one shard, in lists and as a table")
    return [
        phase("layers", *worker.fixed(), rows, _forward(worker, sequences)),
        phase("compression", *worker.fixed(), rows, _vocabulary_part("logits", logits, 3, "float32, three copies")),
    ]


def _shard_targets(worker: Worker, source: str) -> int:
    """Uncompressed bytes of the targets of one shard of a source."""
    text = worker.text[source]
    return text.tokens // text.shards * target_bytes_per_token(worker.config, worker.sizes, source)


def _least_squares(worker: Worker) -> list[Phase]:
    """The base, a batch of calibration text, and the normal equations of one layer in float64."""
    sequences, hidden = worker.config.convert.calibration_sequences, worker.sizes.dimensions.hidden_size
    width, tokens = overlay_width(worker.sizes, worker.config), sequences * worker.config.data.sequence_length
    equations = (3 * width * width + 2 * width * hidden) * 8
    features = tokens * (3 * width + hidden) * _FLOAT32
    calibration = Part("calibration", equations + features, "features, normal equations, factor")
    logits = _vocabulary_part("logits", worker.logits(sequences))
    return [phase("fitting", *worker.fixed(), _forward(worker, sequences), calibration, logits)]


def training_needs(worker: Worker) -> StageNeeds:
    """Training: the worst of its micro-batches at each moment, and the optimiser's step."""
    always = (*worker.fixed(), *_state(worker), *_open_targets(worker))
    phases = [phase("optimiser step", *always, *_gradients(worker), _optimiser_working(worker))]
    distinct = {tuple(batch.items()): batch for batch in micro_batches(worker.config)}
    for batch in distinct.values():
        phases += _micro_batch_phases(worker, batch, always)
    return worker.stage("train", worker.config.resources.workers, *phases)


def _micro_batch_phases(worker: Worker, batch: dict[str, int], always: tuple[Part, ...]) -> list[Phase]:
    """The moments of one micro-batch, which holds `batch` sequences by source."""
    config, sequences = worker.config, sum(batch.values())
    terms = {"vocabulary": worker.sizes.vocabulary, "itemsize": worker.dtype.itemsize}
    buffers = loss_buffers(batch, config, **terms, length=config.data.sequence_length)
    teacher = online_teacher(batch, config, **terms, length=config.data.sequence_length)
    several = worker_steps(config) > 1
    earlier = _gradients(worker) if several else _buckets(worker)
    logits = (
        _vocabulary_part("logits", worker.logits(sequences)),
        _vocabulary_part("teacher's logits", teacher),
    )
    before = _vocabulary_part("earlier logits", worker.logits(sequences) if several else 0)
    work, block = worker.work(sequences), worker.activation_block(sequences)
    saved = saved_for_backward(worker.sizes, work) // worker.devices
    activations = Part("activations", saved, f"{work.tokens:,} tokens, kept for backward", block)
    working = Part("one layer at work", layer_working(worker.sizes, work), block=block)
    return [
        phase("forward", *always, *earlier, activations, *logits, before, working),
        phase("loss", *always, *earlier, activations, *logits, _loss_part(buffers, buffers.forward)),
        phase("loss backward", *always, *earlier, activations, *logits, _loss_part(buffers, buffers.backward)),
        phase("backward", *always, *_gradients(worker), *logits, working),
    ]


def _loss_part(buffers: LossBuffers, working: int) -> Part:
    return Part("loss buffers", buffers.saved + working, "float32 over the vocabulary", buffers.block)


def _open_targets(worker: Worker) -> tuple[Part, ...]:
    """The uncompressed tables of target files that a worker keeps."""
    shards = sum(text.shards for text in worker.text.values())
    if not shards:
        return ()
    size = target_bytes(worker.config, worker.sizes, worker.text) * min(_TARGET_TABLES, shards) // shards
    return (Part("targets", size, f"of up to {_TARGET_TABLES} files of {shards}, uncompressed"),)


def _state(worker: Worker) -> tuple[Part, Part]:
    """Master weights and both moments of AdamW, one device's share."""
    masters = overlay_part(worker.overlay)
    moments = 2 * worker.overlay.trained * _FLOAT32 // worker.devices
    return (
        Part(masters.name, masters.size // worker.devices, masters.note),
        Part("AdamW moments", moments, "two float32 a parameter"),
    )


def _gradients(worker: Worker) -> tuple[Part, ...]:
    gradients = Part("gradients", worker.overlay.trained * _FLOAT32 // worker.devices, "float32")
    return (gradients, *_buckets(worker))


def _buckets(worker: Worker) -> tuple[Part, ...]:
    """DDP's communication buffers, as large as the gradients; none for one worker."""
    if worker.config.resources.workers == 1:
        return ()
    return (Part("DDP buckets", worker.overlay.trained * _FLOAT32 // worker.devices, "float32"),)


def _optimiser_working(worker: Worker) -> Part:
    """The update in the making: of the largest tensor on a CPU, of all at once on a GPU."""
    if worker.device == "cpu":
        return Part("AdamW update", 2 * worker.overlay.largest * _FLOAT32, "of the largest tensor")
    return Part("AdamW update", worker.overlay.trained * _FLOAT32 // worker.devices, "of all tensors")


def _serving(worker: Worker) -> list[Phase]:
    """One request at a time: a prompt of `data.sequence_length` with its answer, or the scoring of a text."""
    config = worker.config
    prompt = min(config.data.sequence_length, worker.sizes.context)
    cache = Part("KV cache", kv_cache_bytes(worker.sizes, prompt + config.serve.max_new_tokens, worker.dtype.itemsize))
    fixed = (*worker.fixed(), overlay_part(worker.overlay))
    scoring = _inference(worker, config.evaluate.batch_sequences, student=True)
    return [phase("generating", *fixed, cache, _forward(worker, 1, prompt)), *scoring]


def kv_cache_bytes(sizes: ModelSizes, tokens: int, itemsize: int) -> int:
    """Keys and values of one sequence; a sliding layer keeps its window only."""
    window = min(tokens, sizes.sliding_window or tokens)
    full = sizes.dimensions.layers - sizes.sliding_layers
    return 2 * sizes.key_value_heads * sizes.head_dim * (full * tokens + sizes.sliding_layers * window) * itemsize
