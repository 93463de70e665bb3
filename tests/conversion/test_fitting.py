"""`lstsq` against transformers' own MoE blocks and scikit-learn, one sequence at a time."""

import json
import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from transformers import GptOssForCausalLM

from nexus_ray.checkpoints.fingerprint import fingerprint
from nexus_ray.checkpoints.overlay import load_overlay
from nexus_ray.conversion.fitting import _run_blocks, calibration_batch
from nexus_ray.conversion.initialise import convert
from nexus_ray.data.packing import Batch, pack_shard
from nexus_ray.data.sources import list_shards
from nexus_ray.errors import ArtefactError
from nexus_ray.layout import RunLayout
from nexus_ray.modeling.loading import load_base
from nexus_ray.router.calibration import Calibration, choose_calibration

SEQUENCES, RIDGE = 400, 0.01  # more sequences than there are: every shard to its padded end


@pytest.fixture
def fitting_run(ranked_run, in_process):
    """A function as `ranked_run` whose run has its calibration text too."""

    def make(**overrides):
        config, layout, selection = ranked_run(**overrides)
        choose_calibration(config, layout.calibration)
        return config, layout, selection

    return make


@pytest.fixture
def calibrated_run(make_micro_config, tmp_path, in_process):
    """A function (**overrides) -> (config, layout) of a run that has its calibration text."""

    def make(**overrides):
        config = make_micro_config(tmp_path / "run", **overrides)
        layout = RunLayout(config.run.directory)
        choose_calibration(config, layout.calibration)
        return config, layout

    return make


@pytest.fixture
def lstsq_run(fitting_run):
    return fitting_run(
        **{
            "convert.initialisation": "lstsq",
            "convert.calibration_sequences": SEQUENCES,
            "convert.ridge": RIDGE,
            "convert.dtype": "float32",
            "model.dtype": "float32",
            "collect.tokens": 1_000_000,
        }
    )


def blocks_of_sequences(model, sequences, layer):
    """[tokens, hidden] inputs and outputs of a stock MoE block; padding is cut off before the model sees it."""
    seen = []
    hook = model.model.layers[layer].mlp.register_forward_hook(lambda _m, i, o: seen.append((i[0][0], o[0][0])))
    with torch.no_grad():
        for sequence in sequences:
            model(input_ids=torch.from_numpy(sequence.input_ids[: sequence.num_tokens]).long()[None])
    hook.remove()
    return (torch.cat(parts).double().numpy() for parts in zip(*seen, strict=True))


def features_of(experts, expert, inputs):
    """Activations of one expert by the formula of the model card, with interleaved columns."""
    both = inputs @ experts.gate_up_proj[expert].double().numpy() + experts.gate_up_proj_bias[expert].double().numpy()
    gate, up = np.minimum(both[:, 0::2], 7), np.clip(both[:, 1::2], -7, 7)
    return (up + 1) * gate / (1 + np.exp(-1.702 * gate))


def test_down_projection_is_the_ridge_regression_on_the_routed_output(lstsq_run, micro_model):
    config, layout, selection = lstsq_run
    convert(config, layout)
    _, tensors = load_overlay(layout.initial_overlay, fingerprint(micro_model))
    record = json.loads((layout.conversion).read_text())
    stock = GptOssForCausalLM.from_pretrained(micro_model, dtype=torch.float32).requires_grad_(False).eval()
    base = load_base(config.model)
    batch = calibration_batch(config, layout.calibration)
    assert not batch.valid.all()  # else padding is not tested
    shards = list_shards(config.data, "train", ("play",))
    sequences = [sequence for shard in shards for sequence in pack_shard(shard, base.tokenizer, 64)]
    assert len(sequences) == len(batch.num_tokens)
    for layer in range(2):
        inputs, outputs = blocks_of_sequences(stock, sequences, layer)
        features = features_of(stock.model.layers[layer].mlp.experts, selection.ranking().used[layer][0], inputs)
        alpha = RIDGE * features.var(axis=0).mean() * len(features)
        reference = Ridge(alpha=alpha).fit(features, outputs)
        scale = np.abs(reference.coef_).max()
        np.testing.assert_allclose(tensors[f"layers.{layer}.down_proj.weight"], reference.coef_, atol=2e-3 * scale)
        np.testing.assert_allclose(tensors[f"layers.{layer}.down_proj.bias"], reference.intercept_, atol=5e-3)
        residual = ((outputs - reference.predict(features)) ** 2).sum()
        explained = 1 - residual / ((outputs - outputs.mean(0)) ** 2).sum()
        assert record["layers"][layer]["explained_variance"] == pytest.approx(explained, abs=1e-3)
        assert 0.05 < explained <= 1


def test_the_log_says_how_much_is_explained(lstsq_run, caplog, monkeypatch):
    config, layout, _ = lstsq_run
    monkeypatch.setattr(logging.getLogger("nexus_ray"), "propagate", True)
    with caplog.at_level(logging.INFO):
        convert(config, layout)
    assert "layer 1: the fit explains" in caplog.text


def test_other_widths_are_fitted_too(fitting_run, micro_model):
    for width in (24, 80):
        config, layout, _ = fitting_run(**{"convert.initialisation": "lstsq", "convert.width": width})
        convert(config, layout)
        _, tensors = load_overlay(layout.initial_overlay, fingerprint(micro_model))
        assert tensors["layers.1.down_proj.weight"].shape == (64, width)


def test_the_text_is_of_the_domain_only_as_long_as_asked_and_spread_over_the_calibration_text(fitting_run):
    config, layout, _ = fitting_run(**{"convert.calibration_sequences": 5})
    batch = calibration_batch(config, layout.calibration)
    play = Calibration.load(layout.calibration).sources["play"].input_ids
    np.testing.assert_array_equal(batch.input_ids, play[[number * len(play) // 5 for number in range(5)]])


def test_every_domain_source_gives_text_however_little_is_asked_for(calibrated_run):
    for count, expected in ((1, [1, 1]), (5, [2, 3])):
        overrides = {"convert.calibration_sequences": count, "data.sources.prose.role": "domain"}
        config, layout = calibrated_run(**overrides)
        batch = calibration_batch(config, layout.calibration)
        sources = Calibration.load(layout.calibration).sources
        rows = {name: {ids.tobytes() for ids in text.input_ids} for name, text in sources.items()}
        assert [sum(ids.tobytes() in rows[name] for ids in batch.input_ids) for name in sources] == expected


def test_text_of_a_source_that_has_left_the_configuration_is_passed_over(calibrated_run):
    config, layout = calibrated_run(**{"convert.calibration_sequences": 5})
    before = calibration_batch(config, layout.calibration)
    without = config.data.model_copy(update={"sources": {"play": config.data.sources["play"]}})
    after = calibration_batch(config.model_copy(update={"data": without}), layout.calibration)
    np.testing.assert_array_equal(after.input_ids, before.input_ids)


def test_without_text_of_any_domain_source_that_is_left_the_message_says_so(calibrated_run):
    config, layout = calibrated_run()
    without = config.data.model_copy(update={"sources": {"prose": config.data.sources["prose"]}})
    with pytest.raises(ArtefactError, match="no text of a domain source"):
        calibration_batch(config.model_copy(update={"data": without}), layout.calibration)


class OneBlockElsewhere(torch.nn.Module):
    """A model whose inputs are on one device and whose only block is on another, where hooks carry them."""

    def __init__(self) -> None:
        super().__init__()
        self.block = torch.nn.Identity()
        self.base_model = self.run

    def run(self, input_ids, attention_mask, **_):
        assert input_ids.device == attention_mask.device == torch.device("meta")
        self.block(torch.arange(12.0).view(2, 3, 2))


def test_a_block_on_another_device_than_the_inputs_keeps_its_valid_tokens_there():
    model = OneBlockElsewhere()
    base = SimpleNamespace(
        model=model, device=torch.device("meta"), family=SimpleNamespace(moe_blocks=lambda _: [model.block])
    )
    seen = []
    batch = Batch(np.zeros((2, 3), np.int32), np.asarray([3, 1], np.int32))
    _run_blocks(base, batch, lambda *arguments: seen.append(arguments))
    [(layer, inputs, outputs)] = seen
    assert layer == 0
    assert inputs.tolist() == outputs.tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_without_calibration_text_the_message_says_how_to_get_it(ranked_run):
    config, layout, _ = ranked_run(**{"convert.initialisation": "lstsq"})
    with pytest.raises(ArtefactError, match="calibration text") as caught:
        convert(config, layout)
    assert "nexus-ray collect" in str(caught.value.hint)
