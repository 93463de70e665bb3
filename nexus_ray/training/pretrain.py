"""Pretraining a small GPT-OSS-architecture MoE from scratch: how the embedded model was made.

Text is packed once into a target set without a teacher; data-parallel workers then train on it in bfloat16 with
float32 weights. The best weights by validation loss are exported with MXFP4 experts.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoTokenizer, GptOssConfig, GptOssForCausalLM, PreTrainedTokenizerBase

from nexus_ray.cluster import set_worker_threads
from nexus_ray.config import ArchitectureSection, OptimiserSection, PretrainRun
from nexus_ray.data.packing import separator_id
from nexus_ray.storage import digest, write_json
from nexus_ray.targets.precompute import PrecomputeJob, precompute
from nexus_ray.targets.reader import TargetBatch, TargetSet
from nexus_ray.training import trainer
from nexus_ray.training.checkpointing import save_checkpoint
from nexus_ray.training.metrics import MetricsLog
from nexus_ray.training.order import SourceOrder, micro_batches, share
from nexus_ray.training.schedule import learning_rate

logger = logging.getLogger(__name__)


def pretrain(run: PretrainRun) -> Path:
    """Pack the text, train, export. Each part is skipped when it is complete.

    Returns:
        The Hugging Face directory of the exported model.
    """
    directory = run.run.directory
    if not (directory / "sequences" / "manifest.json").exists():
        precompute(_packing_job(run), directory / "sequences", run.resources)
    if not (directory / "finished.json").exists():
        arguments = {"run": run.model_dump(mode="json")}
        section = run.pretrain
        trainer.run_distributed(
            _loop, arguments, directory / "train", run.resources, keep_checkpoints=section.keep_checkpoints
        )
        write_json(directory / "finished.json", {"steps": section.steps})
    from nexus_ray.training.pretrain_export import export_pretrained

    return export_pretrained(run)


def _packing_job(run: PretrainRun) -> PrecomputeJob:
    names = tuple(run.data.sources)
    recipe = digest({"data": run.data.model_dump(mode="json"), "tokenizer": str(run.pretrain.tokenizer)})
    return PrecomputeJob(run.data, names, run.pretrain.tokenizer, None, None, recipe)


def build_config(shape: ArchitectureSection, tokenizer: PreTrainedTokenizerBase) -> GptOssConfig:
    """The transformers configuration of a model of this shape with this tokenizer's vocabulary."""
    return GptOssConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.layers,
        num_local_experts=shape.experts,
        num_experts_per_tok=shape.experts_per_token,
        head_dim=shape.head_dim,
        num_attention_heads=shape.attention_heads,
        num_key_value_heads=shape.key_value_heads,
        sliding_window=shape.sliding_window,
        max_position_embeddings=shape.max_position_embeddings,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": shape.rope_theta,
            "factor": shape.rope_factor,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": int(shape.max_position_embeddings / shape.rope_factor),
        },
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


class PretrainModule(nn.Module):
    """The model as a loss: sums over tokens, so that any split of the global batch adds up."""

    def __init__(self, model: GptOssForCausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Summed next-token cross-entropy (nats) and the load-balancing loss of [sequences, length] tokens."""
        with torch.autocast(input_ids.device.type, torch.bfloat16):
            output = self.model(
                input_ids=input_ids, attention_mask=valid.long(), use_cache=False, output_router_logits=True
            )
        logits = output.logits[:, :-1].float()
        targets = input_ids[:, 1:].masked_fill(~valid[:, 1:], -100)
        cross_entropy = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")
        return cross_entropy, output.aux_loss


@dataclass
class _Trainer:
    """What a worker keeps while it trains."""

    run: PretrainRun
    sequences: TargetSet
    order: SourceOrder
    module: nn.Module
    model: GptOssForCausalLM
    optimiser: torch.optim.Optimizer
    tokenizer: PreTrainedTokenizerBase
    device: torch.device

    def batch(self, batch: TargetBatch) -> tuple[Tensor, Tensor]:
        return batch.input_ids.to(self.device), batch.valid.to(self.device)


def _loop(arguments: dict[str, Any]) -> None:
    """Ray Train's per-worker function."""
    worker = _setup(PretrainRun.model_validate(arguments["run"]))
    run, section = worker.run, worker.run.pretrain
    parameters = dict(worker.model.named_parameters())
    state = {"best": float("inf")} | trainer.restore(parameters, worker.optimiser)
    rank, _ = trainer.world()
    log = MetricsLog(run.run.directory / "metrics.jsonl", state["step"]) if rank == 0 else None
    for step in range(state["step"], section.steps):
        started = time.monotonic()
        record = _step(worker, step)
        state["step"] = step + 1
        if log:
            log.write("step", step, **record, seconds=time.monotonic() - started)
        if (step + 1) % section.validate_every == 0 or step + 1 == section.steps:
            losses = _validate(worker)
            if log:
                _record_validation(worker, log, step, losses)
            if losses["mean"] < state["best"]:
                state["best"] = losses["mean"]
                if log:
                    save_checkpoint(run.run.directory / "best", parameters, worker.optimiser, state)
        if (step + 1) % section.checkpoint_every == 0 or step + 1 == section.steps:
            trainer.checkpoint(parameters, worker.optimiser, state, {"step": float(step)})


def _setup(run: PretrainRun) -> _Trainer:
    set_worker_threads(run.resources)
    section, device = run.pretrain, trainer.device()
    tokenizer = AutoTokenizer.from_pretrained(section.tokenizer)
    torch.manual_seed(run.run.seed)
    model = GptOssForCausalLM._from_config(
        build_config(section.architecture, tokenizer),
        attn_implementation="eager",
        experts_implementation="grouped_mm",
    ).to(device)
    sequences = TargetSet.open(run.run.directory / "sequences")
    import numpy as np

    rows = np.concatenate([sequences.rows(name) for name in run.data.sources])
    order = SourceOrder(rows, section.sequences_per_step, section.validation_sequences, run.run.seed, "pretrain")
    module = trainer.data_parallel(PretrainModule(model).train())
    optimiser = adamw(dict(model.named_parameters()), section.optimiser)
    return _Trainer(run, sequences, order, module, model, optimiser, tokenizer, device)


def adamw(parameters: dict[str, nn.Parameter], section: OptimiserSection) -> torch.optim.AdamW:
    """AdamW whose weight decay leaves biases, norms and attention sinks alone."""
    decayed = [p for name, p in parameters.items() if not _undecayed(name)]
    kept = [p for name, p in parameters.items() if _undecayed(name)]
    groups = [
        {"params": decayed, "weight_decay": section.weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=section.learning_rate, betas=(section.beta1, section.beta2))


def _undecayed(name: str) -> bool:
    return name.endswith(("bias", "sinks", "scale")) or "norm" in name


def _step(worker: _Trainer, step: int) -> dict[str, float]:
    """One optimiser step on this worker's share of the global batch."""
    section = worker.run.pretrain
    rank, world_size = trainer.world()
    global_rows = worker.order.training_rows(step)
    count = worker.sequences.count_targets(global_rows)
    parts = micro_batches(share(global_rows, rank, world_size), section.micro_batch_sequences)
    total = torch.zeros((), device=worker.device)
    balance = 0.0
    for rows in parts:
        cross_entropy, auxiliary = worker.module(*worker.batch(worker.sequences.read(rows)))
        # DDP averages gradients over workers: the global mean needs the factor back.
        loss = cross_entropy * world_size / count + section.load_balancing * auxiliary / len(parts)
        loss.backward()
        total += cross_entropy.detach()
        balance += float(auxiliary.detach()) / len(parts)
    lr = learning_rate(step, section.steps, section.optimiser.learning_rate, section.optimiser.schedule)
    for group in worker.optimiser.param_groups:
        group["lr"] = lr
    norm = nn.utils.clip_grad_norm_(worker.model.parameters(), section.optimiser.clip_norm)
    worker.optimiser.step()
    worker.optimiser.zero_grad()
    _sum_over_workers(total)
    return {
        "loss": float(total) / count,
        "load_balancing": balance,
        "gradient_norm": float(norm),
        "learning_rate": lr,
        "tokens": count,
    }


def _sum_over_workers(value: Tensor) -> None:
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(value)


@torch.no_grad()
def _validate(worker: _Trainer) -> dict[str, float]:
    """Mean next-token loss (nats) on the validation sequences, split over the workers."""
    rank, world_size = trainer.world()
    rows = worker.order.validation_rows()
    total = torch.zeros((), device=worker.device)
    for part in micro_batches(share(rows, rank, world_size), worker.run.pretrain.micro_batch_sequences):
        cross_entropy, _ = PretrainModule.forward(_inner(worker.module), *worker.batch(worker.sequences.read(part)))
        total += cross_entropy
    _sum_over_workers(total)
    return {"mean": float(total) / worker.sequences.count_targets(rows)}


def _inner(module: nn.Module) -> PretrainModule:
    inner = module.module if isinstance(module, nn.parallel.DistributedDataParallel) else module
    assert isinstance(inner, PretrainModule)
    return inner


def _record_validation(worker: _Trainer, log: MetricsLog, step: int, losses: dict[str, float]) -> None:
    samples = [_continue(worker, prompt) for prompt in worker.run.pretrain.prompts]
    log.write("validation", step, loss=losses["mean"], samples=samples)
    logger.info("step %d: validation loss %.4f nats", step + 1, losses["mean"])
    for sample in samples:
        logger.info("sample: %s", sample)


@torch.no_grad()
def _continue(worker: _Trainer, prompt: str, tokens: int = 48) -> str:
    """Sample a continuation of `prompt`."""
    ids = [separator_id(worker.tokenizer), *worker.tokenizer.encode(prompt, add_special_tokens=False)]
    inputs = torch.tensor([ids], device=worker.device)
    worker.model.eval()
    with torch.random.fork_rng(devices=[]), torch.autocast(worker.device.type, torch.bfloat16):
        output = worker.model.generate(
            inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=tokens, do_sample=True, temperature=0.8, top_k=40
        )
    worker.model.train()
    return str(worker.tokenizer.decode(output[0][1:], skip_special_tokens=False))
