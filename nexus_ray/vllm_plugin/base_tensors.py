"""The base's tensors of an export, on their way to an engine's own loader: which router is meant, MXFP4 unpacked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from nexus_ray.checkpoints import mxfp4
from nexus_ray.errors import ArtefactError
from nexus_ray.families import MoeFamily
from nexus_ray.huggingface.export import tensors_digest
from nexus_ray.huggingface.exported_routers import base_names, trained_names
from nexus_ray.vllm_plugin.shared_tensors import EXPORT_AGAIN, Weights, described, listed

_BASE_ROUTER = ".base_router."
_BLOCKS, _SCALES = "_blocks", "_scales"


def settled_routers(weights: Weights, config: Mapping[str, Any], family: MoeFamily) -> Iterator[tuple[str, Tensor]]:
    """All tensors, each trained router once and last; the base's routers, kept beside them, are left out.

    Where routers were trained, the base's files still hold the old ones under the same names, and in which order the
    two come is the engine's affair. The old one is that which equals the base's router, of which the export has a
    copy. The configuration's SHA-256 says whether the choice was right.

    Args:
        weights: all tensors but the shared experts'.
        config: of the export.
        family: of the base.

    Raises:
        ArtefactError: there is a base's router that should not be, or the routers are not those that were exported.
    """
    description = described(config)
    trained = trained_names(family, description.layers, description.routers)
    kept = base_names(description.layers, description.routers)
    found: dict[str, list[Tensor]] = {name: [] for name in (*trained, *kept)}
    for name, tensor in weights:
        if name in found:
            found[name].append(tensor)
        elif _BASE_ROUTER in name:
            raise ArtefactError(f"{name} is there, but config.json describes no trained routers", EXPORT_AGAIN)
        else:
            yield name, tensor
    chosen = _chosen(found, _copies(family, description.layers))
    _require_exported(chosen, described_digest=config["shared_experts"].get("routers_sha256"))
    yield from ((name, chosen[name]) for name in trained)


def dequantised(weights: Weights, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """All tensors, with the two of each MXFP4 matrix as one plain matrix, exact in float32 and bfloat16.

    Args:
        weights: `<name>_blocks` [experts, out, in / 32, 16] and `<name>_scales` [experts, out, in / 32] become
            `<name>` [experts, in, out], as GPT-OSS stores plain matrices; their order does not matter.
        dtype: of the plain matrices.

    Raises:
        ArtefactError: one of a pair never comes.
    """
    halves: dict[str, tuple[str, Tensor]] = {}
    for name, tensor in weights:
        if not name.endswith((_BLOCKS, _SCALES)):
            yield name, tensor
            continue
        stem = name.removesuffix(_BLOCKS).removesuffix(_SCALES)
        if stem not in halves:
            halves[stem] = (name, tensor)
            continue
        other, held = halves.pop(stem)
        pair = {other: held, name: tensor}
        yield stem, _plain(pair[stem + _BLOCKS], pair[stem + _SCALES], dtype)
    if halves:
        lonely = listed(name for name, _ in halves.values())
        raise ArtefactError(f"the export lacks the other half (blocks or scales) of {lonely}", EXPORT_AGAIN)


def _plain(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    rows = mxfp4.dequantise(blocks.flatten(0, 1).contiguous(), scales.flatten(0, 1).contiguous(), dtype)
    return rows.view(*scales.shape[:2], -1).transpose(1, 2)


def _copies(family: MoeFamily, layers: int) -> dict[str, str]:
    """{name of a router's tensor: name of the base's, kept beside it}."""
    return dict(zip(trained_names(family, layers, "all"), base_names(layers, "all"), strict=True))


def _chosen(found: Mapping[str, list[Tensor]], copies: Mapping[str, str]) -> dict[str, Tensor]:
    """One tensor a name; of several the one that is not the base's.

    Raises:
        ArtefactError: there is none of some name.
    """
    if missing := [name for name, tensors in found.items() if not tensors]:
        raise ArtefactError(f"the export lacks {len(missing)} tensors of its routers: {listed(missing)}", EXPORT_AGAIN)
    chosen = {name: tensors[-1] for name, tensors in found.items()}
    for name, tensors in found.items():
        if name in copies:
            moved = [tensor for tensor in tensors if not torch.equal(tensor, chosen[copies[name]])]
            chosen[name] = (moved or tensors)[0]
    return chosen


def _require_exported(routers: Mapping[str, Tensor], described_digest: object) -> None:
    if (
        routers
        and tensors_digest({name: name for name in routers}, lambda name: routers[name].cpu()) != described_digest
    ):
        raise ArtefactError(
            "the routers (model.layers.N.mlp.router) are not those that were exported: their SHA-256 is not "
            "shared_experts.routers_sha256 of config.json",
            EXPORT_AGAIN,
        )
