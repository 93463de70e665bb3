"""Numbers that change during a run: how they are written, read, refused, saved and described."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from nexus_ray.config import (
    Config,
    Scheduled,
    describe_field,
    flatten,
    load_config,
    resolve_config,
    save_config,
)

Configured, Refused = Callable[..., Config], Callable[..., str]
RISING = Scheduled(((0.2, 0.0), (0.6, 4.0)))
ANNEALED = "train.router_temperature=[[0.3,4],[1,2]]"


class TestValues:
    @pytest.mark.parametrize("share", [0.0, 0.37, 1.0])
    def test_a_number_is_the_same_all_the_time(self, share: float) -> None:
        assert Scheduled(3.5).at(share) == 3.5

    @pytest.mark.parametrize(
        ("share", "value"), [(0.0, 0.0), (0.2, 0.0), (0.3, 1.0), (0.4, 2.0), (0.6, 4.0), (0.61, 4.0), (1.0, 4.0)]
    )
    def test_points_are_joined_by_straight_lines_and_hold_before_and_after(self, share: float, value: float) -> None:
        assert RISING.at(share) == pytest.approx(value, abs=1e-12)

    @pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
    def test_one_point_is_a_number(self, share: float) -> None:
        assert Scheduled(((0.5, 7.0),)).at(share) == 7.0

    def test_a_line_with_several_bends_passes_through_every_point(self) -> None:
        points = ((0.0, 1.0), (0.1, 3.0), (0.35, 0.0), (1.0, 2.0))
        assert [Scheduled(points).at(share) for share, _ in points] == [value for _, value in points]

    def test_what_never_changes_is_constant_however_it_is_written(self) -> None:
        assert Scheduled(2.0).constant == 2.0
        assert Scheduled(((0.1, 2.0), (0.9, 2.0))).constant == 2.0
        assert RISING.constant is None

    def test_the_end_of_the_run_has_the_last_value(self) -> None:
        assert (RISING.final, Scheduled(3.0).final) == (4.0, 3.0)

    def test_only_what_is_always_zero_is_nothing(self) -> None:
        assert not Scheduled(0.0)
        assert not Scheduled(((0.0, 0.0), (1.0, 0.0)))
        assert Scheduled(((0.0, 0.0), (1.0, 1e-6)))
        assert Scheduled(((0.0, 1.0), (0.1, 0.0)))

    def test_it_reads_as_it_is_written(self) -> None:
        assert str(Scheduled(2.0)) == "2"
        assert str(RISING) == "[[0.2, 0.0], [0.6, 4.0]]"


class TestOverrides:
    def test_the_router_temperature_anneals_from_4_to_2_from_30_percent_of_the_run(
        self, configured: Configured
    ) -> None:
        temperature = configured(ANNEALED).train.router_temperature
        assert [temperature.at(share) for share in (0.0, 0.15, 0.3)] == [4.0, 4.0, 4.0]
        assert temperature.at(0.65) == pytest.approx(3.0)
        assert temperature.at(1.0) == 2.0

    def test_a_weight_may_warm_up(self, configured: Configured) -> None:
        config = configured("train.mode=online", "train.sources.play.router_kl=[[0,0],[0.1,0.5]]")
        weight = config.train.sources["play"].router_kl
        assert [weight.at(share) for share in (0.0, 0.05, 0.1, 1.0)] == pytest.approx([0.0, 0.25, 0.5, 0.5])

    def test_a_whole_number_is_a_number(self, configured: Configured) -> None:
        assert configured("train.router_temperature=4").train.router_temperature == Scheduled(4.0)


class TestRefusals:
    @pytest.mark.parametrize(
        "value", ["warm", "null", ".nan", ".inf", "[1,2]", "[[0,1,2]]", "[[0.5]]", "[[0,.nan]]", "[[0,-.inf]]"]
    )
    def test_what_is_neither_a_number_nor_points_is_named_once_with_what_was_found(
        self, refused: Refused, value: str
    ) -> None:
        message = refused(f"train.router_temperature={value}")
        form = "train.router_temperature: give a finite number, or points [share of the run, value] (found "
        assert form in message
        assert message.count("train.router_temperature") == 1

    def test_fields_below_a_number_are_refused_by_its_name(self, refused: Refused) -> None:
        assert "train.router_temperature: give a finite number" in refused("train.router_temperature.start=4")

    def test_no_points_are_refused(self, refused: Refused) -> None:
        assert "train.router_temperature: give a number, or at least one point" in refused(
            "train.router_temperature=[]"
        )

    @pytest.mark.parametrize(
        "value", ["[[0.5, 1], [0.2, 2]]", "[[0.5, 1], [0.5, 2]]", "[[0, 1], [1.2, 2]]", "[[-1, 1]]"]
    )
    def test_shares_must_ascend_within_the_run(self, refused: Refused, value: str) -> None:
        message = refused(f"train.router_temperature={value}")
        assert "with ascending shares between 0 and 1" in message
        assert f"(found {value})" in message

    @pytest.mark.parametrize("value", ["0", "-2", "[[0, 4], [1, 0]]"])
    @pytest.mark.parametrize("name", ["router_temperature", "output_temperature"])
    def test_a_temperature_is_above_0_at_every_point(self, refused: Refused, name: str, value: str) -> None:
        message = refused("train.mode=online", f"train.{name}={value}")
        assert f"train.{name}: a temperature must be greater than 0 (found {value})" in message

    @pytest.mark.parametrize("value", ["-1", "[[0, 1], [1, -1]]"])
    def test_a_weight_is_never_negative(self, refused: Refused, value: str) -> None:
        message = refused(f"train.sources.play.cross_entropy={value}")
        assert f"train.sources.play.cross_entropy: a weight must not be negative (found {value})" in message


class TestFiles:
    def test_saved_points_are_read_back_to_an_equal_configuration(self, configured: Configured, tmp_path: Path) -> None:
        config = configured(ANNEALED, "train.sources.play.cross_entropy=[[0,0],[0.1,1]]")
        save_config(config, tmp_path / "saved.yaml")
        assert load_config(tmp_path / "saved.yaml") == config

    def test_a_schedule_is_one_field_with_one_origin(self, tmp_path: Path, configured: Configured) -> None:
        assert flatten(configured(ANNEALED))["train.router_temperature"] == [[0.3, 4.0], [1.0, 2.0]]
        resolved = resolve_config(tmp_path / "small.yaml", [ANNEALED], Config)
        assert resolved.origins["train.router_temperature"] == f"override {ANNEALED}"
        assert not [name for name in resolved.origins if name.startswith("train.router_temperature.")]

    @pytest.mark.parametrize(
        ("dotted", "word"),
        [("train.router_temperature", "temperature"), ("train.sources.play.router_z", "log-sum-exp")],
    )
    def test_a_field_that_holds_one_is_described_by_its_own_section(self, dotted: str, word: str) -> None:
        assert word in describe_field(Config, dotted)
