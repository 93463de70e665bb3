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
from nexus_ray.selection.scores import (
    Floats,
    PrincipalComponents,
    principal_components,
    rank_experts,
    top_share,
)
from nexus_ray.selection.stability import HalfRanking, Stability, compare_halves
from nexus_ray.selection.verdict import CONSTANT_VARIANCE, Evidence, Judgement


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
class Ranking:
    """The experts of a layer by their scores.

    Attributes:
        scores: [experts].
        candidates: those to choose from, best first.
        unobserved: those that no token says anything about.
        passed_over: those too like a better one, best first.
        top_k: how many are selected.
    """

    scores: Floats
    candidates: list[int]
    unobserved: list[int]
    passed_over: list[int]
    top_k: int

    @property
    def ranked(self) -> list[int]:
        """All experts, those passed over last."""
        return self.candidates + self.unobserved + self.passed_over

    @property
    def choices(self) -> int:
        """How many of the selected are experts to choose from."""
        return min(self.top_k, len(self.candidates))


@dataclass(frozen=True)
class LayerFigures:
    """What was measured of a layer, before it is judged beside the others.

    Attributes:
        ranking: of its experts.
        evidence: for the verdict.
        principal: components of its router probabilities.
        null_ratio: [experts] mean explained variance ratios of independent experts.
        null_curve: [experts] mean shares of the best 1, 2, ... of all experts under the null model.
    """

    ranking: Ranking
    evidence: Evidence
    principal: PrincipalComponents
    null_ratio: Floats
    null_curve: Floats


def measure_layer(halves: RouterMoments, task: Task, layer: int) -> LayerFigures:
    """Rank the experts of a layer, and compare with its null model and from one half of the text to the other.

    Args:
        halves: its moments over the chosen sources.
        task: what is asked.
        layer: its number, which also seeds the draws of its null model.

    Raises:
        ArtefactError: `reap` without recorded outputs.
    """
    ranking = _ranking(halves.both_halves(), task)
    null_ratio, drawn = _null(halves, task, layer)
    return LayerFigures(
        ranking=ranking,
        evidence=_evidence(halves, ranking, NullShares.of_scores(drawn[:, ranking.candidates]), task, layer),
        principal=principal_components(halves.both_halves().covariance()[0, 0]),
        null_ratio=null_ratio,
        null_curve=NullShares.of_scores(drawn).mean_curve,
    )


def record_layer(
    figures: LayerFigures, judgement: Judgement, halves: RouterMoments, by_source: Mapping[str, RouterMoments]
) -> LayerSelection:
    """What `selection.json` says about a layer.

    Args:
        figures: measured of it.
        judgement: on it.
        halves: its moments over the chosen sources.
        by_source: its moments over each collected source.
    """
    ranking, evidence, moments = figures.ranking, figures.evidence, halves.both_halves()
    stability = evidence.stability
    return LayerSelection(
        ranked=tuple(ranking.ranked),
        scores=_floats(ranking.scores[ranking.ranked]),
        selected=tuple(ranking.ranked[: ranking.top_k]),
        passed_over=tuple(ranking.passed_over),
        share=evidence.share,
        null_share=evidence.null_share,
        null_share_high=evidence.null_share_high,
        held_out_share=stability.held_out_share if stability else None,
        null_curve=_floats(figures.null_curve),
        split_half_overlap=stability.overlap if stability else None,
        chance_overlap=evidence.top_k / evidence.experts,
        overlap_p_value=stability.p_value if stability else None,
        verdict=judgement.verdict,
        cause=judgement.cause,
        reason=judgement.reason,
        explained_variance_ratio=_floats(figures.principal.explained_variance_ratio),
        null_explained_variance_ratio=_floats(figures.null_ratio),
        total_variance=float(figures.principal.total_variance),
        usage=_floats(moments.usage()[0, 0]),
        by_source={name: _source_use(source, ranking.top_k) for name, source in by_source.items()},
        reap=_floats(moments.saliency()[0, 0]) if moments.has_reap else None,
        distribution=describe_scores(ranking.scores, figures.null_curve),
    )


def _ranking(moments: RouterMoments, task: Task) -> Ranking:
    """All experts by their scores, and how many of them to select."""
    scores = task.score(moments)
    correlation = correlations(moments.covariance()[0, 0])
    ranked, passed_over = pass_over_redundant(rank_experts(scores), correlation, task.section.max_correlation)
    observed = task.method.observations(moments)[0] > 0
    kept = ranked[: len(ranked) - len(passed_over)]
    candidates = [expert for expert in kept if observed[expert]]
    unobserved = [expert for expert in kept if not observed[expert]]
    coverage = task.section.coverage
    top_k = task.section.top_k if coverage is None else count_for_coverage(scores, candidates, coverage)
    return Ranking(scores, candidates, unobserved, passed_over, top_k)


def _null(halves: RouterMoments, task: Task, layer: int) -> tuple[Floats, Floats]:
    """Mean explained variance ratios [experts] of independent experts; scores [draws, experts] of the null model."""
    generator = np.random.default_rng(layer)
    independent = principal_components(independent_experts(halves, DRAWS, generator))
    drawn = task.method.draw_null(halves, independent, task.section.components, generator)
    return independent.explained_variance_ratio.mean(axis=0), drawn


def _evidence(halves: RouterMoments, ranking: Ranking, null: NullShares, task: Task, layer: int) -> Evidence:
    """Figures of the experts to choose from: passing over the others is no choice that the halves could confirm."""
    return Evidence(
        experts=len(ranking.candidates),
        top_k=ranking.choices,
        layers=task.layers,
        constant=_is_constant(halves.both_halves()),
        identical=layer in task.identical,
        half_tokens=(int(halves.count[0]), int(halves.count[1])),
        fewest_tokens=task.method.fewest_tokens(halves.experts),
        stability=_stability(halves, task, ranking),
        share=top_share(ranking.scores[ranking.candidates], ranking.choices),
        null_share=null.mean(ranking.choices),
        null_share_high=null.high(ranking.choices),
        null_name=task.method.null_name,
    )


def _is_constant(moments: RouterMoments) -> bool:
    """Whether the router's probabilities vary by no more than rounding."""
    variance = float(np.trace(moments.covariance()[0, 0]))
    return variance <= CONSTANT_VARIANCE * float(np.square(moments.mean).sum())


def _stability(halves: RouterMoments, task: Task, ranking: Ranking) -> Stability | None:
    """How the halves agree on the experts to choose from.

    The text as a whole has decided which these are. Were each half to pass over duplicates for itself, it might keep
    the other one of a pair, and halves that find the same groups of experts would have none in common.
    """
    if (halves.count < task.method.fewest_tokens(halves.experts)).any():
        return None
    candidates = sorted(ranking.candidates)
    first, second = (task.score(halves.part(index))[candidates] for index in range(HALVES))
    return _compare(first, second, ranking.choices)


def _compare(first: Floats, second: Floats, top_k: int) -> Stability:
    """Compare the best `top_k` by the scores [experts] from two halves."""
    return compare_halves(
        HalfRanking(first, rank_experts(first)), HalfRanking(second, rank_experts(second, higher_first=True)), top_k
    )


def _source_use(halves: RouterMoments, top_k: int) -> SourceUse:
    """Use of the layer's experts by one source."""
    usage = halves.both_halves().usage()[0, 0]
    overlap = None
    if (halves.count >= METHODS["usage"].fewest_tokens(halves.experts)).all():
        first, second = halves.usage()[:, 0]
        overlap = _compare(first, second, top_k).overlap
    return SourceUse(usage=_floats(usage), selected=tuple(rank_experts(usage)[:top_k]), split_half_overlap=overlap)


def _floats(values: Floats) -> tuple[float, ...]:
    return tuple(float(value) for value in values)
