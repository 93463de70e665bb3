"""Which experts serve which text, and whether texts differ more than two halves of one text do.

Any two texts are sent to somewhat different experts by luck. They use experts differently only where they are further
apart than the halves of the same text, clearly, and in more layers than luck gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np
from scipy.stats import binom  # type: ignore[import-untyped]

from nexus_ray.router.artefact import RouterStatistics
from nexus_ray.router.moments import RouterMoments
from nexus_ray.selection.record import Cause, LayerSelection, Selection
from nexus_ray.selection.scores import Floats

Conclusion = Literal["yes", "not shown", "too few layers", "not known"]
_LEVEL = 0.05  # probability of calling two texts of one kind different
_CLEARLY = 2  # times as far apart as halves: layers share what chance made of a text, so a bare excess may be all luck
_NOTHING_TO_CHOOSE: frozenset[Cause] = frozenset(("identical", "constant"))


@dataclass(frozen=True)
class Pairwise:
    """A figure [layers] of two texts against each other, and of the two halves of each; NaN where not known."""

    between: Floats
    first: Floats
    second: Floats


@dataclass(frozen=True)
class Comparison:
    """The use of experts by two texts.

    Layers that say nothing are NaN: where a half is too small, and where all experts hold the same weights or the
    router treats every token alike.

    Attributes:
        names: of the two texts.
        overlap: fraction of their lists of most used experts that is common.
        distance: fraction of the router's selections that would have to go to other experts to make them alike: the
            total variation between the usages, half the sum of absolute differences.
    """

    names: tuple[str, str]
    overlap: Pairwise
    distance: Pairwise

    @property
    def known_layers(self) -> int:
        """Layers in which the texts can be compared."""
        return int(np.isfinite(self.distance.between).sum())

    @property
    def apart_layers(self) -> int:
        """Layers in which the texts are at least twice as far apart as the halves of either."""
        within = np.maximum(self.distance.first, self.distance.second)
        return int(((self.distance.between > 0) & (self.distance.between >= _CLEARLY * within)).sum())

    @property
    def luck_layers(self) -> float:
        """The most layers in which texts of one kind are apart, on average."""
        return self.known_layers / 2

    @property
    def p_value(self) -> float:
        """At most the probability that texts of one kind are apart in as many layers: a sign test over layers.

        For texts of one kind all four halves are alike, and whole texts vary less than halves: so even a bare excess
        of the distance between the texts over that between halves has probability 1/2 at most.
        """
        return float(binom.sf(self.apart_layers - 1, self.known_layers, 0.5))

    @property
    def conclusion(self) -> Conclusion:
        """Whether the two texts use experts differently.

        `yes`: luck would do as much in 5 of 100 pairs of texts at most. `too few layers`: not even texts that are
        apart in every layer would be told from luck. `not known`: nowhere could they be compared.
        """
        if not self.known_layers:
            return "not known"
        if 0.5**self.known_layers > _LEVEL:
            return "too few layers"
        return "yes" if self.p_value <= _LEVEL else "not shown"


def compare_sources(selection: Selection, statistics: RouterStatistics) -> list[Comparison]:
    """Every pair of collected sources, the chosen sources first; distances come from the statistics."""
    return [_compare(selection, statistics, *pair) for pair in combinations(ordered_sources(selection), 2)]


def _compare(selection: Selection, statistics: RouterStatistics, first: str, second: str) -> Comparison:
    overlaps = np.asarray([_overlaps(layer, first, second) for layer in selection.layers])
    unknown = np.isnan(overlaps).any(axis=1)
    distances = _distances(*(statistics.sources[name] for name in (first, second)))
    overlaps[unknown] = distances[unknown] = np.nan
    return Comparison((first, second), Pairwise(*overlaps.T), Pairwise(*distances.T))


def _overlaps(layer: LayerSelection, first: str, second: str) -> list[float]:
    """What both texts' lists have in common, and what the halves of either have; NaN where that is not known."""
    if layer.cause in _NOTHING_TO_CHOOSE:
        return [np.nan] * 3
    mine, other = layer.by_source[first], layer.by_source[second]
    common = len(set(mine.selected) & set(other.selected)) / len(mine.selected)
    within = [use.split_half_overlap for use in (mine, other)]
    return [common, *(np.nan if overlap is None else overlap for overlap in within)]


def _distances(first: RouterMoments, second: RouterMoments) -> Floats:
    """[layers, 3] total variation between the usages of two texts, and of the halves of each."""
    whole = [moments.both_halves().usage()[0] for moments in (first, second)]
    pairs = [whole, list(first.usage()), list(second.usage())]
    return np.stack([np.abs(mine - other).sum(axis=-1) / 2 for mine, other in pairs], axis=-1)


def ordered_sources(selection: Selection) -> list[str]:
    """Names of all collected sources, those that the selection is made from first."""
    return sorted(selection.tokens, key=lambda name: name not in selection.sources)


def texts_of_their_own(comparisons: Sequence[Comparison]) -> set[str]:
    """Texts that use experts differently from every text they are compared with."""
    names = {name for pair in comparisons for name in pair.names}
    return names - {name for pair in comparisons if pair.conclusion != "yes" for name in pair.names}


def exclusive_experts(layer: LayerSelection) -> set[int]:
    """Experts that are among the most used of one source only; none when there is only one source."""
    if len(layer.by_source) < 2:
        return set()
    listed = [expert for use in layer.by_source.values() for expert in use.selected]
    return {expert for expert in listed if listed.count(expert) == 1}


def share_of_selections(layer: LayerSelection, source: str) -> float:
    """Fraction of the router's selections on a source that go to the source's most used experts."""
    use = layer.by_source[source]
    return sum(use.usage[expert] for expert in use.selected)
