"""The calibration text of a run: how much of each source, which sequences, in which halves, chosen once."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from nexus_ray.data.coverage import TokenCounts, coverage
from nexus_ray.data.packing import pack_shard
from nexus_ray.data.sources import list_shards
from nexus_ray.errors import ArtefactError, ConfigError, DataError
from nexus_ray.layout import RunLayout
from nexus_ray.router.calibration import Calibration, choose_calibration
from nexus_ray.router.candidates import plan_candidates, token_budgets
from nexus_ray.storage import sha256_file

SHAKESPEARE = Path(__file__).parents[2] / "assets/text/shakespeare.train.jsonl"


def write_shakespeare(path: Path, size: int) -> Path:
    """About `size` bytes of the play, in lines of 80 words, so that every shard holds the start of some."""
    words = SHAKESPEARE.read_text().split()
    lines = (json.dumps({"text": " ".join(words[at : at + 80])}) + "\n" for at in range(0, len(words), 80))
    text = ""
    while len(text) < size:
        text += next(lines)
    path.write_text(text)
    return path


def only(text: Path | str, tokens: int) -> dict[str, object]:
    """Overrides of a run that chooses so many tokens of one text, in sequences of 512."""
    return {
        "data.sources.play.train": str(text),
        "collect.tokens": tokens,
        "collect.mixture": {"play": 1.0},
        "data.sequence_length": 512,
    }


def choose(config) -> Calibration:
    return choose_calibration(config, RunLayout(config.run.directory).calibration)


def counts_of(text) -> TokenCounts:
    return TokenCounts.from_sequences(ids[:n] for ids, n in zip(text.input_ids, text.num_tokens, strict=True))


@pytest.mark.parametrize("mixture", [None, {"play": 0.75, "prose": 0.25}])
def test_each_source_gives_its_share_in_whole_sequences(mixture, micro_config, tmp_path, in_process):
    config = micro_config(tmp_path / "run", **{"collect.tokens": 2000, "collect.mixture": mixture})
    assert token_budgets(config) == ({"play": 1500, "prose": 500} if mixture else {"play": 1000, "prose": 1000})
    calibration = choose(config)
    for name, budget in token_budgets(config).items():
        text = calibration.sources[name]
        assert budget <= text.num_tokens.sum() + 2 * 63, "short only by the padding of a shard's last sequence"
        assert len(text) <= 2 * -(-budget // 128) + 2
        assert calibration.description.samples[name].tokens == text.num_tokens.sum()


def test_a_source_outside_the_mixture_is_not_read(micro_config, tmp_path, in_process):
    config = micro_config(tmp_path / "run", **{"collect.mixture": {"play": 1.0}})
    assert set(choose(config).sources) == {"play"}
    assert {row["shard"]["source"] for row in in_process} == {"play"}


@pytest.mark.parametrize(
    ("mixture", "message"),
    [
        ({"play": 0.5, "prose": 0.4}, "add up to 0.9, not to 1"),
        ({"play": 0.5, "prosa": 0.5}, "no source 'prosa'.*did you mean 'prose'"),
        ({"prose": 1.0}, "leaves out 'play'"),
        ({"play": -0.5, "prose": 1.5}, "mixture.play"),
    ],
)
def test_a_wrong_mixture_is_refused_by_name(mixture, message, micro_config, tmp_path):
    with pytest.raises(ConfigError, match=message):
        micro_config(tmp_path / "run", **{"collect.mixture": mixture})


def test_chosen_sequences_are_what_packing_the_text_gives(micro_config, tmp_path, in_process, micro_model):
    config = micro_config(tmp_path / "run")
    tokenizer = AutoTokenizer.from_pretrained(micro_model)
    shards = {shard.index: shard for shard in list_shards(config.data, "train")}
    for text in choose(config).sources.values():
        for row in range(len(text)):
            packed = list(pack_shard(shards[int(text.shard[row])], tokenizer, 64))[int(text.position[row])]
            np.testing.assert_array_equal(text.input_ids[row], packed.input_ids)
            assert text.num_tokens[row] == packed.num_tokens


def test_the_coverage_choice_covers_more_than_a_random_one_and_both_say_so(micro_config, tmp_path, in_process):
    text = Path(__file__).parents[2] / "assets/text/shakespeare.train.jsonl"
    own = {"data.sources.play.train": str(text), "collect.tokens": 4096, "collect.mixture": {"play": 1.0}}
    chosen = {}
    for method in ("coverage", "random"):
        calibration = choose(micro_config(tmp_path / method, **own, **{"collect.sampling": method}))
        sample, play = calibration.description.samples["play"], calibration.sources["play"]
        counts = counts_of(play)
        assert sample.method == method
        assert sample.coverage == pytest.approx(coverage(counts, np.arange(len(counts))))
        assert sample.distinct_tokens == len(set(play.input_ids[play.batch().valid]))
        chosen[method] = sample
    assert chosen["coverage"].tokens <= 4096
    assert chosen["coverage"].coverage > 1.05 * chosen["coverage"].random_coverage
    assert chosen["coverage"].coverage > 1.05 * chosen["random"].coverage
    assert chosen["random"].coverage == pytest.approx(chosen["random"].random_coverage, rel=0.05)


def test_halves_share_no_shard_and_are_of_about_one_size(micro_config, tmp_path, in_process):
    for text in choose(micro_config(tmp_path / "run")).sources.values():
        first, second = ({int(shard) for shard in text.shard[text.half == half]} for half in (0, 1))
        assert not first & second
        sizes = [int((text.half == half).sum()) for half in (0, 1)]
        assert min(sizes) >= 0.8 * max(sizes)


def test_a_shard_barely_cut_in_two_still_gives_the_budget_from_two_equal_halves(micro_config, tmp_path, in_process):
    text = write_shakespeare(tmp_path / "play.jsonl", 66_569)
    config = micro_config(tmp_path / "run", **{**only(text, 8192), "data.shard_bytes": 65_536})
    play = choose(config).sources["play"]
    tokens = [int(play.num_tokens[play.half == half].sum()) for half in (0, 1)]
    assert min(tokens) > 4096 - 512, "short of the budget by less than a sequence"
    assert (np.diff(play.half[play.shard == 0]) != 0).sum() == 1, "the large shard is cut once"


def test_many_files_shorter_than_a_sequence_give_the_budget(micro_config, tmp_path, in_process, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("nexus_ray"), "propagate", True)
    directory = tmp_path / "files"
    directory.mkdir()
    words = (SHAKESPEARE.read_text() + " ").split()
    for number in range(400):
        (directory / f"{number:03d}.txt").write_text(" ".join(words[8 * number : 8 * number + 8]))
    config = micro_config(tmp_path / "run", **only(f"{directory}/*.txt", 4000))
    play = choose(config).sources["play"]
    assert int(play.num_tokens.sum()) >= 0.95 * 4000
    first, second = ({int(shard) for shard in play.shard[play.half == half]} for half in (0, 1))
    assert not first & second
    assert "calibration tokens asked for" not in caplog.text


def test_a_source_that_has_less_than_was_asked_for_is_reported(micro_config, tmp_path, in_process, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("nexus_ray"), "propagate", True)
    calibration = choose(micro_config(tmp_path / "run", **{"collect.tokens": 1_000_000}))
    tokens = int(calibration.sources["play"].num_tokens.sum())
    expected = (
        f"data.sources.play.train gives {tokens:,} of the 500,000 calibration tokens asked for: it has no more text"
    )
    assert expected in caplog.text


def test_candidates_that_missed_most_of_the_text_are_reported(micro_config, tmp_path, in_process, caplog, monkeypatch):
    """Lines far longer than a shard: most shards hold the start of none."""
    monkeypatch.setattr(logging.getLogger("nexus_ray"), "propagate", True)
    text = tmp_path / "long.jsonl"
    text.write_text((json.dumps({"text": "good sir " * 2000}) + "\n") * 8)
    overrides = {**only(text, 2048), "data.sequence_length": 64, "data.shard_bytes": 1024}
    few, many = ({**overrides, "collect.candidates": candidates} for candidates in (1, 100))
    choose(micro_config(tmp_path / "few", **few))
    assert "calibration tokens asked for: raise collect.candidates to read more of it" in caplog.text
    caplog.clear()
    assert choose(micro_config(tmp_path / "many", **many)).sources["play"].num_tokens.sum() >= 2048
    assert "asked for" not in caplog.text


def test_shards_give_candidates_in_proportion_to_their_size(micro_config, tmp_path):
    text = write_shakespeare(tmp_path / "play.jsonl", 80_000)
    overrides = {**only(text, 8192), "data.shard_bytes": 64_000, "collect.candidates": 2}
    first, second = plan_candidates(micro_config(tmp_path / "run", **overrides))
    assert first.sequences + second.sequences in (32, 33)
    assert first.sequences == pytest.approx(4 * second.sequences, abs=3)


def test_candidates_are_several_times_what_is_wanted_at_even_distances(micro_config, tmp_path):
    config = micro_config(
        tmp_path / "run",
        **{"collect.tokens": 256, "collect.candidates": 2, "collect.mixture": {"play": 1}, "data.shard_bytes": 1024},
    )
    shards = list_shards(config.data, "train", ("play",))
    work = plan_candidates(config)
    assert [item.sequences for item in work] == [1] * 8  # 2 x 4 sequences of 64
    assert [item.shard.index for item in work] == [shards[number * len(shards) // 8].index for number in range(8)]


def test_the_choice_is_made_once_and_again_when_anything_changes(micro_config, tmp_path, in_process):
    config = micro_config(tmp_path / "run")
    path = RunLayout(config.run.directory).calibration
    choose(config)
    before, read = sha256_file(path), len(in_process)
    choose(config)
    assert len(in_process) == read, "nothing is read again"
    changed = micro_config(tmp_path / "run", **{"run.seed": 1})
    choose(changed)
    assert len(in_process) == 2 * read
    choose(config)
    assert sha256_file(path) == before, "the same settings give the same bytes"


def test_a_damaged_choice_is_made_again(micro_config, tmp_path, in_process, caplog):
    config = micro_config(tmp_path / "run")
    path = RunLayout(config.run.directory).calibration
    choose(config)
    before = sha256_file(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ArtefactError, match="damaged"):
        Calibration.load(path)
    choose(config)
    assert sha256_file(path) == before


@pytest.fixture
def broken_line(micro_config, micro_texts, tmp_path):
    """A function (**overrides) -> config of a run whose `play` has a broken line in the middle."""
    lines = (micro_texts / "play.train.jsonl").read_text().splitlines()
    lines.insert(5, '{"text": "cut off')
    path = tmp_path / "broken.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return lambda **overrides: micro_config(tmp_path / "run", **{"data.sources.play.train": str(path), **overrides})


def test_an_unreadable_row_is_counted_and_reported_every_time(broken_line, in_process, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("nexus_ray"), "propagate", True)
    for _ in range(2):  # chosen, then read from the file
        caplog.clear()
        choose(broken_line())
        assert "data.sources.play.train: 1 row cannot be read" in caplog.text
        assert "broken.jsonl" in caplog.text


def test_strict_refuses_an_unreadable_row_even_in_a_choice_made_before(broken_line, in_process):
    with pytest.raises(DataError, match=r"broken\.jsonl"):
        choose(broken_line(**{"data.strict": True}))
    choose(broken_line())
    with pytest.raises(DataError, match=r"broken\.jsonl"):
        choose(broken_line(**{"data.strict": True}))


def test_a_source_without_a_readable_row_is_an_error(micro_config, tmp_path, in_process):
    path = tmp_path / "nothing.jsonl"
    path.write_text("".join(json.dumps({"txet": "a"}) + "\n" for _ in range(3)))
    config = micro_config(tmp_path / "run", **{"data.sources.play.train": str(path)})
    with pytest.raises(DataError, match=r"data\.sources\.play\.train: no row can be read"):
        choose(config)
