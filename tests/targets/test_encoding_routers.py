"""Router targets: logits to half a step, selected experts as a softmax over all experts has them."""

from __future__ import annotations

from math import ceil

import pytest
import torch
from pydantic import ValidationError

from nexus_ray.targets.encoding.routers import RouterEncoding

EXPERTS, CHOSEN = 32, 4


def encoding(mode: str, **changes: object) -> RouterEncoding:
    values = {"mode": mode, "layers": (0, 2, 5), "every": 1, "experts": EXPERTS, "experts_per_token": CHOSEN}
    return RouterEncoding.model_validate(values | changes)


def logits(seed: int, scale: float = 2.0, positions: int = 7) -> torch.Tensor:
    return torch.randn(positions, 3, EXPERTS, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize("scale", [1e-3, 1.0, 2.0, 50.0])
def test_logits_are_half_a_step_off_at_most_up_to_a_constant(scale):
    values = logits(0, scale)
    form = encoding("logits")
    columns = form.encode(values)
    assert {name: column.shape[-1] for name, column in columns.items()} == form.widths()
    found = form.decode(columns).logits
    centred = values - values.amax(-1, keepdim=True)
    step = (values.amax(-1) - values.amin(-1)) / 255
    assert ((found - centred).abs().amax(-1) <= step * 0.63).all()  # a float16 step: 2^-11 of the range beyond a half
    expected = values.double().log_softmax(-1)
    lost = (expected.exp() * (expected - found.double().log_softmax(-1))).sum(-1)
    assert lost.max() < step.max().square()


def test_equal_and_enormous_logits_stay_finite():
    form = encoding("logits")
    same = form.decode(form.encode(torch.full((2, 3, EXPERTS), 9.0))).logits
    assert (same == 0).all()
    huge = form.decode(form.encode(logits(1, 1e8))).logits
    assert torch.isfinite(huge).all()
    assert torch.equal(huge.argmax(-1), logits(1, 1e8).argmax(-1))


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_selected_experts_have_their_share_of_the_whole_softmax(temperature):
    values = logits(2)
    form = encoding("selected", temperature=temperature)
    columns = form.encode(values)
    assert {name: column.shape[-1] for name, column in columns.items()} == form.widths()
    found = form.decode(columns).selected
    assert found.ids.shape == found.log_probs.shape == (7, 3, CHOSEN)
    expected = (values.double() / temperature).log_softmax(-1)
    assert torch.equal(found.ids, expected.topk(CHOSEN).indices.sort(-1).values)
    torch.testing.assert_close(found.log_probs.double(), expected.gather(-1, found.ids), rtol=0, atol=0.02)
    rest = expected.scatter(-1, found.ids, -torch.inf).logsumexp(-1)
    torch.testing.assert_close(found.tail_log_prob.double(), rest, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("mode", ["logits", "selected"])
def test_layers_and_positions_stay_apart(mode):
    """Each router's bytes are those it has alone."""
    values, form = logits(3), encoding(mode)
    together = form.encode(values)
    for layer in range(3):
        alone = encoding(mode, layers=(9,)).encode(values[4:5, layer : layer + 1])
        for name, column in together.items():
            width = column.shape[-1] // 3
            assert torch.equal(column[4, layer * width : (layer + 1) * width], alone[name][0])


@pytest.mark.parametrize("mode", ["logits", "selected"])
def test_no_positions_are_no_bytes(mode):
    form = encoding(mode)
    columns = form.encode(logits(4)[:0])
    assert all(column.shape == (0, form.widths()[name]) for name, column in columns.items())
    found = form.decode(columns)
    assert (found.logits if mode == "logits" else found.selected.ids).shape[:2] == (0, 3)


@pytest.mark.parametrize("mode", ["logits", "selected"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_logits_that_are_no_numbers_are_refused(mode, value):
    values = logits(5)
    values[6, 1, 30] = value
    with pytest.raises(ValueError, match="router logits are NaN or infinite"):
        encoding(mode).encode(values)


@pytest.mark.parametrize("every", [1, 2, 7])
def test_stored_positions_are_every_nth_from_the_first(every):
    for tokens in (1, 6, 7, 8, 15):
        expected = sum(position % every == 0 for position in range(tokens))
        assert encoding("logits", every=every).positions(tokens) == expected == ceil(tokens / every)


@pytest.mark.parametrize("wrong", [{"layers": ()}, {"every": 0}, {"experts": 0}, {"experts_per_token": 0}])
def test_settings_that_mean_nothing_are_refused(wrong):
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        encoding("logits", **wrong)
