"""How much of a source a step reads, which losses it may have, and the targets that they need."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from nexus_ray.config import LOSSES, Config

Configured, Refused = Callable[..., Config], Callable[..., str]
KL, ROUTERS, HIDDEN = (f"train.sources.play.{loss}=1" for loss in ("output_kl", "router_kl", "hidden_mse"))
WARMING = "=[[0,1],[1,2]]"


class TestSequencesOfAStep:
    @pytest.mark.parametrize(("tokens", "sequences"), [(1, 1), (511, 1), (512, 1), (513, 2), (16_384, 32)])
    def test_tokens_are_rounded_up_to_whole_sequences(
        self, configured: Configured, tokens: int, sequences: int
    ) -> None:
        config = configured(f"train.sources.play={{tokens_per_step: {tokens}, cross_entropy: 1}}")
        assert config.sequences_per_step() == {"play": sequences}

    def test_the_same_tokens_are_more_of_shorter_sequences(self, configured: Configured) -> None:
        play = "train.sources.play={tokens_per_step: 2048, cross_entropy: 1}"
        assert configured(play, "data.sequence_length=100").sequences_per_step() == {"play": 21}

    def test_sources_may_say_it_either_way(self, configured: Configured) -> None:
        config = configured("train.sources.prose={tokens_per_step: 1024, cross_entropy: 1}")
        assert config.sequences_per_step() == {"play": 4, "prose": 2}

    @pytest.mark.parametrize("amounts", ["", "sequences_per_step: 4, tokens_per_step: 2048, "])
    def test_neither_or_both_are_refused(self, refused: Refused, amounts: str) -> None:
        message = refused(f"train.sources.play={{{amounts}cross_entropy: 1}}")
        assert "train.sources.play: give it either sequences_per_step or tokens_per_step" in message

    @pytest.mark.parametrize("field", ["sequences_per_step", "tokens_per_step"])
    def test_none_at_all_is_refused(self, refused: Refused, field: str) -> None:
        message = refused(f"train.sources.play={{{field}: 0, cross_entropy: 1}}")
        assert f"train.sources.play.{field}: Input should be greater than or equal to 1 (found 0)" in message


class TestLosses:
    @pytest.mark.parametrize("weight", ["0", "[[0,0],[1,0]]"])
    def test_a_source_whose_weights_are_always_zero_is_refused(self, refused: Refused, weight: str) -> None:
        message = refused(f"train.sources.play.cross_entropy={weight}")
        assert "train.sources.play: it has no loss" in message

    def test_a_loss_that_begins_later_is_one(self, configured: Configured) -> None:
        play = configured("train.sources.play.cross_entropy=[[0.5,0],[1,1]]").train.sources["play"]
        assert play.cross_entropy

    @pytest.mark.parametrize("loss", ["load_balancing", "router_z"])
    def test_losses_of_trained_routers_are_refused_for_frozen_ones(
        self, configured: Configured, refused: Refused, loss: str
    ) -> None:
        weight = f"train.sources.play.{loss}=0.01"
        assert f"sources.play.{loss} is for trained routers: set train.routers.train" in refused(weight)
        for trained in ("bias", "all"):
            assert getattr(configured(weight, f"train.routers.train={trained}").train.sources["play"], loss)

    def test_nothing_has_a_weight_that_was_not_given_one(self, configured: Configured) -> None:
        play = configured().train.sources["play"]
        assert [loss for loss in LOSSES if getattr(play, loss)] == ["cross_entropy"]


class TestRequiredTargets:
    @pytest.mark.parametrize(
        ("settings", "said"),
        [
            ((KL, "targets.mode=none"), "train.sources.play.output_kl needs targets: set targets.mode"),
            ((ROUTERS, "targets.router=none"), "train.sources.play.router_kl needs targets: set targets.router"),
            *(
                ((HIDDEN, f"targets.mode={mode}"), "play.hidden_mse needs hidden states: set targets.mode=hidden")
                for mode in ("topk", "sampled", "none")
            ),
            *(
                (
                    (KL, "targets.mode=sampled", f"train.output_divergence={form}"),
                    f"train.output_divergence={form} needs targets.mode topk or hidden",
                )
                for form in ("reverse_kl", "jsd")
            ),
            *(
                (
                    (KL, f"targets.mode={mode}", f"train.output_temperature{WARMING}"),
                    "train.output_temperature can change only with targets.mode=hidden",
                )
                for mode in ("topk", "sampled")
            ),
            (
                (ROUTERS, "targets.router=selected", f"train.router_temperature{WARMING}"),
                "train.router_temperature can change only with targets.router=logits",
            ),
        ],
    )
    def test_a_loss_that_stored_targets_cannot_give_is_refused_and_an_online_teacher_can(
        self, configured: Configured, refused: Refused, settings: tuple[str, ...], said: str
    ) -> None:
        assert said in refused(*settings)
        configured(*settings, "train.mode=online")

    @pytest.mark.parametrize(
        "settings",
        [
            (KL, "targets.mode=hidden", f"train.output_temperature{WARMING}"),
            (KL, "targets.mode=hidden", "train.output_divergence=jsd"),
            (KL, "targets.mode=topk", "train.output_temperature=[[0.2,2],[0.9,2]]"),
            (KL, "targets.mode=topk", "targets.router=none"),
            (HIDDEN, "targets.mode=hidden"),
            (ROUTERS, "targets.router=logits", f"train.router_temperature{WARMING}"),
            (ROUTERS, "targets.router=selected", "train.router_temperature=2"),
            (ROUTERS, "targets.mode=none"),
            ("targets.mode=none", "targets.router=none"),
            ("targets.mode=sampled", "train.output_divergence=jsd", f"train.output_temperature{WARMING}"),
        ],
        ids=" ".join,
    )
    def test_what_targets_can_give_is_accepted(self, configured: Configured, settings: tuple[str, ...]) -> None:
        configured(*settings)

    def test_a_weight_that_is_zero_at_first_needs_its_targets_all_the_same(self, refused: Refused) -> None:
        message = refused("train.sources.play.output_kl=[[0.9,0],[1,1]]", "targets.mode=none")
        assert "train.sources.play.output_kl needs targets" in message

    def test_the_source_that_lacks_them_is_the_one_that_is_named(self, refused: Refused) -> None:
        prose = "train.sources.prose={sequences_per_step: 1, hidden_mse: 1}"
        assert "train.sources.prose.hidden_mse needs hidden states" in refused(prose)
