"""The section of a configuration about training: objectives, schedules, optimiser, routers, what to watch."""

from __future__ import annotations

from math import ceil
from typing import Literal, Self

from pydantic import Field, model_validator

from nexus_ray.config.base import Section
from nexus_ray.config.scheduled import Scheduled, Temperature, Weight

LOSSES = ("cross_entropy", "output_kl", "hidden_mse", "router_kl", "load_balancing", "router_z")
_NONE = Scheduled(0.0)


class TrainSourceSection(Section):
    """How one source enters the loss. A weight is a number, or points [share of the run, weight]."""

    sequences_per_step: int | None = Field(None, ge=1, description="sequences of this source in each global batch")
    tokens_per_step: int | None = Field(
        None, ge=1, description="the same in tokens, rounded up to whole sequences; give one of the two"
    )
    cross_entropy: Weight = Field(_NONE, description="weight of next-token cross-entropy")
    output_kl: Weight = Field(_NONE, description="weight of train.output_divergence from the teacher")
    hidden_mse: Weight = Field(
        _NONE, description="weight of the mean squared difference of final hidden states from the teacher's"
    )
    router_kl: Weight = Field(_NONE, description="weight of KL(teacher || student) on router distributions")
    load_balancing: Weight = Field(
        _NONE, description="weight of the balance of experts in a sequence (trained routers)"
    )
    router_z: Weight = Field(_NONE, description="weight of squared log-sum-exp of router logits (trained routers)")

    @model_validator(mode="after")
    def _has_a_loss(self) -> Self:
        if not any(getattr(self, loss) for loss in LOSSES):
            raise ValueError("it has no loss: give it cross_entropy, output_kl or router_kl, or leave it out")
        if (self.sequences_per_step is None) == (self.tokens_per_step is None):
            raise ValueError("give it either sequences_per_step or tokens_per_step")
        return self

    def sequences(self, length: int) -> int:
        """Sequences of this source in a global batch when each has `length` tokens."""
        return self.sequences_per_step or ceil((self.tokens_per_step or 0) / length)

    @property
    def needs_output(self) -> bool:
        """Whether the teacher's word on next tokens is needed."""
        return bool(self.output_kl or self.hidden_mse)


class ScheduleSection(Section):
    """Learning-rate schedule, in fractions of the run."""

    warmup: float = Field(0.05, ge=0, le=1, description="fraction of steps of linear warm-up")
    decay: float = Field(0.5, ge=0, le=1, description="fraction of steps of decay at the end; the rest is stable")
    shape: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="shape of the decay; constant: there is none"
    )
    floor: float = Field(0.1, ge=0, le=1, description="learning rate at the end, as a fraction of the peak")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.shape != "constant" and self.warmup + self.decay > 1:
            raise ValueError("warmup + decay must be at most 1")
        return self


class OptimiserSection(Section):
    """AdamW and its schedule."""

    name: Literal["adamw", "adamw_8bit"] = Field(
        "adamw",
        description="adamw_8bit: moments in 8 bits, a quarter of their memory (pip install 'nexus-ray[low-bit]')",
    )
    learning_rate: float = Field(1e-2, gt=0)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0)
    clip_norm: float = Field(1.0, gt=0, description="largest global gradient norm")
    schedule: ScheduleSection = ScheduleSection()


class RoutersSection(Section):
    """Whether the student's routers learn too. The teacher keeps the base's."""

    train: Literal["none", "bias", "all"] = Field(
        "none", description="none: frozen; bias: their biases; all: weights and biases"
    )
    learning_rate_factor: float = Field(0.1, gt=0, description="learning rate of router weights, relative to the rest")
    bias_learning_rate_factor: float = Field(0.001, gt=0, description="learning rate of router biases, likewise")
    freeze_bias_at: float = Field(1.0, ge=0, le=1, description="share of the run after which biases stay as they are")


class AveragingSection(Section):
    """Sequential fine-tuning with averaging (SFA, arXiv:2501.05559): at intervals the weights move to an anchor."""

    every: int | None = Field(None, ge=1, description="optimiser steps between merges; default: never")
    alpha: float = Field(0.25, gt=0, lt=1, description="share of the anchor in merged weights")
    anchor: Literal["initial", "previous"] = Field(
        "initial", description="initial: the overlay that training began with; previous: the last merged weights"
    )


class EarlyStopSection(Section):
    """Ending a training that no longer gains."""

    patience: int | None = Field(
        None, ge=1, description="end after so many validations without a better one; default: train all steps"
    )
    min_gain: float = Field(0.0, ge=0, description="nats that a validation must be better by")


class SamplesSection(Section):
    """Texts that the student continues at each validation, to be read."""

    prompts: tuple[str, ...] = Field((), description="beginnings of text; default: none")
    tokens: int = Field(48, ge=1, description="tokens of each continuation, the most likely ones")


class MlflowSection(Section):
    """Metrics to MLflow (pip install 'nexus-ray[mlflow]')."""

    tracking_uri: str | None = Field(None, description="default: MLFLOW_TRACKING_URI, else sqlite:///mlflow.db")
    experiment: str = "nexus-ray"


class WandbSection(Section):
    """Metrics to Weights & Biases (pip install 'nexus-ray[wandb]')."""

    project: str = "nexus-ray"
    entity: str | None = None
    mode: Literal["online", "offline"] | None = Field(None, description="default: WANDB_MODE, else online")


class TrackersSection(Section):
    """Where metrics go besides metrics.jsonl and TensorBoard files."""

    mlflow: MlflowSection | None = None
    wandb: WandbSection | None = None


class WarningsSection(Section):
    """From where on the log says that the student drifts from the base."""

    router_kl: float = Field(0.15, gt=0, description="mean router KL, nats a token")
    overlap: float = Field(0.8, gt=0, le=1, description="share of the base's selected experts that are still selected")
    clipped: float = Field(0.5, gt=0, le=1, description="share of the last 50 steps whose gradient was clipped")
    entropy: float = Field(
        0.5, gt=0, le=1, description="share of the base's router entropy that is left, in the layer that keeps least"
    )
    retention: float = Field(
        0.05, gt=0, description="nats a token by which a retention source's validation loss is above the base's"
    )


class TrainSection(Section):
    """Distillation of the shared experts."""

    mode: Literal["offline", "online"] = Field(
        "offline",
        description="offline: stored targets; online: the same model with shared experts off, on the fly",
    )
    steps: int = Field(160, ge=1, description="optimiser steps")
    sources: dict[str, TrainSourceSection] = Field(description="what each source contributes", min_length=1)
    micro_batch_sequences: int = Field(8, ge=1, description="sequences of one forward pass on one worker")
    gradient_checkpointing: bool = Field(
        False, description="keep only each layer's input and compute the layer again in the backward pass"
    )
    optimiser: OptimiserSection = OptimiserSection()
    routers: RoutersSection = RoutersSection()
    averaging: AveragingSection = AveragingSection()
    output_temperature: Temperature = Field(
        Scheduled(1.0),
        description="temperature of output_kl, of teacher and student; topk and sampled targets are made for it, "
        "so it can change during the run (points as of a weight) only with hidden targets or online",
    )
    output_divergence: Literal["forward_kl", "reverse_kl", "jsd"] = Field(
        "forward_kl", description="what output_kl measures; sampled targets know forward_kl only"
    )
    jsd_beta: float = Field(0.5, gt=0, lt=1, description="weight of the teacher in the mixture that jsd compares with")
    router_temperature: Temperature = Field(
        Scheduled(1.0), description="temperature of the router KL, likewise; selected router targets are made for it"
    )
    validation_sequences: int = Field(
        16, ge=1, description="sequences of each source kept out of training to choose the best checkpoint"
    )
    validate_every: int = Field(40, ge=1, description="steps between validations")
    early_stop: EarlyStopSection = EarlyStopSection()
    samples: SamplesSection = SamplesSection()
    checkpoint_every: int = Field(40, ge=1, description="steps between checkpoints")
    keep_checkpoints: int = Field(2, ge=1, description="recovery checkpoints kept")
    on_nan: Literal["stop", "skip"] = Field(
        "stop",
        description="when a loss or gradient is NaN or infinite: stop, or skip the step; both name its sequences",
    )
    trackers: TrackersSection = TrackersSection()
    warnings: WarningsSection = WarningsSection()

    @model_validator(mode="after")
    def _ends_with_a_loss(self) -> Self:
        if not any(getattr(section, loss).final for section in self.sources.values() for loss in LOSSES):
            raise ValueError("sources: all weights end at 0, but validation measures the objective of the end")
        return self

    @model_validator(mode="after")
    def _routers_have_losses(self) -> Self:
        for name, section in self.sources.items():
            for loss in ("load_balancing", "router_z"):
                if getattr(section, loss) and self.routers.train == "none":
                    raise ValueError(f"sources.{name}.{loss} is for trained routers: set train.routers.train")
        return self
