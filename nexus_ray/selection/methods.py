"""The ways of scoring experts, behind one interface: a name, a score, and what the score is without structure."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nexus_ray.router.moments import HALVES, RouterMoments
from nexus_ray.selection.nulls import equal_experts
from nexus_ray.selection.scores import (
    Floats,
    PrincipalComponents,
    pca_scores,
    pca_variance_scores,
    principal_components,
)


@dataclass(frozen=True)
class Method(ABC):
    """One way of scoring experts.

    Attributes:
        title: of the score, for people.
        null_name: what the null model's experts are: "independent experts" or "equal experts".
    """

    title: str
    null_name: str

    @abstractmethod
    def score(self, moments: RouterMoments, components: int) -> Floats:
        """[experts] scores, at least 0, from moments of one layer and one part.

        Args:
            moments: of one layer and one part.
            components: principal components in the score, where it has any.

        Raises:
            ArtefactError: `reap` without recorded outputs.
        """

    @abstractmethod
    def draw_null(
        self, halves: RouterMoments, independent: PrincipalComponents, components: int, generator: np.random.Generator
    ) -> Floats:
        """[draws, experts] scores of a layer without structure.

        Args:
            halves: moments of the layer in two halves of the text.
            independent: [draws, ...] principal components of independent experts like the layer's.
            components: as in `score`.
            generator: of what else is drawn.
        """

    def observations(self, moments: RouterMoments) -> NDArray[np.int64]:
        """[parts, experts] tokens from which each expert is scored."""
        return np.repeat(moments.count[:, None], moments.experts, axis=1)

    @abstractmethod
    def fewest_tokens(self, experts: int) -> int:
        """Tokens that a half of the text needs for a score of its own."""


@dataclass(frozen=True)
class SpectralMethod(Method):
    """A score of the principal components of the router probabilities."""

    formula: Callable[[PrincipalComponents, int], Floats]

    def score(self, moments: RouterMoments, components: int) -> Floats:
        """The formula of the layer's components."""
        return self.formula(principal_components(moments.covariance()[0, 0]), components)

    def draw_null(
        self, halves: RouterMoments, independent: PrincipalComponents, components: int, generator: np.random.Generator
    ) -> Floats:
        """The formula of independent experts."""
        return self.formula(independent, components)

    def fewest_tokens(self, experts: int) -> int:
        """One more than experts: with fewer the covariance is singular and its components are those of the sample."""
        return experts + 1


@dataclass(frozen=True)
class MeanMethod(Method):
    """A score that is a mean over tokens."""

    formula: Callable[[RouterMoments], Floats]

    def score(self, moments: RouterMoments, components: int) -> Floats:
        """The mean itself."""
        return self.formula(moments)

    def draw_null(
        self, halves: RouterMoments, independent: PrincipalComponents, components: int, generator: np.random.Generator
    ) -> Floats:
        """Equal experts whose scores differ by as much as the two halves do."""
        scores = np.stack([self.formula(halves.part(index)) for index in range(HALVES)])
        return equal_experts(scores, self.observations(halves), len(independent.variances), generator)

    def fewest_tokens(self, experts: int) -> int:
        """Two, as for a variance."""
        return 2


@dataclass(frozen=True)
class RoutedMeanMethod(MeanMethod):
    """A score that is a mean over the tokens that the expert got."""

    def observations(self, moments: RouterMoments) -> NDArray[np.int64]:
        """[parts, experts] tokens that each expert got."""
        return moments.selected[:, 0]


def _gate_mass(moments: RouterMoments) -> Floats:
    """[experts] share of the gate weights."""
    mass = moments.gate_mass[0, 0]
    return mass / max(float(mass.sum()), np.finfo(np.float64).tiny)


METHODS: dict[str, Method] = {
    "pca": SpectralMethod("PCA importance", "independent experts", pca_scores),
    "pca_variance": SpectralMethod("Variance explained", "independent experts", pca_variance_scores),
    "usage": MeanMethod("Selection count", "equal experts", lambda moments: moments.usage()[0, 0]),
    "gate_mass": MeanMethod("Gate weight", "equal experts", _gate_mass),
    "reap": RoutedMeanMethod("REAP saliency", "equal experts", lambda moments: moments.saliency()[0, 0]),
}
