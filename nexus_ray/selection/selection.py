"""Selecting experts: which matter in each layer, how far two halves of the text agree, and what chance would give.

A share of a score says little by itself, because structureless data concentrate it too; so every layer reports the
same figures under a null model, how two halves of the text agree, and a verdict in words. docs/selection.md explains
each.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from functools import reduce

from nexus_ray.checkpoints.fingerprint import fingerprint
from nexus_ray.checkpoints.reader import read_model_config
from nexus_ray.config import Config, SelectSection
from nexus_ray.errors import ArtefactError, ConfigError, DataError
from nexus_ray.layout import RunLayout
from nexus_ray.router.artefact import Description, RouterStatistics
from nexus_ray.router.files import REMAKE
from nexus_ray.router.moments import RouterMoments
from nexus_ray.selection.identical import layers_of_identical_experts
from nexus_ray.selection.layer import LayerFigures, Task, measure_layer, record_layer
from nexus_ray.selection.record import EXCEEDED_BY_CHANCE, ExpertRanking, LayerSelection, Selection, SourceUse
from nexus_ray.selection.verdict import judge_all, pooled_p_value

__all__ = ["ExpertRanking", "LayerSelection", "Selection", "SourceUse", "select", "select_experts"]

logger = logging.getLogger(__name__)


def select(config: Config, layout: RunLayout) -> Selection:
    """Rank the experts of every layer from the collected statistics and write `selection.json`.

    Raises:
        ArtefactError: the statistics are missing, damaged, of another base model or tokenizer, or lack a source or,
            for `select.method=reap`, the experts' output norms.
        ConfigError: `select.top_k` is more than the model has experts.
        DataError: the statistics hold too few tokens for the experts of a layer.
        ModelError: the base is missing or damaged.
    """
    statistics = RouterStatistics.load(layout.router_stats)
    _check_origin(statistics.description, config, layout)
    domain = tuple(name for name, source in config.data.sources.items() if source.role == "domain")
    identical = layers_of_identical_experts(config.model.path)
    selection = select_experts(statistics, config.select, config.select.sources or domain, identical)
    selection.save(layout.selection)
    logger.info("%s", selection.summary())
    return selection


def select_experts(
    statistics: RouterStatistics,
    section: SelectSection,
    sources: tuple[str, ...],
    identical: Collection[int] = frozenset(),
) -> Selection:
    """Rank experts by the statistics of `sources` taken together; raises as `select`.

    Args:
        statistics: of all collected sources.
        section: how to score and how many to select.
        sources: whose statistics count.
        identical: layers whose experts all hold the same weights.
    """
    description = statistics.description
    _check_top_k(section, description.experts)
    moments = _pool(statistics, sources)
    task = Task(section, moments.layers, identical)
    figures = [measure_layer(moments.layer(layer), task, layer) for layer in range(moments.layers)]
    layers = _record_layers(figures, moments, statistics)
    return Selection(
        base_fingerprint=description.base_fingerprint,
        method=section.method,
        top_k=section.top_k,
        coverage=section.coverage,
        max_correlation=section.max_correlation,
        components=section.components,
        sources=sources,
        tokens=description.tokens,
        calibration=description.calibration,
        num_experts=moments.experts,
        pooled_overlap_p_value=pooled_p_value([each.evidence for each in figures]),
        expected_above_null=EXCEEDED_BY_CHANCE * sum(layer.judged for layer in layers),
        layers=layers,
    )


def _record_layers(
    figures: list[LayerFigures], moments: RouterMoments, statistics: RouterStatistics
) -> tuple[LayerSelection, ...]:
    """Judge the layers beside each other."""
    judgements = judge_all([each.evidence for each in figures])
    return tuple(
        record_layer(each, judgement, moments.layer(layer), _layer_of(statistics, layer))
        for layer, (each, judgement) in enumerate(zip(figures, judgements, strict=True))
    )


def _layer_of(statistics: RouterStatistics, layer: int) -> dict[str, RouterMoments]:
    """Moments of one layer by source."""
    return {name: moments.layer(layer) for name, moments in statistics.sources.items()}


def _check_origin(description: Description, config: Config, layout: RunLayout) -> None:
    """Whether the statistics are of the base and tokenizer of this run.

    Raises:
        ArtefactError: they are not.
    """
    from nexus_ray.data.vocabulary import tokenizer_digest
    from nexus_ray.modeling.loading import load_tokenizer

    path = config.model.path
    if description.base_fingerprint != fingerprint(path):
        raise ArtefactError(f"{layout.router_stats} was collected from another model than model.path", REMAKE)
    if description.tokenizer_sha256 != tokenizer_digest(load_tokenizer(path, read_model_config(path))):
        raise ArtefactError(f"{layout.router_stats} was collected with another tokenizer than model.path has", REMAKE)


def _check_top_k(section: SelectSection, experts: int) -> None:
    if section.coverage is None and section.top_k > experts:
        raise ConfigError(
            f"select.top_k is {section.top_k}, but a layer has {experts} experts",
            f"set select.top_k to at most {experts}",
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
            "add text, or raise collect.tokens and collect again",
        )
    return moments
