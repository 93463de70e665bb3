"""Building a model from a checkpoint: first without memory (on the meta device), then filled tensor by tensor.

Nothing is held twice. On a CPU the tensors are views of the mapped files wherever the stored type is the model's,
so all workers of a node share one copy; on a GPU each tensor is read and sent before the next. Types: packed blocks
and scales stay uint8, every other tensor gets the model's type.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from nexus_ray.checkpoints.mxfp4 import BLOCK, BLOCK_BYTES, NAN_SCALE, dequantise
from nexus_ray.checkpoints.reader import CheckpointReader
from nexus_ray.errors import ModelError
from nexus_ray.families import MoeFamily
from nexus_ray.memory import fresh
from nexus_ray.modeling.packed_experts import PackedExperts
from nexus_ray.modeling.placement import follow_devices, split_layers

PACKED = "packed"
_INCOMPLETE = "download the model again"


def build_model(
    path: Path,
    config: dict[str, Any],
    family: MoeFamily,
    *,
    experts: str,
    dtype: torch.dtype,
    devices: list[torch.device],
    reserved: int = 0,
) -> PreTrainedModel:
    """The frozen model of a directory, in evaluation mode.

    Args:
        path: Hugging Face directory.
        config: its `config.json`.
        family: its MoE family.
        experts: "packed" for `PackedExperts`, else transformers' implementation on dequantised weights.
        dtype: type of all weights that are not packed.
        devices: where to put it; layers are spread over several.
        reserved: bytes that the first of several devices is to hold beside its part of the model.

    Raises:
        ModelError: the checkpoint does not hold what its configuration describes.
    """
    with CheckpointReader(path, mapped=devices[0].type == "cpu") as reader:
        model = _skeleton(path, dtype, experts)
        if experts == PACKED:
            _replace_experts(model, config, family, reader, dtype)
        device_of = _place(model, family, reader, devices, reserved)
        _fill(model, reader, dtype, device_of)
    _fill_computed_buffers(model, devices[0])
    return model.eval().requires_grad_(False)


def _skeleton(path: Path, dtype: torch.dtype, experts: str) -> PreTrainedModel:
    """The stock model without memory."""
    try:
        settings = AutoConfig.from_pretrained(path, local_files_only=True)
        if hasattr(settings, "quantization_config"):
            del settings.quantization_config  # packed weights are ours to handle
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                settings,
                dtype=dtype,
                attn_implementation="eager",
                experts_implementation="eager" if experts == PACKED else experts,
            )
    except Exception as error:  # transformers raises many types
        raise ModelError(f"transformers cannot build {path}: {error}", "is config.json the model's own?") from error
    if (path / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(path, local_files_only=True)
    return model


def _replace_experts(
    model: nn.Module, config: dict[str, Any], family: MoeFamily, reader: CheckpointReader, dtype: torch.dtype
) -> None:
    """Put `PackedExperts` in the place of the routed experts of every layer."""
    names = {module: name for name, module in model.named_modules()}
    activation = functools.partial(family.expert_activation, config=config)
    for block in family.moe_blocks(model):
        packed = f"{names[block]}.experts.gate_up_proj_blocks" in reader
        with torch.device("meta"):
            block.experts = PackedExperts(family.dimensions(config), activation, packed=packed, dtype=dtype)


def _place(
    model: nn.Module, family: MoeFamily, reader: CheckpointReader, devices: list[torch.device], reserved: int
) -> Callable[[str], torch.device]:
    """Spread the layers over the devices; returns the device of a tensor by name."""
    if len(devices) == 1:
        return lambda name: devices[0]
    layers = family.layers(model)
    names = {module: name for name, module in model.named_modules()}
    prefixes = [f"{names[layer]}." for layer in layers]
    stored = {name: reader.entry(name).stop - reader.entry(name).start for name in reader.names}
    sizes = [sum(size for name, size in stored.items() if name.startswith(prefix)) for prefix in prefixes]
    total = sum(stored.values())
    placed = [devices[index] for index in split_layers(sizes, total - sum(sizes) + reserved, len(devices))]
    around = [module for module in model.get_submodule("model").children() if not isinstance(module, nn.ModuleList)]
    follow_devices([*layers, *around], [*placed, *(devices[0] for _ in around)])
    return lambda name: next(
        (device for prefix, device in zip(prefixes, placed, strict=True) if name.startswith(prefix)), devices[0]
    )


def _fill(
    model: PreTrainedModel, reader: CheckpointReader, dtype: torch.dtype, device_of: Callable[[str], torch.device]
) -> None:
    """Give every parameter its tensor from the checkpoint."""
    missing, used = [], set()
    for name, parameter in list(model.named_parameters()):
        tensor = _read(reader, name, parameter, dtype)
        if tensor is None:
            missing.append(name)
            continue
        used |= {name} if name in reader else {f"{name}_blocks", f"{name}_scales"}
        module, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(module), attribute, nn.Parameter(tensor.to(device_of(name)), requires_grad=False))
    if model.config.tie_word_embeddings:
        model.tie_weights()
        missing = [name for name in missing if model.get_parameter(name).is_meta]
    problems = [f"missing {name}" for name in missing]
    problems += [f"unexpected {name}" for name in reader.names if name not in used]
    if problems:
        raise ModelError(
            f"{reader.directory} does not hold what its config.json describes: {'; '.join(problems[:3])}", _INCOMPLETE
        )


def _read(reader: CheckpointReader, name: str, parameter: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The tensor of a parameter, dequantised where the model wants it so; None when there is none."""
    if name not in reader:
        return _read_dequantised(reader, name, parameter, dtype) if f"{name}_blocks" in reader else None
    tensor = reader.read(name)
    if tensor.shape != parameter.shape or tensor.is_floating_point() != parameter.is_floating_point():
        raise ModelError(
            f"{reader.directory}: {name} is {tensor.dtype} {list(tensor.shape)}, "
            f"but config.json describes {parameter.dtype} {list(parameter.shape)}",
            _INCOMPLETE,
        )
    if name.endswith("_scales"):
        _check_scales(reader, name, tensor)
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _read_dequantised(reader: CheckpointReader, name: str, parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """[E, in, out] from blocks and scales, one expert at a time."""
    experts, columns, rows = parameter.shape
    groups = [experts, rows, columns // BLOCK]
    for part, expected in ((f"{name}_blocks", [*groups, BLOCK_BYTES]), (f"{name}_scales", groups)):
        if reader.shape(part) != expected:
            raise ModelError(
                f"{reader.directory}: {part} is {reader.shape(part)}, but config.json describes {expected}", _INCOMPLETE
            )
    weights = fresh(parameter.shape, dtype)
    scratch = torch.empty(rows, columns, dtype=dtype)
    for expert in range(experts):
        scales = reader.read_slice(f"{name}_scales", expert)
        _check_scales(reader, f"{name}_scales", scales)
        weights[expert] = dequantise(reader.read_slice(f"{name}_blocks", expert), scales, dtype, scratch).T
    return weights


def _check_scales(reader: CheckpointReader, name: str, scales: Tensor) -> None:
    if int(scales.max()) == NAN_SCALE:
        raise ModelError(f"{reader.directory}: {name} holds a scale that means NaN (byte 255)", _INCOMPLETE)


def _fill_computed_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Compute what no checkpoint stores, such as rotary frequencies."""
    for module in _without_memory(model):
        module.to_empty(device=device, recurse=False)
        model._init_weights(module)


def _without_memory(model: nn.Module) -> Iterator[nn.Module]:
    for module in model.modules():
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            yield module
