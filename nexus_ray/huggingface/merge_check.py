"""Proof that an export computes with every shared tensor it holds, and that these are the overlay's.

A loading path that drops or overwrites the shared experts still gives a model that runs: the base. So the model that
`AutoModelForCausalLM` loads is asked: are its shared tensors the file's, bit for bit; do its logits have a gradient
with respect to every one of them; do the logits change when the shared experts are switched off.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.table import Table
from torch import Tensor, nn

from nexus_ray.checkpoints.reader import CheckpointReader, read_model_config
from nexus_ray.errors import ArtefactError, ModelError
from nexus_ray.families import FAMILIES
from nexus_ray.huggingface.export import overlay_name, tensors_digest
from nexus_ray.huggingface.exported_routers import base_names, trained_names
from nexus_ray.huggingface.registration import MODEL_TYPE

if TYPE_CHECKING:
    from nexus_ray.huggingface.modeling import NexusGptOssForCausalLM

_PROMPT_TOKENS = 4  # few, because each brings experts of its own to dequantise
_PROMPT_STRIDE = 7919  # a prime, so that the tokens spread over the vocabulary
_LAYER = re.compile(r"model\.layers\.(\d+)\.(?:shared_expert\.|mlp\.)(.+)")
_NAME_AN_EXPORT = "name a directory that `nexus-ray export CONFIG --output DIR` wrote"
_EXPORT_AGAIN = "export it again with `nexus-ray export CONFIG --output DIR --overwrite`"


@dataclass(frozen=True)
class TensorCheck:
    """What was found about one shared tensor.

    Attributes:
        name: in the export.
        same: the loaded tensor is the file's, bit for bit (in the type it was loaded in).
        gradient: L2 norm of the gradient of a random projection of the logits.
    """

    name: str
    same: bool
    gradient: float

    @property
    def problem(self) -> str | None:
        """What is wrong with it, None when nothing is."""
        if not self.same:
            return f"{self.name} is not what the file holds"
        if not math.isfinite(self.gradient):
            return f"{self.name} has a gradient that is not finite"
        return None if self.gradient > 0 else f"{self.name} does nothing: its gradient is zero"


@dataclass(frozen=True)
class MergeReport:
    """What was found about an export.

    Attributes:
        tensors: one check a shared tensor.
        change: largest absolute change of a logit when the shared experts, and trained routers, are switched off.
        silent: the stored tensors make every shared expert output zero, as a zero-initialised overlay does.
    """

    tensors: tuple[TensorCheck, ...]
    change: float
    silent: bool

    @property
    def problems(self) -> list[str]:
        """Everything that is wrong; empty when the export is sound."""
        found = [check.problem for check in self.tensors if check.problem is not None]
        if not self.tensors:
            found.append("the model has no shared tensors")
        if not math.isfinite(self.change):
            found.append("the logits are not finite")
        elif self.change == 0 and not self.silent:
            found.append("switching the shared experts off does not change the logits")
        return found

    def require_sound(self) -> None:
        """Do nothing when the export is sound.

        Raises:
            ArtefactError: it is not; the message says what is wrong.
        """
        if self.problems:
            raise ArtefactError(f"the export is not sound: {'; '.join(self.problems)}", _EXPORT_AGAIN)


def merge_check(directory: Path) -> MergeReport:
    """Check the export in `directory`; MXFP4 experts stay packed, so memory is that of the file.

    Raises:
        ModelError: it is not an export, is damaged, or transformers cannot load it.
        ArtefactError: its shared tensors are not those of the overlay that was exported.
    """
    if not directory.is_dir():
        raise ModelError(f"there is no directory {directory}", _NAME_AN_EXPORT)
    config = read_model_config(directory)
    if config.get("model_type") != MODEL_TYPE:
        raise ModelError(
            f"{directory} is not an export: its model_type is {config.get('model_type')!r}, not {MODEL_TYPE!r}",
            _NAME_AN_EXPORT,
        )
    with CheckpointReader(directory) as reader:
        names = [name for name in reader.names if overlay_name(name) is not None]
        _check_digest(directory, config, names, reader.read)
        routers = _check_routers(directory, config, reader)
        return check_model(_load(directory), [*names, *routers], reader.read)


def check_model(model: NexusGptOssForCausalLM, names: Iterable[str], read: Callable[[str], Tensor]) -> MergeReport:
    """Check a loaded model against the stored shared tensors.

    Args:
        model: any model with shared experts; its parameters are as before when this returns.
        names: of the stored shared tensors.
        read: a stored tensor by name.
    """
    parameters = model.shared_tensors()
    same = {name: name in parameters and _same_bits(parameters[name], read(name)) for name in names}
    change = _change_when_off(model)
    gradients = _gradients(model, parameters)
    checks = [
        TensorCheck(name, same.get(name, False), gradients.get(name, 0.0)) for name in sorted({*same, *parameters})
    ]
    return MergeReport(tuple(checks), change, _is_silent(same, read))


def describe(report: MergeReport) -> Table:
    """A table for the terminal: gradient norms, one row a layer, one column a kind of tensor."""
    rows: dict[str, dict[str, TensorCheck]] = {}
    for check in report.tensors:
        layer, kind = _layer_and_kind(check.name)
        rows.setdefault(layer, {})[kind] = check
    kinds = sorted({kind for row in rows.values() for kind in row})
    headers = (kind.removeprefix("token_").replace("_proj", "").replace(".", "\n") for kind in kinds)
    table = Table("layer", *headers, title="gradient norm of the logits by shared tensor")
    for layer in sorted(rows, key=int):
        table.add_row(layer, *(_cell(rows[layer].get(kind)) for kind in kinds))
    return table


def summary(report: MergeReport) -> str:
    """One line for the end: `ok` and what it means."""
    effect = (
        "zero-initialised, so it computes what the base does"
        if report.silent and report.change == 0
        else f"switching them off changes a logit by up to {report.change:.3g}"
    )
    return f"ok: all {len(report.tensors)} shared tensors are the overlay's and take part; {effect}"


def _layer_and_kind(name: str) -> tuple[str, str]:
    match = _LAYER.fullmatch(name)
    return (match[1], match[2]) if match else ("0", name)


def _cell(check: TensorCheck | None) -> str:
    if check is None:
        return "-"
    text = f"{check.gradient:.1e}" if check.same else "not the file's"
    return text if check.problem is None else f"[bold red]{text}[/bold red]"


def _check_digest(directory: Path, config: Mapping[str, Any], names: list[str], read: Callable[[str], Tensor]) -> None:
    described = config.get("shared_experts")
    expected = described.get("tensors_sha256") if isinstance(described, dict) else None
    if tensors_digest({overlay_name(name) or name: name for name in names}, read) != expected:
        raise ArtefactError(
            f"the shared tensors in {directory} are not those of the overlay that config.json describes", _EXPORT_AGAIN
        )


def _check_routers(directory: Path, config: Mapping[str, Any], reader: CheckpointReader) -> list[str]:
    """Names of the trained router tensors, which are those that config.json describes."""
    described = config["shared_experts"]
    layers, routers = described["layers"], described.get("routers", "none")
    trained = trained_names(FAMILIES["gpt_oss"], layers, routers)
    names = [*trained, *base_names(layers, routers)]
    missing = [name for name in names if name not in reader]
    if missing or (names and tensors_digest({n: n for n in names}, reader.read) != described.get("routers_sha256")):
        raise ArtefactError(
            f"the routers in {directory} are not those of the overlay that config.json describes", _EXPORT_AGAIN
        )
    return trained


def _load(directory: Path) -> NexusGptOssForCausalLM:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            directory, experts_memory="packed", local_files_only=True, output_loading_info=True
        )
    except Exception as error:  # transformers and safetensors raise many types
        raise ModelError(f"transformers cannot load {directory}: {error}", _EXPORT_AGAIN) from error
    problems = [f"{kind} {name}" for kind in ("missing_keys", "unexpected_keys") for name in sorted(info[kind])]
    if problems:
        raise ModelError(f"{directory} does not hold what its config.json describes: {'; '.join(problems[:3])}")
    loaded: NexusGptOssForCausalLM = model
    return loaded


def _same_bits(loaded: Tensor, stored: Tensor) -> bool:
    """Whether two tensors have the same bytes, the stored one being rounded to the type of the loaded one."""
    loaded, stored = loaded.detach().cpu(), stored.to(loaded.dtype)
    if loaded.shape != stored.shape:
        return False
    return torch.equal(_bytes(loaded), _bytes(stored))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _is_silent(names: Iterable[str], read: Callable[[str], Tensor]) -> bool:
    """Whether each layer's output is zero: through its down projection, or through its scale."""
    layers: dict[str, dict[str, bool]] = {}
    for name in names:
        layer, kind = _layer_and_kind(name)
        if kind.startswith("down_proj") or kind == "scale":
            layers.setdefault(layer, {})[kind] = not read(name).any()
    return all(
        zero.get("scale", False) or (zero.get("down_proj.weight", False) and zero.get("down_proj.bias", False))
        for zero in layers.values()
    )


def _logits(model: NexusGptOssForCausalLM) -> Tensor:
    """[1, tokens, vocabulary] float32 logits of a fixed prompt."""
    tokens = torch.arange(1, _PROMPT_TOKENS + 1, device=model.device) * _PROMPT_STRIDE % model.config.vocab_size
    logits: Tensor = model(input_ids=tokens.unsqueeze(0), use_cache=False).logits
    return logits.float()


@torch.no_grad()
def _change_when_off(model: NexusGptOssForCausalLM) -> float:
    on = _logits(model)
    with model.shared_experts_off():
        return float((_logits(model) - on).abs().max())


def _gradients(model: NexusGptOssForCausalLM, parameters: Mapping[str, nn.Parameter]) -> dict[str, float]:
    """{name: gradient norm}, with random values in place of the tensors: real ones may have true zeros."""
    with _random_values(parameters), torch.enable_grad():
        logits = _logits(model)
        direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0)).to(logits.device)
        projection = (logits * direction).sum() / math.sqrt(logits.numel())
        if not parameters or not projection.requires_grad:
            return {}
        gradients = torch.autograd.grad(projection, list(parameters.values()), allow_unused=True)
    return {
        name: 0.0 if gradient is None else float(gradient.float().norm())
        for name, gradient in zip(parameters, gradients, strict=True)
    }


@contextmanager
def _random_values(parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Within the block every parameter is trainable and holds small random values (pre-activations of size 1)."""
    before = {name: (parameter.data, parameter.requires_grad) for name, parameter in parameters.items()}
    generator = torch.Generator().manual_seed(0)
    try:
        for parameter in parameters.values():
            size = parameter.shape[-1] if parameter.ndim == 2 else 1
            values = torch.randn(parameter.shape, generator=generator) / math.sqrt(size)
            parameter.data = values.to(parameter.device, parameter.dtype)
            parameter.requires_grad_()
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data, trainable = before[name]
            parameter.requires_grad_(trainable)
