"""The methods that are compared: what each one trains on the same frozen base.

Every method is built from the base's directory, the run's router statistics and a seed, and starts at the base's
function, but for the initialisations of the shared expert that do not.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from _comparison.adapters import AdaptedExperts, Addition, LowRank, whole
from _comparison.settings import Settings
from nexus_ray.config import Config, ModelSection
from nexus_ray.conversion.initialise import convert
from nexus_ray.layout import RunLayout
from nexus_ray.modeling.loading import LoadedModel, load_base, load_student
from nexus_ray.router.artefact import RouterStatistics
from nexus_ray.router.moments import RouterMoments

Kind = Literal["shared", "attention", "experts", "sieve", "esft", "router"]
Table = Literal["budget", "usual", "start", "variants"]
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_SIEVE_SHARE = 0.25
_ALPHA_PER_RANK = 2
_DEFAULT = {"initialisation": "top1_zero"}


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        name: short name, of its files.
        label: name for people.
        kind: what it trains.
        tables: that it stands in.
        learning_rate: where the search for the best one begins.
        options: of the kind; of a shared expert fields of `convert`, `layers`, those that have one, and `routers`,
            whether they are trained too.
    """

    name: str
    label: str
    kind: Kind
    tables: tuple[Table, ...]
    learning_rate: float = 1e-2
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Student:
    """A model that a method has made ready.

    Attributes:
        loaded: the model; everything in it is frozen but for `parameters`.
        parameters: what is trained, by name.
        slow: names of those that learn at `train.routers.learning_rate_factor` of the learning rate.
    """

    loaded: LoadedModel
    parameters: dict[str, nn.Parameter]
    slow: frozenset[str] = frozenset()

    @property
    def count(self) -> int:
        """Trainable parameters."""
        return sum(parameter.numel() for parameter in self.parameters.values())


@dataclass(frozen=True)
class _OverlayElsewhere(RunLayout):
    """A run's artefacts, with the initial overlay in a directory of its own."""

    elsewhere: Path = Path()

    @property
    def initial_overlay(self) -> Path:
        return self.elsewhere / "overlay"

    @property
    def conversion(self) -> Path:
        return self.elsewhere / "convert.json"


def build(method: Method, settings: Settings, seed: int, experts: str = "eager") -> Student:
    """The base with what a method trains, which alone requires gradients.

    Args:
        method: which.
        settings: of the comparison, whose router statistics are there.
        seed: of random weights.
        experts: how the frozen routed experts are computed, as `model.experts`.
    """
    torch.manual_seed(seed)
    section = settings.config.model.model_copy(update={"experts": experts})
    if method.kind == "shared":
        return _shared(method, settings, section, seed)
    loaded = load_base(section)
    if method.kind == "router":
        _train_routers(loaded)
    elif method.kind in ("attention", "experts"):
        _inject_lora(loaded, method)
    else:
        _adapt_experts(loaded, method, domain_moments(settings))
    return Student(loaded, _trained(loaded.model))


def _trained(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def _shared(method: Method, settings: Settings, section: ModelSection, seed: int) -> Student:
    options = dict(method.options)
    layers, routers = options.pop("layers", None), options.pop("routers", False)
    config = _converting(settings.config, options, seed)
    with tempfile.TemporaryDirectory() as directory:
        convert(config, _OverlayElsewhere(settings.start, elsewhere=Path(directory)))
        loaded = load_student(section, Path(directory) / "overlay")
    assert loaded.shared_experts is not None
    for number, expert in enumerate(loaded.shared_experts.layers):
        expert.requires_grad_(layers is None or number in layers)
        expert.scale.requires_grad_(config.convert.learn_scale)
    if routers:
        _train_routers(loaded)
    slow = _trained(loaded.model)
    return Student(loaded, _trained(loaded.shared_experts) | slow, frozenset(slow))


def _converting(config: Config, options: Mapping[str, Any], seed: int) -> Config:
    section = config.convert.model_copy(update={"dtype": "float32", **options})
    return config.model_copy(update={"convert": section, "run": config.run.model_copy(update={"seed": seed})})


def _train_routers(loaded: LoadedModel) -> None:
    """Give the routers weights that are no views of the mapped checkpoint, and train them."""
    for router in loaded.family.routers(loaded.model):
        for name, parameter in list(router.named_parameters(recurse=False)):
            setattr(router, name, nn.Parameter(parameter.detach().clone()))


def _inject_lora(loaded: LoadedModel, method: Method) -> None:
    """LoRA by PEFT, on attention or on all routed experts."""
    from peft import LoraConfig, inject_adapter_in_model

    rank = method.options["rank"]
    of_experts = [f"mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")]
    targets: dict[str, Any] = (
        {"target_modules": list(ATTENTION)}
        if method.kind == "attention"
        else {"target_modules": [], "target_parameters": of_experts}
    )
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=_ALPHA_PER_RANK * rank, **targets), loaded.model)


def _adapt_experts(loaded: LoadedModel, method: Method, moments: RouterMoments) -> None:
    """Additions to the experts that the domain's router statistics point at, in every layer."""
    if method.kind == "sieve":
        rank = method.options["rank"]
        chosen = most_routed(moments.selected[0], _SIEVE_SHARE)
        addition: Addition = partial(LowRank, rank=rank, alpha=_ALPHA_PER_RANK * rank)
    else:
        chosen = heaviest(moments.gate_mass[0], method.options["gate_mass"])
        addition = whole
    for block, experts in zip(loaded.family.moe_blocks(loaded.model), chosen, strict=True):
        block.experts = AdaptedExperts(block.get_submodule("experts"), experts, addition)


def domain_moments(settings: Settings) -> RouterMoments:
    """Router statistics of the domain's training text, as one part."""
    statistics = RouterStatistics.load(settings.layout.router_stats)
    (domain,) = settings.of_role("domain")
    return statistics.sources[domain].both_halves()


def most_routed(selected: NDArray[np.int64], share: float) -> list[list[int]]:
    """Of each layer the given share of its experts, those that most tokens selected (MoE-Sieve).

    Args:
        selected: [layers, experts] tokens that selected each expert.
        share: of the experts, rounded to a whole number of at least one.
    """
    count = max(1, round(share * selected.shape[1]))
    return [sorted(np.argsort(-layer, kind="stable")[:count].tolist()) for layer in selected]


def heaviest(gate_mass: NDArray[np.float64], threshold: float) -> list[list[int]]:
    """Of each layer as few experts as have at least `threshold` of its gate mass together (ESFT-Gate).

    Args:
        gate_mass: [layers, experts] sum of each expert's gate weights.
        threshold: share of the layer's sum, from 0 to 1.
    """
    chosen = []
    for layer in gate_mass:
        order = np.argsort(-layer, kind="stable")
        reached = np.cumsum(layer[order]) / layer.sum()
        chosen.append(sorted(order[: int(np.searchsorted(reached, threshold)) + 1].tolist()))
    return chosen


def _start(name: str, label: str, **options: Any) -> Method:
    return Method(name, label, "shared", ("start",), 1e-2, options)


def _variant(name: str, label: str, **options: Any) -> Method:
    return Method(name, label, "shared", ("variants",), 1e-2, {**_DEFAULT, **options})


def _methods() -> Sequence[Method]:
    everywhere: tuple[Table, ...] = ("budget", "usual", "start", "variants")
    return (
        Method(
            "shared", "shared expert (`top1_zero`, gate)", "shared", everywhere, 1e-2, {"initialisation": "top1_zero"}
        ),
        Method("lora-experts", "LoRA on all experts (PEFT, r = 7)", "experts", ("budget", "usual"), 1e-2, {"rank": 7}),
        Method("sieve", "MoE-Sieve (r = 29)", "sieve", ("budget",), 1e-2, {"rank": 29}),
        Method("esft", "ESFT-style (one expert a layer)", "esft", ("budget",), 3e-3, {"gate_mass": 0.2}),
        Method("lora-attention", "LoRA on attention (PEFT, r = 87)", "attention", ("budget",), 1e-2, {"rank": 87}),
        Method("router", "router only", "router", ("budget", "usual"), 1e-2),
        _start("shared-no-gate", "`top1_zero` without gate", initialisation="top1_zero", token_gate=False),
        _start("shared-zero", "`zero`", initialisation="zero"),
        _start("shared-random", "`random`", initialisation="random"),
        _start("shared-top1", "`top1`", initialisation="top1"),
        _start("shared-top1-average", "`top1_average`", initialisation="top1_average"),
        _start("shared-top4-average", "`top4_average`", initialisation="top4_average"),
        _start("shared-pca", "`pca_topK` (K = 8)", initialisation="pca_topK"),
        _start("shared-aligned", "`aligned_topK` (K = 8)", initialisation="aligned_topK"),
        _start("shared-lstsq", "`lstsq` (scale 0.1)", initialisation="lstsq", scale=0.1),
        Method("sieve-8", "MoE-Sieve (r = 8)", "sieve", ("usual",), 1e-2, {"rank": 8}),
        Method("esft-half", "ESFT-style (half of the gate mass)", "esft", ("usual",), 3e-3, {"gate_mass": 0.5}),
        Method("lora-attention-8", "LoRA on attention (PEFT, r = 8)", "attention", ("usual",), 1e-2, {"rank": 8}),
        _variant("shared-routers", "routers trained too (width 186)", width=186, routers=True),
        _variant("shared-scale", "learned scale", learn_scale=True),
        _variant("shared-late", "last three layers (width 384)", width=384, layers=(3, 4, 5)),
        _variant("shared-half", "width 96", width=96),
        _variant("shared-double", "width 384", width=384),
    )


METHODS = {method.name: method for method in _methods()}
QUICK = ("shared", "lora-experts", "sieve", "esft", "lora-attention", "router")
