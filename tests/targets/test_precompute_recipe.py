"""Which settings make a finished target set stale: those that decide what is stored, as they are used."""

from __future__ import annotations

import pytest

from nexus_ray.pipeline import Run

OFFLINE, ROUTERS = {"train.mode": "offline"}, {"train.sources.play.router_kl": 1.0}
SELECTED = {**ROUTERS, "targets.router": "selected"}


@pytest.mark.parametrize(
    ("given", "change", "stale"),
    [
        (OFFLINE, {"targets.top_k": 8}, True),
        (OFFLINE, {"targets.value_bits": 8}, True),
        (OFFLINE, {"targets.mode": "hidden"}, True),
        (OFFLINE, {"targets.max_tokens": 100}, True),
        (OFFLINE, {"targets.batch_sequences": 2}, True),
        (OFFLINE, {"train.output_temperature": 2.0}, True),
        (OFFLINE, {"train.sources.play.output_kl": 1.0}, True),
        (OFFLINE, ROUTERS, True),
        (OFFLINE, {"train.mode": "online"}, True),
        (OFFLINE, {"train.sources.prose.output_kl": 9.0}, False),
        (OFFLINE, {"targets.draws": 3}, False),
        (OFFLINE, {"targets.router": "selected"}, False),
        (OFFLINE, {"run.seed": 3}, False),
        (OFFLINE, {"train.router_temperature": 2.0}, False),
        ({"targets.mode": "sampled"}, {"run.seed": 3}, True),
        ({"targets.mode": "sampled"}, {"targets.draws": 3}, True),
        ({"targets.mode": "sampled"}, {"targets.top_k": 8}, False),
        ({"targets.mode": "hidden"}, {"train.output_temperature": 2.0}, False),
        (ROUTERS, {"targets.router_every": 2}, True),
        (ROUTERS, {"targets.router_layers": [1]}, True),
        (ROUTERS, {"train.router_temperature": 2.0}, False),
        (SELECTED, {"train.router_temperature": 2.0}, True),
        ({"train.mode": "online"}, {"targets.top_k": 8, "targets.batch_sequences": 2}, False),
        ({"train.mode": "online"}, {"targets.max_tokens": 100}, True),
    ],
)
def test_a_setting_makes_targets_stale_where_it_decides_them(given, change, stale, micro_config, tmp_path) -> None:
    before, after = (
        Run(micro_config(tmp_path / "run", **settings)).recipe("precompute") for settings in (given, given | change)
    )
    assert (before != after) == stale


def test_text_of_a_source_that_is_not_trained_on_does_not(micro_config, micro_texts, tmp_path) -> None:
    config = micro_config(tmp_path / "run")
    more = config.data.sources["play"].model_copy(update={"train": (f"{micro_texts}/prose.heldout.jsonl",)})
    data = config.data.model_copy(update={"sources": {**config.data.sources, "unused": more}})
    assert Run(config.model_copy(update={"data": data})).recipe("precompute") == Run(config).recipe("precompute")
