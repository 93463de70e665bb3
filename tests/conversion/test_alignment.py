"""Neuron matching: permuted copies become one expert again; the matching is the best there is."""

from itertools import permutations

import torch

from nexus_ray.conversion.alignment import aligned_mean, matching, neuron_similarity, permute
from nexus_ray.families import FAMILIES, ExpertWeights


def outputs(expert: ExpertWeights, inputs: torch.Tensor) -> torch.Tensor:
    gate, up = (inputs @ expert.gate_up.T + expert.gate_up_bias).chunk(2, dim=-1)
    return FAMILIES["gpt_oss"].expert_activation(gate, up, {}) @ expert.down.T + expert.down_bias


def shuffled(expert: ExpertWeights, seed: int) -> ExpertWeights:
    return permute(expert, torch.randperm(expert.width, generator=torch.Generator().manual_seed(seed)))


def test_the_mean_of_permuted_copies_is_the_expert_itself(random_weights):
    expert = random_weights()
    mean = aligned_mean([expert, *(shuffled(expert, seed) for seed in range(3))])  # four: division is exact
    for name, tensor in vars(expert).items():
        assert torch.equal(getattr(mean, name), tensor), name


def test_permuting_neurons_does_not_change_the_function(random_weights):
    expert = random_weights()
    inputs = torch.randn(5, 12, generator=torch.Generator().manual_seed(1))
    assert not torch.equal(shuffled(expert, 1).gate_up, expert.gate_up)
    assert torch.allclose(outputs(shuffled(expert, 1), inputs), outputs(expert, inputs), atol=1e-4)


def test_similarity_is_the_inner_product_of_whole_neurons(random_weights):
    left, right = random_weights(seed=1), random_weights(seed=2)

    def neuron(expert: ExpertWeights, i: int) -> torch.Tensor:
        rows = torch.cat([expert.gate_up[i], expert.gate_up[i + 20], expert.down[:, i]])
        return torch.cat([rows, expert.gate_up_bias[[i, i + 20]]])

    expected = torch.tensor([[float(neuron(left, i) @ neuron(right, j)) for j in range(20)] for i in range(20)])
    assert torch.allclose(neuron_similarity(left, right), expected, atol=1e-4)


def test_no_permutation_matches_better(random_weights):
    reference, expert = random_weights(width=6, seed=1), random_weights(width=6, seed=2)
    similarity = neuron_similarity(reference, expert)
    best = max(float(similarity[range(6), list(order)].sum()) for order in permutations(range(6)))
    found = matching(reference, expert)
    assert sorted(found.tolist()) == list(range(6))
    assert float(similarity[range(6), found].sum()) == best


def test_biases_decide_between_neurons_with_equal_weights(random_weights):
    expert = random_weights(width=2)
    same = ExpertWeights(
        expert.gate_up[[0, 0, 2, 2]], torch.tensor([1.0, -1.0, 0.0, 0.0]), expert.down[:, [0, 0]], expert.down_bias
    )
    swapped = permute(same, torch.tensor([1, 0]))
    assert matching(same, swapped).tolist() == [1, 0]
