"""Shards are named by what decides their bytes: none is made twice, and a set does not depend on how it came about.

Killing a run by SIGKILL is in integration/test_killed_precompute.py.
"""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
from precompute_here import contents, manifest_of, precompute_here, run_workers_here, times

from nexus_ray.data.sources import Shard
from nexus_ray.errors import NexusError
from nexus_ray.targets.format import MANIFEST, TargetFile
from nexus_ray.targets.writing import precompute as module
from nexus_ray.targets.writing.job import job_of_run
from nexus_ray.targets.writing.shard_keys import ShardWork, plan_work

TEACHER = {"train.mode": "offline"}


@pytest.fixture(autouse=True)
def rounds(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    return run_workers_here(monkeypatch)


@pytest.fixture
def text(micro_texts: Path, tmp_path: Path) -> Path:
    """A directory with a file of text of each source, which a test may change."""
    for name in ("play", "prose"):
        shutil.copy(micro_texts / f"{name}.train.jsonl", tmp_path / f"{name}.jsonl")
    return tmp_path


@pytest.fixture
def make(micro_config, text: Path, tmp_path: Path):
    """A function (directory, settings) that makes a target set of the text, without a teacher unless it is asked."""

    def precompute(name: str, **settings: object) -> Path:
        patterns = {f"data.sources.{source}.train": f"{text}/{source}*.jsonl" for source in ("play", "prose")}
        settings = {"train.mode": "online", **patterns, **settings}
        precompute_here(micro_config(tmp_path / "run", **settings), tmp_path / name)
        return tmp_path / name

    return precompute


def append(path: Path, words: str) -> None:
    with path.open("a") as file:
        file.write("".join(json.dumps({"text": f"{words} {number} " * 60}) + "\n" for number in range(6)))


def test_a_set_that_is_there_is_not_made_again(make, rounds) -> None:
    directory = make("targets")
    before = contents(directory)
    assert set(before) == {MANIFEST, *(file.name for file in manifest_of(directory).files)}
    made = len(rounds)
    make("targets")
    assert contents(directory) == before
    assert len(rounds) == made


def test_text_that_is_added_extends_a_set_to_what_it_had_been_from_scratch(make, text) -> None:
    directory = make("targets", **TEACHER)
    before = times(directory)
    append(text / "play.jsonl", "more of the same file")
    (text / "prose-2.jsonl").write_text("")
    append(text / "prose-2.jsonl", "another file")
    make("targets", **TEACHER)
    assert contents(directory) == contents(make("scratch", **TEACHER))
    after = times(directory)
    kept = {name for name in before if name in after}
    assert all(after[name] == before[name] for name in kept), "what is kept was not written again"
    gone = [name for name in before if name not in after]
    assert len(gone) <= 1, "only the shard whose text grew may be another"
    assert gone == [] or gone[0].startswith("play-")
    assert len(after) > len(before) + 1


def test_a_moved_file_is_the_same_text(make, text) -> None:
    before = times(make("targets"))
    (text / "play.jsonl").rename(text / "play-moved.jsonl")
    directory = make("targets")
    assert times(directory) == before
    assert "play-moved.jsonl" in manifest_of(directory).files[0].text


def test_the_same_text_twice_is_two_shards(make, text) -> None:
    shutil.copy(text / "play.jsonl", text / "play-again.jsonl")
    files = [file for file in manifest_of(make("targets")).files if file.source == "play"]
    half = len(files) // 2
    assert len({file.name for file in files}) == len(files) == 2 * half
    assert [file.tokens for file in files[:half]] == [file.tokens for file in files[half:]]


def test_a_missing_or_cut_shard_is_made_again_alone(make, rounds) -> None:
    directory = make("targets", **TEACHER)
    before, written = contents(directory), times(directory)
    first, second = sorted(written)[:2]
    (directory / first).unlink()
    with (directory / second).open("r+b") as file:
        file.truncate(100)
    rounds.clear()
    make("targets", **TEACHER)
    assert contents(directory) == before
    assert sorted(rounds[0]) == sorted(Path(name).stem.rpartition("-")[2] for name in (first, second))
    assert all(times(directory)[name] == written[name] for name in set(written) - {first, second})


def test_a_call_that_was_interrupted_leaves_shards_that_the_next_one_keeps(make, monkeypatch) -> None:
    whole, original = contents(make("whole")), module.ShardStore.add
    calls = iter(range(100))

    def interrupted(store: module.ShardStore, file: TargetFile) -> None:
        if next(calls) == 2:  # the shard is there, its record is not
            raise KeyboardInterrupt
        original(store, file)

    monkeypatch.setattr(module.ShardStore, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make("targets")
    directory = make("whole").with_name("targets")
    assert not (directory / MANIFEST).exists()
    kept = {path.stem for path in directory.glob("*.json")}
    assert len(kept) == 2
    (directory / f".{MANIFEST}.0123abcd.partial").write_text("half")
    before = times(directory)
    make("targets")
    assert contents(directory) == whole
    assert all(times(directory)[f"{name}.parquet"] == before[f"{name}.parquet"] for name in kept)


def test_the_old_set_stays_whole_until_one_of_another_recipe_is_complete(make, monkeypatch) -> None:
    directory = make("targets", **TEACHER)
    old = contents(directory)

    def fail(*_: object) -> None:
        raise NexusError("enough")

    with monkeypatch.context() as patch:
        patch.setattr(module, "_check_enough_text", fail)
        with pytest.raises(NexusError, match="enough"):
            make("targets", **{"targets.top_k": 8, **TEACHER})
    assert contents(directory).items() >= old.items()
    make("targets", **{"targets.top_k": 8, **TEACHER})
    assert set(contents(directory)) & set(old) == {MANIFEST}
    assert manifest_of(directory).output.k == 8
    assert contents(directory) == contents(make("scratch", **{"targets.top_k": 8, **TEACHER}))


@pytest.mark.parametrize("content", ["{", "[]", '{"format_version": 1, "files": []}'])
def test_a_manifest_that_says_nothing_to_this_version_is_replaced_with_a_warning(make, content, caplog) -> None:
    directory = make("scratch").with_name("targets")
    directory.mkdir()
    (directory / MANIFEST).write_text(content)
    (directory / "shard-00000.parquet").write_bytes(b"of an older format")
    with caplog.at_level(logging.WARNING):
        make("targets")
    assert any("it will be replaced" in record.message for record in caplog.records)
    assert contents(directory) == contents(directory.with_name("scratch"))


@pytest.mark.parametrize(
    ("setting", "stale"),
    [
        ({"targets.value_bits": 7}, True),
        ({"targets.batch_sequences": 3}, True),
        ({"train.output_temperature": 2.0}, True),
        ({"data.sequence_length": 32}, True),
        ({"data.sources.prose.text_field": "text"}, True),
        ({"data.sources.prose.predict": "assistant"}, True),
        ({"data.sources.play.predict": "assistant"}, False),
        ({"model.attention": "document"}, True),
        ({"model.dtype": "bfloat16"}, True),
        ({"resources.cpus_per_worker": 2}, True),
        ({"targets.mode": "sampled", "run.seed": 7}, True),
        ({"run.seed": 7}, False),
        ({"resources.workers": 7}, False),
        ({"data.strict": True}, False),
        ({"targets.draws": 3}, False),
        ({"train.router_temperature": 2.0}, False),
        ({"targets.max_tokens": 100}, False),
    ],
)
def test_what_decides_the_bytes_decides_the_names_and_nothing_else_does(setting, stale, micro_config, tmp_path) -> None:
    def names(**settings: object) -> set[str]:
        config = micro_config(tmp_path / "run", **settings)
        return {item.name for item in plan_work(job_of_run(config), config.resources) if item.shard.source == "prose"}

    before = names(**({"targets.mode": "sampled"} if "targets.mode" in setting else {}))
    assert (names(**setting) & before == set()) == stale


@pytest.mark.parametrize("source", ["../../x", ".hidden", "a b/c", "Größe", "x" * 300])
def test_any_name_of_a_source_gives_a_name_of_a_file(source) -> None:
    item = ShardWork(Shard(0, source, "text.jsonl", 0, 1), "0123456789abcdef", True, False, 1.0)
    assert Path(item.name).name == item.name
    assert len(item.name) < 100
    assert not item.name.startswith(".")


def test_a_set_ends_with_the_shard_that_reaches_the_wanted_tokens(make, text) -> None:
    append(text / "prose.jsonl", "a long text")
    whole = manifest_of(make("whole", **{"data.shard_bytes": 1024})).files
    by_source = {name: [file.tokens for file in whole if file.source == name] for name in ("play", "prose")}
    wanted = sum(by_source["prose"][:5]) - 1
    limits = {"data.shard_bytes": 1024, "targets.max_tokens": wanted}
    directory = make("part", **limits)
    for name, tokens in by_source.items():
        found = [file.tokens for file in manifest_of(directory).files if file.source == name]
        assert found == tokens[: len(found)]
        assert sum(found) >= wanted > sum(found[:-1])
    written = times(directory)
    make("part", **{"data.shard_bytes": 1024, "targets.max_tokens": wanted + 1500})
    assert all(times(directory)[name] == written[name] for name in written)
    make("part", **limits)
    assert contents(directory) == contents(make("again", **limits)), "whatever was there before"


def test_text_that_runs_out_is_said_and_kept_and_can_be_extended(make, text, caplog) -> None:
    everything = sum(file.tokens for file in manifest_of(make("targets")).files if file.source == "play")
    limits = {"targets.max_tokens": everything + 1000}
    with caplog.at_level(logging.WARNING):
        directory = make("targets", **limits)
    message = next(record.message for record in caplog.records if "data.sources.play" in record.message)
    assert f"wants {everything + 1000:,} tokens, its text holds {everything:,}" in message
    assert "add text and run the same command: it continues" in message
    caplog.clear()
    for name in ("play", "prose"):
        append(text / f"{name}_more.jsonl", "what was added")
    written = times(directory)
    make("targets", **limits)
    assert not [record for record in caplog.records if "max_tokens" in record.message]
    assert all(times(directory)[name] == written[name] for name in written)
