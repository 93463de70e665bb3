"""Another width: smaller keeps the strongest neurons, larger leaves the function as it was."""

import pytest
import torch

from nexus_ray.conversion.width import most_important, resize
from nexus_ray.families import FAMILIES, ExpertWeights


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def outputs(expert: ExpertWeights, inputs: torch.Tensor) -> torch.Tensor:
    gate, up = (inputs @ expert.gate_up.T + expert.gate_up_bias).chunk(2, dim=-1)
    return FAMILIES["gpt_oss"].expert_activation(gate, up, {}) @ expert.down.T + expert.down_bias


def test_importance_is_the_product_of_the_norms_of_a_neurons_inputs_and_outputs(random_weights):
    expert = random_weights()
    scores = [
        float(expert.down[:, i].norm() * torch.cat([expert.gate_up[i], expert.gate_up[i + 20]]).norm())
        for i in range(20)
    ]
    assert most_important(expert, 7).tolist() == sorted(sorted(range(20), key=lambda i: -scores[i])[:7])


def test_a_smaller_width_is_a_slice(random_weights, generator):
    expert = random_weights()
    small = resize(expert, 7, generator)
    kept = most_important(expert, 7)
    gate, up = expert.gate_up[:20], expert.gate_up[20:]
    assert torch.equal(small.gate_up, torch.cat([gate[kept], up[kept]]))
    assert torch.equal(small.gate_up_bias, torch.cat([expert.gate_up_bias[:20][kept], expert.gate_up_bias[20:][kept]]))
    assert torch.equal(small.down, expert.down[:, kept])
    assert torch.equal(small.down_bias, expert.down_bias)


def test_a_larger_width_computes_the_same_and_its_new_neurons_can_learn(random_weights, generator):
    expert = random_weights()
    large = resize(expert, 33, generator)
    inputs = torch.randn(9, 12, generator=generator)
    assert large.gate_up.shape == (66, 12)
    assert torch.allclose(outputs(large, inputs), outputs(expert, inputs), atol=1e-5)
    fresh = torch.cat([large.gate_up[20:33], large.gate_up[53:]])
    assert 0.01 < fresh.std() < 0.03
    assert not large.down[:, 20:].any()


def test_the_same_width_is_the_same_expert(random_weights, generator):
    expert = random_weights()
    assert resize(expert, 20, generator) is expert
