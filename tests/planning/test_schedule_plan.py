"""The schedules that `plan` shows are those that training uses, step by step."""

from __future__ import annotations

from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from nexus_ray.config import Config, resolve_config
from nexus_ray.planning.schedule_table import show_schedules, sparkline, ticks
from nexus_ray.planning.schedules import make_schedules
from nexus_ray.plots import plot_schedules
from nexus_ray.training.losses.objective import objective_at
from nexus_ray.training.schedule import learning_rates

DEMO = Path(__file__).parents[2] / "configs" / "demo.yaml"
EVERYTHING = (
    "train.mode=online",
    "train.steps=80",
    "train.router_temperature=[[0.3, 4], [1, 2]]",
    "train.sources.speeches.router_kl=[[0, 0], [0.1, 0.5]]",
    "train.sources.code.output_kl=[[0, 0], [0.5, 4]]",
    "train.averaging.every=30",
    "train.routers.train=all",
    "train.routers.freeze_bias_at=0.7",
)


def config(*overrides: str) -> Config:
    return resolve_config(DEMO, list(overrides), Config).config


def shown(*overrides: str) -> str:
    console = Console(width=100, file=StringIO())
    with console.capture() as captured:
        console.print(show_schedules(make_schedules(config(*overrides))))
    return captured.get()


def test_every_value_is_the_one_that_training_takes():
    train = config(*EVERYTHING).train
    made = make_schedules(config(*EVERYTHING))
    assert set(made.weights) == {"speeches, router_kl", "code, output_kl"}
    for step in range(80):
        rates = learning_rates(step, 80, train.optimiser, train.routers)
        assert {name: values[step] for name, values in made.rates.items()} == rates
        objective = objective_at(train, step / 80)
        assert made.temperatures["router_kl"][step] == objective.router_temperature
        assert made.temperatures["output_kl"][step] == objective.output_temperature
        assert made.weights["code, output_kl"][step] == objective.weights["code"]["output_kl"]
        assert made.weights["speeches, router_kl"][step] == objective.weights["speeches"]["router_kl"]


def test_merges_and_the_freeze_stand_where_they_happen():
    made = make_schedules(config(*EVERYTHING))
    assert made.merges == (30, 60)
    assert made.frozen_at == 56
    biases = made.rates["router_bias_learning_rate"]
    assert biases[55] > 0
    assert not biases[56:].any()


def test_a_plain_run_has_a_learning_rate_and_the_temperature_of_its_loss():
    made = make_schedules(config())
    assert set(made.rows()) == {"learning rate", "output_kl temperature"}
    assert (made.merges, made.frozen_at) == ((), None)
    assert "merges" not in shown()


def test_a_sparkline_goes_from_zero_to_the_largest_value():
    assert sparkline(np.arange(8.0), 8) == "▁▂▃▄▅▆▇█"
    assert sparkline(np.full(50, 3.0), 4) == "████"
    assert sparkline(np.zeros(5), 3) == "▁▁▁"
    assert sparkline(np.ones(1), 3) == "███"


@pytest.mark.parametrize(("steps", "line"), [((10, 20), "·|·|"), ((1,), "|···"), ((20,), "···|")])
def test_ticks_stand_in_proportion(steps: tuple[int, ...], line: str):
    assert ticks(steps, 20, 4) == line


def test_the_table_names_every_schedule():
    text = shown(*EVERYTHING)
    for name in ("learning rate", "router learning rate", "router_kl temperature", "weight of code, output_kl"):
        assert name in text
    assert "merged with the anchor 2 times, first after step 30" in text
    assert "router biases stay as they are after step 56" in text


def test_they_can_be_drawn(tmp_path: Path):
    plot_schedules(make_schedules(config(*EVERYTHING)), tmp_path / "all.png")
    assert (tmp_path / "all.png").read_bytes().startswith(b"\x89PNG")
