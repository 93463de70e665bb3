"""Selecting the experts of one layer: its ranking, the same under a null model and from half the text, a verdict."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np

from nexus_ray.config import SelectSection
from nexus_ray.router.moments import HALVES, RouterMoments
from nexus_ray.selection.distribution import describe_scores
from nexus_ray.selection.methods import METHODS, Method
from nexus_ray.selection.nulls import DRAWS, NullShares, independent_experts
from nexus_ray.selection.record import LayerSelection, SourceUse
from nexus_ray.selection.redundancy import correlations, count_for_coverage, pass_over_redundant
from nexus_ray.selection.scores import Floats, principal_components, rank_experts, share_of
from nexus_ray.selection.stability import HalfRanking, Stability, compare_halves
from nexus_ray.selection.verdict import CONSTANT_VARIANCE, Evidence, judge


@dataclass(frozen=True)
class Task:
    """What is asked of every layer.

    Attributes:
        section: method, count of experts, de-duplication.
        layers: of the model.
        identical: those whose experts all hold the same weights.
    """

    section: SelectSection
    layers: int
    identical: Collection[int] = frozenset()

    @property
    def method(self) -> Method:
        """How experts are scored."""
        return METHODS[self.section.method]

    def score(self, moments: RouterMoments) -> Floats:
        """[experts] scores from moments of one layer and one part."""
        return self.method.score(moments, self.section.components)


@dataclass(frozen=True)
class _Ranking:
    """Scores [experts], all experts best first, those of them passed over, and how many are selected."""

    scores: Floats
    ranked: list[int]
    passed_over: list[int]
    top_k: int


def select_layer(
    halves: RouterMoments, by_source: Mapping[str, RouterMoments], task: Task, layer: int
) -> LayerSelection:
    """Select the experts of a layer.

    Args:
        halves: its moments over the chosen sources.
        by_source: its moments over each collected source.
        task: what is asked.
        layer: its number, which also seeds the draws of its null model.

    Raises:
        ArtefactError: `reap` without recorded outputs.
    """
    moments = halves.both_halves()
    ranking = _ranking(moments, task)
    principal = principal_components(moments.covariance()[0, 0])
    null_ratio, null = _null(halves, np.diag(moments.covariance()[0, 0]), task, layer)
    evidence = _evidence(halves, ranking, null, task, layer)
    stability = evidence.stability
    verdict, reason = judge(evidence)
    return LayerSelection(
        ranked=tuple(ranking.ranked),
        scores=_floats(ranking.scores[ranking.ranked]),
        selected=tuple(ranking.ranked[: ranking.top_k]),
        passed_over=tuple(ranking.passed_over),
        share=evidence.share,
        null_share=evidence.null_share,
        null_share_high=evidence.null_share_high,
        held_out_share=stability.held_out_share if stability else None,
        null_curve=_floats(null.mean_curve),
        split_half_overlap=stability.overlap if stability else None,
        chance_overlap=ranking.top_k / moments.experts,
        overlap_p_value=stability.p_value if stability else None,
        verdict=verdict,
        reason=reason,
        explained_variance_ratio=_floats(principal.explained_variance_ratio),
        null_explained_variance_ratio=_floats(null_ratio),
        total_variance=float(principal.total_variance),
        usage=_floats(moments.usage()[0, 0]),
        by_source={name: _source_use(source, ranking.top_k) for name, source in by_source.items()},
        reap=_floats(moments.saliency()[0, 0]) if moments.has_reap else None,
        distribution=describe_scores(ranking.scores, null.mean_curve),
    )


def _ranking(moments: RouterMoments, task: Task) -> _Ranking:
    scores = task.score(moments)
    ranked, passed_over = _rank(scores, moments, task.section)
    coverage = task.section.coverage
    top_k = task.section.top_k if coverage is None else count_for_coverage(scores, ranked, coverage)
    return _Ranking(scores, ranked, passed_over, top_k)


def _rank(
    scores: Floats, moments: RouterMoments, section: SelectSection, *, higher_first: bool = False
) -> tuple[list[int], list[int]]:
    """All experts, best first, and those passed over."""
    ranked = rank_experts(scores, higher_first=higher_first)
    return pass_over_redundant(ranked, correlations(moments.covariance()[0, 0]), section.max_correlation)


def _null(halves: RouterMoments, variances: Floats, task: Task, layer: int) -> tuple[Floats, NullShares]:
    """Mean explained variance ratios [experts] of independent experts, and the shares of the method's null model."""
    generator = np.random.default_rng(layer)
    independent = principal_components(independent_experts(variances, halves.tokens, DRAWS, generator))
    drawn = task.method.draw_null(halves, independent, task.section.components, generator)
    return independent.explained_variance_ratio.mean(axis=0), NullShares.of_scores(drawn)


def _evidence(halves: RouterMoments, ranking: _Ranking, null: NullShares, task: Task, layer: int) -> Evidence:
    return Evidence(
        experts=halves.experts,
        top_k=ranking.top_k,
        layers=task.layers,
        constant=_is_constant(halves.both_halves()),
        identical=layer in task.identical,
        half_tokens=(int(halves.count[0]), int(halves.count[1])),
        fewest_tokens=task.method.fewest_tokens(halves.experts),
        stability=_stability(halves, task, ranking.top_k),
        share=share_of(ranking.scores, ranking.ranked[: ranking.top_k]),
        null_share=null.mean(ranking.top_k),
        null_share_high=null.high(ranking.top_k),
        null_name=task.method.null_name,
    )


def _is_constant(moments: RouterMoments) -> bool:
    """Whether the router's probabilities vary by no more than rounding."""
    variance = float(np.trace(moments.covariance()[0, 0]))
    return variance <= CONSTANT_VARIANCE * float(np.square(moments.mean).sum())


def _stability(halves: RouterMoments, task: Task, top_k: int) -> Stability | None:
    if (halves.count < task.method.fewest_tokens(halves.experts)).any():
        return None
    first, second = (_half_ranking(halves.part(index), task, index) for index in range(HALVES))
    return compare_halves(first, second, top_k)


def _half_ranking(half: RouterMoments, task: Task, index: int) -> HalfRanking:
    scores = task.score(half)
    return HalfRanking(scores, _rank(scores, half, task.section, higher_first=index == 1)[0])


def _source_use(halves: RouterMoments, top_k: int) -> SourceUse:
    """Use of the layer's experts by one source."""
    usage = halves.both_halves().usage()[0, 0]
    overlap = None
    if (halves.count >= METHODS["usage"].fewest_tokens(halves.experts)).all():
        first, second = halves.usage()[:, 0]
        overlap = compare_halves(
            HalfRanking(first, rank_experts(first)), HalfRanking(second, rank_experts(second, higher_first=True)), top_k
        ).overlap
    return SourceUse(usage=_floats(usage), selected=tuple(rank_experts(usage)[:top_k]), split_half_overlap=overlap)


def _floats(values: Floats) -> tuple[float, ...]:
    return tuple(float(value) for value in values)
