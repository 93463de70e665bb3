"""Memory of every stage by formula: what one worker holds at the worst moment, and what the node shares.

Each function names the tensors that are alive together, in the order of the code that it plans for. Measured
constants say how they were measured. `benchmarks/plan_accuracy.py` compares these figures with measured peaks.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from nexus_ray.config import Config, ResourceStage
from nexus_ray.modeling.head import chunk_positions
from nexus_ray.planning.conversion import convert_needs
from nexus_ray.planning.needs import Part, Phase, StageNeeds, phase
from nexus_ray.planning.precomputing import precompute_phases
from nexus_ray.planning.sizes import ModelSizes
from nexus_ray.planning.storage import moments_bytes
from nexus_ray.planning.text import SourceText
from nexus_ray.planning.training import training_needs
from nexus_ray.planning.worker import FLOAT32, Worker

_LIVE_MOMENTS = 3  # of a unit so far, of a batch, and merged
_SCORED_BYTES = 64 << 20  # of float32 logits whose cross-entropy is taken together (`evaluation/perplexity.py`)
_LIVE_ROWS = 4  # probabilities, centred ones, selections, gates


def stage_needs(config: Config, sizes: ModelSizes, text: Mapping[str, SourceText]) -> list[StageNeeds]:
    """Memory of every stage that loads the model or writes its weights, in order."""

    def worker(stage: ResourceStage) -> Worker:
        return Worker.of(config.for_stage(stage), sizes, text)

    collect, precompute = worker("collect"), worker("precompute")
    evaluate, serve = worker("evaluate"), worker("serve")
    overlay = evaluate.overlay_loading()
    stages = [
        collect.stage("collect", collect.workers, _observation),
        convert_needs(worker("convert")),
        precompute.stage("precompute", precompute.workers, precompute_phases),
        training_needs(worker("train")),
        evaluate.stage("evaluate", evaluate.workers, _evaluation, host=overlay),
        serve.stage("serve", config.serve.replicas, _serving, host=overlay),
    ]
    return [stage for stage in stages if stage.phases]


def _observation(worker: Worker) -> list[Phase]:
    """The layers at work, without the head; then one layer's probabilities and the moments of a batch and of a unit."""
    sequences, dimensions = worker.config.collect.batch_sequences, worker.sizes.dimensions
    rows = sequences * worker.config.data.sequence_length * dimensions.experts * FLOAT32
    moments = Part("moments", _LIVE_MOMENTS * moments_bytes(worker.sizes) + _LIVE_ROWS * rows, "in float64")
    forward = worker.forward(sequences)
    return [phase("layers", *worker.fixed(), forward), phase("moments", *worker.fixed(), moments, forward)]


def _evaluation(worker: Worker) -> list[Phase]:
    """The layers of a batch; then the head over a few positions, beside the states of those that are scored.

    The base's router logits stay while the student runs. Rolling windows have no more positions than sequences.
    """
    sequences, vocabulary = worker.config.evaluate.batch_sequences, worker.sizes.vocabulary
    work, dimensions = worker.work(sequences), worker.sizes.dimensions
    fixed = (*worker.fixed(), worker.shared_experts())
    routers = work.tokens * dimensions.layers * dimensions.experts * FLOAT32
    beside = Part("router logits", 2 * routers, "of both models, float32", routers)
    hidden = 2 * work.tokens * dimensions.hidden_size * worker.dtype.itemsize
    states = Part("hidden states", hidden, "all, and the scored ones", worker.activation_block(sequences))
    positions = min(chunk_positions(vocabulary, worker.device), work.tokens)
    chunk = positions * vocabulary * FLOAT32
    cast = 0 if worker.dtype == torch.float32 else positions * vocabulary * worker.dtype.itemsize
    note = f"{positions:,} positions, float32, and their log-softmax"
    logits = Part("logits of a chunk", chunk + max(chunk, cast), note, chunk)
    layers = phase("layers", *fixed, worker.forward(sequences), beside)
    if not worker.is_first:
        return [layers]
    return [
        layers,
        phase("scoring", *fixed, beside, states, logits),
    ]


def _inference(worker: Worker, sequences: int, *, student: bool) -> list[Phase]:
    """The layers at work, then logits in the compute type and the cross-entropy of a few positions at a time."""
    fixed = (*worker.fixed(), worker.shared_experts()) if student else worker.fixed()
    size, chunk = worker.logits(sequences), min(_SCORED_BYTES, worker.logits(sequences, itemsize=FLOAT32))
    units = 1 if worker.dtype == torch.float32 else 2  # log-probabilities, and logits that are cast
    logits = Part("logits", size, block=size)
    losses = Part("cross-entropy", units * chunk, "of a few positions, float32", chunk)
    layers = phase("layers", *fixed, worker.forward(sequences))
    return [layers, phase("logits", *fixed, logits, losses)] if worker.is_first else [layers]


def _serving(worker: Worker) -> list[Phase]:
    """One request at a time: a prompt of `data.sequence_length` with its answer, or the scoring of a text."""
    config = worker.config
    prompt = min(config.data.sequence_length, worker.sizes.context)
    keys = kv_cache_bytes(worker.sizes, prompt + config.serve.max_new_tokens, worker.dtype.itemsize)
    cache = Part("KV cache", worker.share(keys))
    fixed = (*worker.fixed(), worker.shared_experts())
    scoring = _inference(worker, config.evaluate.batch_sequences, student=True)
    return [phase("generating", *fixed, cache, worker.forward(1, prompt)), *scoring]


def kv_cache_bytes(sizes: ModelSizes, tokens: int, itemsize: int) -> int:
    """Keys and values of one sequence; a sliding layer keeps its window only."""
    window = min(tokens, sizes.sliding_window or tokens)
    full = sizes.dimensions.layers - sizes.sliding_layers
    return 2 * sizes.key_value_heads * sizes.head_dim * (full * tokens + sizes.sliding_layers * window) * itemsize
