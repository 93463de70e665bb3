"""What a run can be told as a whole: its sections, and what must hold between them. Unknown keys are errors."""

from __future__ import annotations

import difflib
import typing
from typing import Literal, Self

from pydantic import model_validator

from nexus_ray.config.base import Section
from nexus_ray.config.planning import PlanSection
from nexus_ray.config.resources import ResourcesSection, ResourceStage
from nexus_ray.config.sections import (
    CollectSection,
    ConvertSection,
    DataSection,
    EvaluateSection,
    ModelSection,
    PretrainSection,
    RunSection,
    SelectSection,
    TargetsSection,
)
from nexus_ray.config.serving import ServeSection
from nexus_ray.config.training import TrainSection, TrainSourceSection

STAGES = ("collect", "select", "convert", "precompute", "train", "evaluate")


class Config(Section):
    """A run: base model, text, and one section a stage."""

    run: RunSection
    model: ModelSection
    data: DataSection
    resources: ResourcesSection = ResourcesSection()
    collect: CollectSection = CollectSection()
    select: SelectSection = SelectSection()
    convert: ConvertSection = ConvertSection()
    targets: TargetsSection = TargetsSection()
    train: TrainSection
    evaluate: EvaluateSection = EvaluateSection()
    serve: ServeSection = ServeSection()
    plan: PlanSection = PlanSection()

    def for_stage(self, stage: ResourceStage) -> Self:
        """The run as one stage sees it: `resources`, and with them the device, are that stage's."""
        return self.model_copy(update={"resources": self.resources.of(stage)})

    @property
    def compute_device(self) -> Literal["cpu", "cuda"]:
        """Where the model will be: on a GPU when workers get one, unless `model.device` says otherwise."""
        if self.model.device != "auto":
            return self.model.device
        return "cuda" if self.resources.gpus_per_worker > 0 else "cpu"

    @property
    def compute_dtype(self) -> Literal["float32", "bfloat16"]:
        """Type of the base's weights and activations."""
        if self.model.dtype != "auto":
            return self.model.dtype
        return "bfloat16" if self.compute_device == "cuda" else "float32"

    @property
    def compute(self) -> dict[str, str]:
        """What decides the bits of the base's computation, apart from its weights."""
        how: dict[str, str] = {
            "device": self.compute_device,
            "dtype": self.compute_dtype,
            "experts": self.model.experts,
        }
        if self.model.attention != "sequence":
            how["attention"] = self.model.attention
        return how

    def sequences_per_step(self) -> dict[str, int]:
        """Sequences of each source in a global batch."""
        return {name: section.sequences(self.data.sequence_length) for name, section in self.train.sources.items()}

    def roles(self) -> dict[str, str]:
        """The role of each source."""
        return {name: source.role for name, source in self.data.sources.items()}

    @model_validator(mode="after")
    def _targets_hold_what_losses_need(self) -> Self:
        if self.train.mode == "offline":
            for name, section in self.train.sources.items():
                _require_targets(name, section, self.train, self.targets)
        return self

    @model_validator(mode="after")
    def _stride_fits_its_windows(self) -> Self:
        stride, length = self.evaluate.stride, self.data.sequence_length
        if stride is not None and stride > length:
            raise ValueError(
                f"evaluate.stride={stride} is more than data.sequence_length={length}: text would be left out"
            )
        return self

    @model_validator(mode="after")
    def _sources_exist(self) -> Self:
        _require_known(self.train.sources, self.data.sources, "train.sources")
        _require_known(self.select.sources or (), self.data.sources, "select.sources")
        _require_known(self.collect.mixture or (), self.data.sources, "collect.mixture")
        domain = tuple(name for name, source in self.data.sources.items() if source.role == "domain")
        if not domain:
            raise ValueError("data.sources needs at least one source with role: domain")
        for name in (self.select.sources or domain) if self.collect.mixture else ():
            if name not in (self.collect.mixture or ()):
                raise ValueError(f"collect.mixture leaves out {name!r}, whose statistics the selection needs")
        return self


class PretrainRun(Section):
    """A pretraining run: text, architecture and optimiser, no base model."""

    run: RunSection
    data: DataSection
    resources: ResourcesSection = ResourcesSection()
    pretrain: PretrainSection

    def for_stage(self, stage: ResourceStage) -> Self:
        """The run as one stage sees it: `resources` are that stage's."""
        return self.model_copy(update={"resources": self.resources.of(stage)})


def _require_targets(name: str, section: TrainSourceSection, train: TrainSection, targets: TargetsSection) -> None:
    """Refuse losses of a source that stored targets cannot give."""
    field = f"train.sources.{name}"
    if section.output_kl and targets.mode == "none":
        raise ValueError(f"{field}.output_kl needs targets: set targets.mode, or train.mode=online")
    if section.router_kl and targets.router == "none":
        raise ValueError(f"{field}.router_kl needs targets: set targets.router, or train.mode=online")
    if section.hidden_mse and targets.mode != "hidden":
        raise ValueError(f"{field}.hidden_mse needs hidden states: set targets.mode=hidden, or train.mode=online")
    if section.output_kl and targets.mode == "sampled" and train.output_divergence != "forward_kl":
        raise ValueError(f"train.output_divergence={train.output_divergence} needs targets.mode topk or hidden")
    if section.output_kl and targets.mode != "hidden" and train.output_temperature.constant is None:
        raise ValueError("train.output_temperature can change only with targets.mode=hidden or train.mode=online")
    if section.router_kl and targets.router == "selected" and train.router_temperature.constant is None:
        raise ValueError("train.router_temperature can change only with targets.router=logits or train.mode=online")


def _require_known(names: typing.Iterable[str], known: typing.Collection[str], field: str) -> None:
    for name in names:
        if name not in known:
            raise ValueError(f"{field}: there is no source {name!r} in data.sources{nearest(name, known)}")


def nearest(name: str, known: typing.Iterable[str]) -> str:
    """The end of a message about an unknown name: the closest known one, or all of them."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"
