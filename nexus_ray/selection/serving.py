"""Which experts serve which text, and whether texts differ more than two halves of one text do.

Any two lists of the most used experts differ a little by luck. Experts are specific to a text only where the lists of
two texts have less in common than the lists of two halves of the same text.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import numpy as np

from nexus_ray.selection.record import LayerSelection, Selection
from nexus_ray.selection.scores import Floats

_MOST_LAYERS = 0.8  # of the layers, from which on a difference is called one of the texts


@dataclass(frozen=True)
class Comparison:
    """The most used experts of two texts against each other. Overlaps are [layers] fractions of a list.

    Attributes:
        first: name of one text.
        second: name of the other.
        between: what the lists of both texts have in common.
        within_first: what the lists of the two halves of the first text have in common; NaN where not known.
        within_second: the same for the second text.
    """

    first: str
    second: str
    between: Floats
    within_first: Floats
    within_second: Floats

    @property
    def known_layers(self) -> int:
        """Layers in which the halves of both texts could be compared."""
        return int(np.isfinite(self.within_first + self.within_second).sum())

    @property
    def apart_layers(self) -> int:
        """Layers in which the texts have less in common than the halves of either."""
        return int((self.between < np.minimum(self.within_first, self.within_second)).sum())

    def conclusion(self) -> str:
        """`yes`, `in some layers`, `no` or `not known`: do the two texts use different experts?"""
        if not self.known_layers:
            return "not known"
        if self.apart_layers >= _MOST_LAYERS * self.known_layers:
            return "yes"
        return "in some layers" if self.apart_layers else "no"


def compare_sources(selection: Selection) -> list[Comparison]:
    """Every pair of collected sources, the chosen sources first."""
    within = {name: _within(selection, name) for name in ordered_sources(selection)}
    return [
        Comparison(first, second, _between(selection, first, second), within[first], within[second])
        for first, second in combinations(within, 2)
    ]


def ordered_sources(selection: Selection) -> list[str]:
    """Names of all collected sources, those that the selection is made from first."""
    return sorted(selection.tokens, key=lambda name: name not in selection.sources)


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


def _within(selection: Selection, source: str) -> Floats:
    overlaps = [layer.by_source[source].split_half_overlap for layer in selection.layers]
    return np.asarray([np.nan if value is None else value for value in overlaps], dtype=np.float64)


def _between(selection: Selection, first: str, second: str) -> Floats:
    lists = [[set(layer.by_source[name].selected) for name in (first, second)] for layer in selection.layers]
    return np.asarray([len(mine & theirs) / max(len(mine), 1) for mine, theirs in lists], dtype=np.float64)
