"""Comparing two models' routers by their moments: distances by hand, and what must not be compared."""

import numpy as np
import pytest
import torch

from nexus_ray.errors import ArtefactError
from nexus_ray.router.accumulate import moments_of_logits
from nexus_ray.router.comparison import as_rows, compare_routers
from nexus_ray.router.moments import OrderedMerge, RouterMoments

SEQUENCES, LENGTH, LAYERS, EXPERTS, TOP_K = 6, 32, 2, 4, 2


def logits(seed: int, shift: float = 0.0) -> torch.Tensor:
    values = torch.randn(SEQUENCES, LENGTH, LAYERS, EXPERTS, generator=torch.Generator().manual_seed(seed))
    values[:, :, 1, 0] += shift
    return values


def moments(values: torch.Tensor) -> RouterMoments:
    valid = np.ones(values.shape[:2], bool)
    return moments_of_logits(values, valid, np.arange(len(values)) % 2, TOP_K)


def test_a_model_does_not_differ_from_itself():
    for layer in compare_routers(moments(logits(0)), moments(logits(0))):
        assert (layer.usage_distance, layer.probability_distance, layer.covariance_distance) == (0, 0, 0)
        assert layer.halves_distance > 0


def test_distances_are_those_of_the_tokens_themselves():
    first, second = logits(0), logits(0, shift=1.5)
    rows = as_rows(compare_routers(moments(first), moments(second)))
    for name in ("usage_distance", "probability_distance", "covariance_distance"):
        assert rows[name][0] == 0
        assert rows[name][1] > 0
    tokens = [values[:, :, 1].reshape(-1, EXPERTS).double() for values in (first, second)]
    probabilities = [values.softmax(-1).numpy() for values in tokens]
    change = np.abs(probabilities[0].mean(0) - probabilities[1].mean(0)).sum() / 2
    assert rows["probability_distance"][1] == pytest.approx(change, rel=1e-5)
    used = [np.bincount(values.topk(TOP_K).indices.flatten(), minlength=EXPERTS) for values in tokens]
    usage = np.abs(used[0] - used[1]).sum() / 2 / (SEQUENCES * LENGTH * TOP_K)
    assert rows["usage_distance"][1] == pytest.approx(usage)
    covariance = [np.cov(values, rowvar=False) for values in probabilities]
    expected = np.linalg.norm(covariance[1] - covariance[0]) / np.linalg.norm(covariance[0])
    assert rows["covariance_distance"][1] == pytest.approx(expected, rel=1e-4)


def test_the_halves_are_compared_for_scale():
    first = logits(3)
    used = [
        np.bincount(first[part::2, :, 0].reshape(-1, EXPERTS).topk(TOP_K).indices.flatten(), minlength=EXPERTS)
        for part in (0, 1)
    ]
    expected = np.abs(used[0] - used[1]).sum() / 2 / (SEQUENCES // 2 * LENGTH * TOP_K)
    assert compare_routers(moments(first), moments(first))[0].halves_distance == pytest.approx(expected)


@pytest.mark.parametrize("other", [logits(0)[:-2], logits(0)[:, :, :1]])
def test_moments_of_other_text_or_another_model_are_refused(other):
    with pytest.raises(ArtefactError, match="cannot be compared"):
        compare_routers(moments(logits(0)), moments(other))


def test_merging_in_order_gives_the_same_bits_whichever_arrives_first():
    parts = [moments(logits(seed)) for seed in range(5)]
    results = []
    for arrival in ([0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [2, 0, 4, 1, 3]):
        merge = OrderedMerge([10, 11, 12, 13, 14], RouterMoments.empty(LAYERS, EXPERTS))
        for number in arrival:
            merge.add(10 + number, parts[number])
        results.append(merge.merged.arrays())
    for name, values in results[0].items():
        assert values.tobytes() == results[1][name].tobytes() == results[2][name].tobytes()
    assert results[0]["count"].sum() == 5 * SEQUENCES * LENGTH
