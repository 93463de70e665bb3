"""Pretraining on one Ray Train worker: bfloat16 computation, float32 weights, cross-entropy plus load balancing."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoTokenizer, GptOssForCausalLM, PreTrainedTokenizerBase

from nexus_ray.cluster import set_worker_threads
from nexus_ray.config import PretrainRun
from nexus_ray.data.packing import separator_id
from nexus_ray.data.vocabulary import tokenizer_digest
from nexus_ray.layout import RunLayout
from nexus_ray.memory import bound_shape_caches
from nexus_ray.pretraining.model import build_config, new_model
from nexus_ray.targets.reading.reader import TargetSet
from nexus_ray.training import trainer
from nexus_ray.training.feeding.order import Sequences, SourceOrder, micro_batches, share
from nexus_ray.training.loop import run_steps
from nexus_ray.training.optimiser import build_optimiser
from nexus_ray.training.settings import LoopSettings


class PretrainModule(nn.Module):
    """The model as a loss: sums over tokens, so that any split of the global batch adds up."""

    def __init__(self, model: GptOssForCausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, valid: Tensor, loss_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Summed next-token cross-entropy (nats) and the load-balancing loss of [sequences, length] tokens."""
        with torch.autocast(input_ids.device.type, torch.bfloat16):
            output = self.model(
                input_ids=input_ids, attention_mask=valid.long(), use_cache=False, output_router_logits=True
            )
        logits = output.logits[:, :-1].float()
        targets = input_ids[:, 1:].masked_fill(~loss_mask[:, 1:], -100)
        cross_entropy = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")
        return cross_entropy, output.aux_loss


class PretrainTask:
    """Pretraining on one worker."""

    def __init__(self, run: PretrainRun) -> None:
        set_worker_threads(run.resources)
        bound_shape_caches()
        section = run.pretrain
        self.section = section
        self.device = trainer.devices()[0]
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(section.tokenizer)
        self.model = new_model(build_config(section.architecture, self.tokenizer), run.run.seed).to(self.device)
        self.module = PretrainModule(self.model).train()
        self.parallel = trainer.data_parallel(self.module)
        self.parameters: dict[str, nn.Parameter] = dict(self.model.named_parameters())
        self.optimiser = build_optimiser(self.parameters, section.optimiser)
        self.targets = TargetSet.open(
            RunLayout(run.run.directory).targets, tokenizer_sha256=tokenizer_digest(self.tokenizer)
        )
        numbers = np.concatenate([self.targets.sequences(name) for name in run.data.sources])
        self.order = SourceOrder(
            numbers, section.sequences_per_step, section.validation_sequences, run.run.seed, "pretrain"
        )

    def accumulate(self, step: int) -> dict[str, float]:
        """Backward passes of one global batch."""
        rank, world_size = trainer.world()
        batch = self.order.of_step(step)
        count = max(1, int(self.targets.num_targets(batch).sum()))
        parts = micro_batches(share(batch, rank, world_size), self.section.micro_batch_sequences)
        total = torch.zeros(2, device=self.device)
        for index, part in enumerate(parts):
            with trainer.synchronise_if(self.parallel, index == len(parts) - 1):
                cross_entropy, balance = self.parallel(*self._batch(part))
                # DDP averages gradients over workers: the global mean needs the factor back.
                loss = cross_entropy * world_size / count + self.section.load_balancing * balance / len(parts)
                loss.backward()
            total += torch.stack([cross_entropy.detach() / count, balance.detach() / len(parts) / world_size])
        loss_value, balance_value = trainer.sum_over_workers(total).tolist()
        return {"loss": loss_value, "load_balancing": balance_value, "tokens": count}

    @torch.no_grad()
    def validate(self) -> dict[str, Any]:
        """Mean next-token loss (nats) on the validation sequences."""
        rank, world_size = trainer.world()
        held_out = self.order.held_out()
        total = torch.zeros((), device=self.device)
        for part in micro_batches(share(held_out, rank, world_size), self.section.micro_batch_sequences):
            total += self.module(*self._batch(part))[0]
        loss = float(trainer.sum_over_workers(total)) / max(1, int(self.targets.num_targets(held_out).sum()))
        return {"loss": loss}

    def samples(self) -> list[dict[str, str]]:
        """Continuations of the configured prompts."""
        return [{"prompt": prompt, "text": self._continue(prompt)} for prompt in self.section.prompts]

    def initial_weights(self) -> dict[str, Tensor]:
        """Nothing: pretraining has no anchor to be drawn to."""
        return {}

    @torch.no_grad()
    def not_finite(self, step: int) -> list[str]:
        """Sequences of a step whose loss is not finite, on any worker, by their numbers in the packed text."""
        mine = share(self.order.of_step(step), *trainer.world())
        losses = [(int(sequence), self.module(*self._batch(sequence[None]))[0]) for sequence in mine]
        return trainer.gathered([str(sequence) for sequence, loss in losses if not bool(torch.isfinite(loss))])

    def _batch(self, sequences: Sequences) -> tuple[Tensor, Tensor, Tensor]:
        batch = self.targets.read(sequences, teacher=False).to(self.device)
        return batch.input_ids, batch.valid, batch.loss_mask

    @torch.no_grad()
    def _continue(self, prompt: str, tokens: int = 48) -> str:
        """Sample a continuation of `prompt`."""
        ids = [separator_id(self.tokenizer), *self.tokenizer.encode(prompt, add_special_tokens=False)]
        inputs = torch.tensor([ids], device=self.device)
        self.model.eval()
        with torch.random.fork_rng(devices=[]), torch.autocast(self.device.type, torch.bfloat16):
            output = self.model.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=tokens,
                do_sample=True,
                temperature=0.8,
                top_k=40,
            )
        self.model.train()
        return str(self.tokenizer.decode(output[0][1:]))


def pretrain_worker(arguments: dict[str, Any]) -> None:
    """Ray Train's per-worker function."""
    run = PretrainRun.model_validate(arguments["run"])
    section, layout = run.pretrain, RunLayout(run.run.directory)
    settings = LoopSettings(
        steps=section.steps,
        optimiser=section.optimiser,
        validate_every=section.validate_every,
        checkpoint_every=section.checkpoint_every,
        keep_checkpoints=section.keep_checkpoints,
        layout=layout,
        section="pretrain",
    )
    run_steps(PretrainTask(run), settings)
