"""Writing base and overlay as one Hugging Face directory that `AutoModelForCausalLM` loads after `import nexus_ray`.

The base's shards are hard-linked where the file system can, else copied; the shared experts and trained routers are
one added shard. A hard link shares the base's file, so nothing here ever opens one for writing or changes its mode.
Shards of a remote base are those of this node's cache; what is linked outlives its entry there.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nexus_ray.checkpoints.fingerprint import fingerprint
from nexus_ray.checkpoints.node_cache import local_model
from nexus_ray.checkpoints.overlay import ROUTERS, OverlayConfig, load_overlay
from nexus_ray.checkpoints.reader import CheckpointReader, read_model_config
from nexus_ray.checkpoints.remote_model import model_name
from nexus_ray.checkpoints.writer import CheckpointWriter, TensorSpec
from nexus_ray.console import progress
from nexus_ray.errors import ConfigError, ModelError, StorageError
from nexus_ray.families import family_of
from nexus_ray.huggingface.exported_routers import exported_routers
from nexus_ray.huggingface.model_card import model_card
from nexus_ray.huggingface.registration import MODEL_TYPE
from nexus_ray.storage import Place, atomic_directory, make_directory, write_json, write_text

ARCHITECTURE = "NexusGptOssForCausalLM"
INDEX = "model.safetensors.index.json"
SHARED_STEM = "model-shared-experts"
_BASE_PREFIX = "model-base-"
_SINGLE, _SINGLE_RENAMED = "model.safetensors", "model-base.safetensors"
_COMPANIONS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
    "USAGE_POLICY*",
)
_SHARED = re.compile(r"model\.layers\.(\d+)\.shared_expert\.(.+)")
_CHUNK = 16 << 20
_SMALL_FILES = 64 << 20  # generous: tokenizer, configuration, index


@dataclass(frozen=True)
class Export:
    """What an export wrote.

    Attributes:
        directory: where it is.
        tensors: number of added tensors.
        added_bytes: size of their shard.
        linked_bytes: size of the base shards that share the base's storage.
        copied_bytes: size of the base shards that were copied.
    """

    directory: Path
    tensors: int
    added_bytes: int
    linked_bytes: int
    copied_bytes: int


def export(
    base: Place,
    overlay: Place,
    output: Path,
    *,
    overwrite: bool = False,
    check: Callable[[Path], None] | None = None,
) -> Export:
    """Write `base` with `overlay` as a standalone model directory, atomically.

    Args:
        base: directory of the base model; a remote one comes from this node's cache, into which it is fetched.
        overlay: directory of an overlay for it.
        output: directory to write; an earlier export there is replaced with `overwrite`, anything else is not.
        overwrite: replace an earlier export.
        check: called with the complete directory before it takes its place; if it raises, there is no export.

    Raises:
        ConfigError: `output` exists and may not be replaced.
        ModelError: the base is missing, damaged or already an export.
        ArtefactError: the overlay is missing, damaged or belongs to another base.
        StorageError: the disk is too small, or the file system refused.
    """
    _check_output(output, overwrite=overwrite)
    if isinstance(base, Path) and not base.is_dir():
        raise ModelError(f"model.path: no directory at {base}", "set model.path to a Hugging Face model directory")
    config = read_model_config(base)
    family = family_of(config)
    description, tensors = load_overlay(overlay, fingerprint(base))
    name, base = model_name(base), local_model(base)
    shared = {exported_name(name): tensor for name, tensor in tensors.items() if not name.startswith(ROUTERS)}
    routers = exported_routers(base, family, description, tensors)
    added = shared | routers
    plan = _Plan.of(base, make_directory(output.parent))
    added_bytes = sum(tensor.nbytes for tensor in added.values())
    _check_disk(output, plan.copied_bytes + added_bytes)
    with atomic_directory(output) as temporary:
        _place_shards(plan, temporary)
        _write_shared(temporary, added)
        write_json(temporary / INDEX, _index(plan, added))
        write_json(temporary / "config.json", _configuration(config, description, tensors, routers))
        write_text(temporary / "README.md", model_card(output.resolve().name, name, description))
        _copy_companions(base, temporary)
        if check is not None:
            check(temporary)
    return Export(output, len(added), added_bytes, plan.linked_bytes, plan.copied_bytes)


@dataclass(frozen=True)
class _Plan:
    """What becomes of the base's files.

    Attributes:
        shards: {file name in the export: the base's file}.
        linked: names of those that become hard links.
        weight_map: {tensor: file name in the export}.
        tensor_bytes: size of all tensors.
    """

    shards: dict[str, Path]
    linked: frozenset[str]
    weight_map: dict[str, str]
    tensor_bytes: int

    @classmethod
    def of(cls, base: Path, directory: Path) -> _Plan:
        """Plan an export of `base` into `directory`."""
        shards: dict[str, Path] = {}
        weight_map: dict[str, str] = {}
        tensor_bytes = 0
        with CheckpointReader(base) as reader:
            for name in reader.names:
                shard = base / reader.shard(name).name
                file = shard.relative_to(base).as_posix()
                file = _exported_file(file)
                shards[file] = shard.resolve()  # a hub cache holds symbolic links; a hard link needs the file itself
                weight_map[name] = file
                tensor_bytes += reader.entry(name).nbytes
        linked = frozenset(file for file, shard in shards.items() if _can_link(shard, directory))
        return cls(shards, linked, weight_map, tensor_bytes)

    @property
    def linked_bytes(self) -> int:
        return sum(shard.stat().st_size for file, shard in self.shards.items() if file in self.linked)

    @property
    def copied_bytes(self) -> int:
        return sum(shard.stat().st_size for file, shard in self.shards.items() if file not in self.linked)


def describe(done: Export) -> str:
    """One line for the end."""
    base = [
        f"{size / 1e6:,.1f} MB of the base {how}"
        for how, size in (("linked", done.linked_bytes), ("copied", done.copied_bytes))
        if size
    ]
    added = f"{done.added_bytes / 1e6:,.1f} MB in {done.tensors} tensors added"
    return f"export: {done.directory} ({', '.join([*base, added])})"


def exported_name(name: str) -> str:
    """Name in the export of an overlay's tensor `layers.N.<parameter>`."""
    _, layer, parameter = name.split(".", 2)
    return f"model.layers.{layer}.shared_expert.{parameter}"


def overlay_name(name: str) -> str | None:
    """The overlay's name of an export's tensor, None for one of the base's."""
    match = _SHARED.fullmatch(name)
    return f"layers.{match[1]}.{match[2]}" if match else None


def tensors_digest(names: Mapping[str, str], read: Callable[[str], Tensor]) -> str:
    """Hexadecimal SHA-256 of the names, types, shapes and bytes of an overlay's tensors, one in memory at a time.

    Args:
        names: {name in the overlay: name for `read`}; their order does not matter.
        read: a tensor by name.
    """
    hasher = hashlib.sha256()
    for name in sorted(names):
        tensor = read(names[name]).contiguous()
        hasher.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        hasher.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return hasher.hexdigest()


def _check_output(output: Path, *, overwrite: bool) -> None:
    """Only an empty directory is used, and only an earlier export is replaced: never a run or a base."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not output.is_dir() or not _is_export(output):
        raise ConfigError(f"--output {output} exists and is not an export", "choose another place for the export")
    if not overwrite:
        raise ConfigError(f"--output {output} already holds an export", "add --overwrite to replace it")


def _is_export(directory: Path) -> bool:
    try:
        return read_model_config(directory).get("model_type") == MODEL_TYPE
    except ModelError:
        return False


def _exported_file(file: str) -> str:
    """Name in the export of one of the base's files."""
    # transformers takes a file of this name for the whole model and ignores an index beside it
    if file == _SINGLE:
        return _SINGLE_RENAMED
    # and reads every tensor of all files in the order of their names: of two of one name, the last file's counts
    return file if file < SHARED_STEM else f"{_BASE_PREFIX}{file}"


def _can_link(file: Path, directory: Path) -> bool:
    """Whether `directory` can hold a hard link to `file`: one file system, which has them, and permission."""
    probe = directory / f".{uuid.uuid4().hex[:8]}.partial"
    try:
        os.link(file, probe)
    except OSError:
        return False
    probe.unlink()
    return True


def _check_disk(output: Path, needed: int) -> None:
    needed += _SMALL_FILES
    free = shutil.disk_usage(output.parent).free
    if free < needed:
        raise StorageError(
            f"cannot write {output}: it takes {needed / 1e9:.2f} GB and {free / 1e9:.2f} GB are free",
            "free some space, or choose a place on the base's file system, where its shards need not be copied",
        )


def _place_shards(plan: _Plan, directory: Path) -> None:
    copied = plan.copied_bytes
    copying = progress("copying the base (MiB)", copied >> 20) if copied else nullcontext(lambda _: None)
    with copying as advance:
        for file, shard in plan.shards.items():
            place = directory / file
            place.parent.mkdir(parents=True, exist_ok=True)
            if file in plan.linked:
                os.link(shard, place)
            else:
                _copy(shard, place, advance)


def _copy(source: Path, destination: Path, advance: Callable[[int], None]) -> None:
    with source.open("rb") as reading, destination.open("wb") as writing:
        while chunk := reading.read(_CHUNK):
            writing.write(chunk)
            advance(len(chunk) >> 20)


def _write_shared(directory: Path, added: Mapping[str, Tensor]) -> None:
    specs = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in added.items()]
    whole = sum(tensor.nbytes for tensor in added.values())
    with CheckpointWriter(directory, specs, stem=SHARED_STEM, shard_bytes=whole) as writer:
        for name, tensor in added.items():
            writer.write(name, tensor)


def _index(plan: _Plan, added: Mapping[str, Tensor]) -> dict[str, Any]:
    places = dict.fromkeys(added, f"{SHARED_STEM}.safetensors")
    # a tensor in the place of one of the base's has its size
    new = sum(tensor.nbytes for name, tensor in added.items() if name not in plan.weight_map)
    weight_map = dict(sorted((plan.weight_map | places).items()))
    return {"metadata": {"total_size": plan.tensor_bytes + new}, "weight_map": weight_map}


def _configuration(
    base: Mapping[str, Any], description: OverlayConfig, tensors: Mapping[str, Tensor], routers: Mapping[str, Tensor]
) -> dict[str, Any]:
    """The base's config.json with another architecture and what the shared experts and trained routers are."""
    names = {name: name for name in tensors if not name.startswith(ROUTERS)}
    shared = description.model_dump(mode="json") | {"tensors_sha256": tensors_digest(names, tensors.__getitem__)}
    if routers:
        shared["routers_sha256"] = tensors_digest({name: name for name in routers}, routers.__getitem__)
    return {**base, "model_type": MODEL_TYPE, "architectures": [ARCHITECTURE], "shared_experts": shared}


def _copy_companions(base: Path, directory: Path) -> None:
    """Tokenizer, chat template, generation settings and licences."""
    for pattern in _COMPANIONS:
        for file in sorted(base.glob(pattern)):
            if file.is_file():
                shutil.copyfile(file, directory / file.name)
