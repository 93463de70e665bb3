"""Selecting experts: which matter in each layer, how far two halves of the text agree, and what chance would give.

The importance is the reference system's (`scores.pca_scores`). A share of that score says little by itself, because
unstructured data concentrate it too; so every layer reports the share under a null model, and the overlap of the
selections from two halves of the text.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from nexus_ray.checkpoints.fingerprint import fingerprint
from nexus_ray.config import Config, SelectSection
from nexus_ray.errors import ArtefactError, ConfigError, DataError
from nexus_ray.layout import RunLayout
from nexus_ray.router.artefact import RouterStatistics
from nexus_ray.router.moments import HALVES, REMAKE, RouterMoments
from nexus_ray.selection.distribution import Distribution, describe_scores
from nexus_ray.selection.scores import (
    Floats,
    overlap,
    pca_null_share,
    pca_scores,
    principal_components,
    rank_experts,
    top_share,
    usage_scores,
)
from nexus_ray.storage import read_json, write_json

logger = logging.getLogger(__name__)
FORMAT_VERSION = 2
_RESELECT = "run `nexus-ray select CONFIG` again"


@dataclass(frozen=True)
class ExpertRanking:
    """Experts of each layer, best first.

    Attributes:
        used: by how often the router selects them.
        important: by the method of `select`.
        used_overall: the expert index selected most often over all layers together.
        reap: by REAP saliency; None when the statistics hold no expert output norms.
    """

    used: Sequence[Sequence[int]]
    important: Sequence[Sequence[int]]
    used_overall: int
    reap: Sequence[Sequence[int]] | None = None


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LayerSelection(_Record):
    """Ranked experts of one layer.

    Attributes:
        ranked: all experts, best first.
        scores: their scores, in the same order.
        selected: the first `top_k` of `ranked`.
        share: fraction of the layer's total score that the selected experts have.
        null_share: the same without structure. pca: independent experts with the same variances and number of
            tokens; usage, reap: all experts equal.
        split_half_overlap: fraction of the selected experts common to the selections from either half of the text
            alone; None when a half holds fewer than two tokens.
        explained_variance_ratio: of the leading principal components of the router probabilities.
        total_variance: sum of the variances of all experts' probabilities.
        usage: each expert's share of the router's selections over the chosen sources, in expert order.
        usage_by_source: the same for every collected source by itself.
        reap: each expert's REAP saliency over the chosen sources, in expert order; None when it was not recorded.
        distribution: how the score is spread.
    """

    ranked: tuple[int, ...]
    scores: tuple[float, ...]
    selected: tuple[int, ...]
    share: float
    null_share: float
    split_half_overlap: float | None
    explained_variance_ratio: tuple[float, ...]
    total_variance: float
    usage: tuple[float, ...]
    usage_by_source: dict[str, tuple[float, ...]]
    reap: tuple[float, ...] | None
    distribution: Distribution


class Selection(_Record):
    """`selection.json`: the ranked experts of every layer.

    Attributes:
        format_version: of the file.
        base_fingerprint: identity of the base model.
        method: pca, usage or reap.
        top_k: experts selected in each layer.
        components: principal components in the pca score.
        sources: the sources whose statistics were used.
        tokens: tokens of each collected source.
        num_experts: routed experts of a layer.
        chance_overlap: split-half overlap that random selections have on average, top_k / num_experts.
        layers: one entry a layer.
    """

    format_version: int = FORMAT_VERSION
    base_fingerprint: str
    method: Literal["pca", "usage", "reap"]
    top_k: int
    components: int
    sources: tuple[str, ...]
    tokens: dict[str, int]
    num_experts: int
    chance_overlap: float
    layers: tuple[LayerSelection, ...]

    def experts(self, layer: int) -> list[int]:
        """All experts of a layer, best first."""
        return list(self.layers[layer].ranked)

    def ranking(self) -> ExpertRanking:
        """All experts of every layer by usage, by importance and by REAP saliency."""
        usage = np.asarray([layer.usage for layer in self.layers])
        saliency = [layer.reap for layer in self.layers if layer.reap is not None]
        return ExpertRanking(
            used=[rank_experts(layer) for layer in usage],
            important=[layer.ranked for layer in self.layers],
            used_overall=rank_experts(usage.sum(axis=0))[0],
            reap=[rank_experts(np.asarray(layer)) for layer in saliency] if len(saliency) == len(usage) else None,
        )

    def save(self, path: Path) -> None:
        """Write the selection as JSON, atomically."""
        write_json(path, self.model_dump(mode="json"))

    @classmethod
    def load(cls, path: Path) -> Selection:
        """Read what `save` wrote.

        Raises:
            ArtefactError: the file is missing, damaged or of another format version.
        """
        values = read_json(path, what="expert selection", hint=_RESELECT)
        try:
            selection = cls.model_validate(values)
        except ValidationError as error:
            raise ArtefactError(f"{path} is not an expert selection: {error}", _RESELECT) from error
        if selection.format_version != FORMAT_VERSION:
            raise ArtefactError(f"{path} has format {selection.format_version}, not {FORMAT_VERSION}", _RESELECT)
        return selection


def select(config: Config, layout: RunLayout) -> Selection:
    """Rank the experts of every layer from the collected statistics and write `selection.json`.

    Raises:
        ArtefactError: the statistics are missing, damaged, of another base model or lack a source or, for
            `select.method=reap`, the experts' output norms.
        ConfigError: `select.top_k` is more than the model has experts.
        DataError: the statistics hold fewer tokens than a layer has experts.
    """
    statistics = RouterStatistics.load(layout.router_stats)
    if statistics.description.base_fingerprint != fingerprint(config.model.path):
        raise ArtefactError(f"{layout.router_stats} was collected from another model than model.path", REMAKE)
    domain = tuple(name for name, source in config.data.sources.items() if source.role == "domain")
    selection = select_experts(statistics, config.select, config.select.sources or domain)
    selection.save(layout.selection)
    _log(selection)
    return selection


def select_experts(statistics: RouterStatistics, section: SelectSection, sources: tuple[str, ...]) -> Selection:
    """Rank experts by the statistics of `sources` taken together; raises as `select`."""
    _check_top_k(section.top_k, statistics.description.experts)
    moments = _pool(statistics, sources)
    usage = {name: source.both_halves().usage()[0] for name, source in statistics.sources.items()}
    return Selection(
        base_fingerprint=statistics.description.base_fingerprint,
        method=section.method,
        top_k=section.top_k,
        components=section.components,
        sources=sources,
        tokens=statistics.description.tokens,
        num_experts=moments.experts,
        chance_overlap=section.top_k / moments.experts,
        layers=tuple(
            _select_layer(moments.layer(layer), section, layer, {name: _floats(usage[name][layer]) for name in usage})
            for layer in range(moments.layers)
        ),
    )


def _check_top_k(top_k: int, experts: int) -> None:
    if top_k > experts:
        raise ConfigError(
            f"select.top_k is {top_k}, but a layer has {experts} experts", f"set select.top_k to at most {experts}"
        )


def _pool(statistics: RouterStatistics, sources: tuple[str, ...]) -> RouterMoments:
    missing = [name for name in sources if name not in statistics.sources]
    if missing:
        raise ArtefactError(f"the router statistics hold no source {missing[0]!r}", REMAKE)
    moments = reduce(RouterMoments.merge, (statistics.sources[name] for name in sources))
    if moments.tokens <= moments.experts:
        raise DataError(
            f"router statistics of {', '.join(sources)} hold {moments.tokens} tokens, too few for "
            f"{moments.experts} experts",
            "add text, or raise collect.tokens_per_source and collect again",
        )
    return moments


def _select_layer(
    halves: RouterMoments, section: SelectSection, seed: int, usage_by_source: dict[str, tuple[float, ...]]
) -> LayerSelection:
    """Rank the experts of one layer from its moments in two halves."""
    moments = halves.both_halves()
    covariance = moments.covariance()[0, 0]
    principal = principal_components(covariance, section.components)
    scores = _scores(moments, section)
    ranked = rank_experts(scores)
    return LayerSelection(
        ranked=tuple(ranked),
        scores=_floats(scores[ranked]),
        selected=tuple(ranked[: section.top_k]),
        share=top_share(scores, section.top_k),
        null_share=_null_share(np.diag(covariance), moments.tokens, section, seed),
        split_half_overlap=_split_half_overlap(halves, section),
        explained_variance_ratio=_floats(principal.explained_variance_ratio),
        total_variance=principal.total_variance,
        usage=_floats(moments.usage()[0, 0]),
        usage_by_source=usage_by_source,
        reap=_floats(moments.saliency()[0, 0]) if moments.has_reap else None,
        distribution=describe_scores(scores),
    )


def _scores(moments: RouterMoments, section: SelectSection) -> Floats:
    """[experts] scores from moments of one layer and one part."""
    if section.method == "usage":
        return usage_scores(moments.selected[0, 0])
    if section.method == "reap":
        return moments.saliency()[0, 0]
    return pca_scores(moments.covariance()[0, 0], section.components)


def _null_share(variances: Floats, tokens: int, section: SelectSection, seed: int) -> float:
    if section.method != "pca":
        return section.top_k / len(variances)
    return pca_null_share(variances, tokens, section.components, section.top_k, seed)


def _split_half_overlap(halves: RouterMoments, section: SelectSection) -> float | None:
    if (halves.count < 2).any():
        return None
    first, second = (_scores(halves.part(index), section) for index in range(HALVES))
    return overlap(first, second, section.top_k)


def _floats(values: Floats) -> tuple[float, ...]:
    return tuple(float(value) for value in values)


def _log(selection: Selection) -> None:
    overlaps = [layer.split_half_overlap for layer in selection.layers if layer.split_half_overlap is not None]
    logger.info(
        "top %d of %d experts by %s: share of score %.2f (null model %.2f), split-half overlap %s (chance %.2f)",
        selection.top_k,
        selection.num_experts,
        selection.method,
        np.mean([layer.share for layer in selection.layers]),
        np.mean([layer.null_share for layer in selection.layers]),
        f"{np.mean(overlaps):.2f}" if overlaps else "unknown",
        selection.chance_overlap,
    )
