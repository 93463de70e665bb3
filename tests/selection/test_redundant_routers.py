"""Routers of near-copies: the p-value of an overlap counts experts that cannot be told apart as if they could."""

import pytest
from synthetic_routers import moments_of, noise_logits, statistics_of

from nexus_ray.config import SelectSection
from nexus_ray.router.artefact import RouterStatistics
from nexus_ray.selection.record import NOISE
from nexus_ray.selection.selection import select_experts

LAYERS = 200


@pytest.fixture(scope="module")
def near_copies() -> RouterStatistics:
    """8 groups of 4 experts whose logits are the same but for a twentieth of noise, without any structure."""
    groups = noise_logits(LAYERS, 8).repeat_interleave(4, dim=-1)
    return statistics_of({"play": moments_of(groups + 0.05 * noise_logits(LAYERS, 32, seed=3))})


def layers_called_stable(statistics: RouterStatistics, **section: object) -> int:
    selection = select_experts(statistics, SelectSection.model_validate(section), ("play",))
    return LAYERS - selection.verdicts()[NOISE]


def test_near_copies_without_structure_are_called_stable_now_and_then(near_copies):
    """Whole groups enter a list: it takes two of eight to agree on, not eight of 32. docs/selection.md says so."""
    assert layers_called_stable(near_copies, method="pca", top_k=8) == pytest.approx(6, abs=3)


def test_passing_over_near_copies_restores_the_level(near_copies):
    assert layers_called_stable(near_copies, method="pca", top_k=4, max_correlation=0.9) == 0
