"""Datasets of the `datasets` library give the rows that the library itself gives; what cannot be had is explained."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import fsspec
import huggingface_hub
import pytest
from datasets import Dataset, DatasetDict

from nexus_ray.config import Config, DataSection
from nexus_ray.data.documents import read_documents
from nexus_ray.data.hub_datasets import downloaded_only
from nexus_ray.data.references import Reference, is_reference
from nexus_ray.data.sources import describe_files, list_shards, text_size
from nexus_ray.errors import DataError
from nexus_ray.planning.text import measure_text

ROWS = [{"text": f"{i} " + "word " * (i * 7 % 40), "label": i} for i in range(100)]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    datasets.disable_progress_bars()


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub that does not answer: nothing listens at the port."""
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")


def section(train: Any, heldout: Any = (), shard_bytes: int = 1024) -> DataSection:
    return DataSection.model_validate(
        {"sources": {"play": {"train": train, "heldout": heldout}}, "shard_bytes": shard_bytes}
    )


def texts(train: Any, shard_bytes: int = 1024) -> list[str | None]:
    shards = list_shards(section(train, shard_bytes=shard_bytes), "train")
    return [document.text for shard in shards for document in read_documents(shard)]


def refusal(train: Any, heldout: Any = ()) -> DataError:
    with pytest.raises(DataError) as caught:
        list_shards(section(train, heldout), "train")
    return caught.value


def expected(rows: list[dict[str, Any]]) -> list[str]:
    return [row["text"] for row in rows]


def save(directory: Path, rows: list[dict[str, Any]] = ROWS) -> str:
    Dataset.from_list(rows).save_to_disk(directory)
    return str(directory)


def save_splits(directory: Path) -> str:
    DatasetDict(train=Dataset.from_list(ROWS[:80]), test=Dataset.from_list(ROWS[80:])).save_to_disk(directory)
    return str(directory)


def repository(directory: Path, **splits: list[dict[str, Any]]) -> str:
    """A directory of data files, as a dataset's repository on the hub has them."""
    directory.mkdir()
    for split, rows in splits.items():
        (directory / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(directory)


class TestSavedDatasets:
    @pytest.mark.parametrize("shard_bytes", [1024, 1500, 4096, 10**6])
    def test_the_shards_together_hold_each_row_once_in_order(self, tmp_path, shard_bytes):
        path = save(tmp_path / "corpus")
        assert texts(path, shard_bytes) == expected(ROWS)
        [first, *_] = list_shards(section(path, shard_bytes=shard_bytes), "train")
        row_bytes = Dataset.load_from_disk(path).data.nbytes / len(ROWS)
        assert first.stop == min(len(ROWS), shard_bytes // row_bytes)

    def test_a_row_larger_than_a_shard(self, tmp_path):
        path = save(tmp_path / "corpus", [{"text": "x" * 5000}, {"text": "y" * 5000}])
        assert [shard.stop - shard.start for shard in list_shards(section(path), "train")] == [1, 1]

    def test_a_split_is_chosen(self, tmp_path):
        path = save_splits(tmp_path / "corpus")
        assert texts(f"{path}?split=test") == expected(ROWS[80:])

    def test_several_splits_and_none_chosen(self, tmp_path):
        error = refusal(save_splits(tmp_path / "corpus"))
        assert "has the splits train, test" in error.message
        assert f"{tmp_path}/corpus?split=train" in (error.hint or "")

    @pytest.mark.parametrize(
        "spec", ["train[:10%]", "train[-5:]", "train[10:20]+test[:3]", "test[50%:]", "train[10%:20%]", "train+test"]
    )
    def test_a_slice_is_what_the_library_makes_of_it(self, tmp_path, spec):
        path = save_splits(tmp_path / "corpus")
        files = repository(tmp_path / "files", train=ROWS[:80], test=ROWS[80:])
        reference = datasets.load_dataset(files, split=spec)
        assert texts(f"{path}?split={spec}") == list(reference["text"])
        assert texts(f"datasets://{files}?split={spec}") == list(reference["text"])

    def test_a_shuffled_and_filtered_dataset(self, tmp_path):
        dataset = Dataset.from_list(ROWS).shuffle(seed=1).select(range(30))
        dataset.save_to_disk(tmp_path / "corpus")
        assert texts(str(tmp_path / "corpus")) == list(dataset["text"])

    def test_conversations_of_different_fields(self, tmp_path):
        call = {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": '{"a": 1}'}}]}
        rows = [{"messages": [{"role": "user", "content": "x"}]}, {"messages": [call]}]
        Dataset.from_list(rows).save_to_disk(tmp_path / "corpus")
        [shard] = list_shards(section(str(tmp_path / "corpus")), "train")
        first, second = read_documents(shard)
        assert first.messages == ({"role": "user", "content": "x"},)
        assert [set(message) for message in second.messages or ()] == [{"role", "tool_calls"}]
        assert second.messages[0]["tool_calls"][0]["function"]["arguments"] == {"a": 1}

    def test_a_dataset_that_was_saved_with_another_format(self, tmp_path):
        Dataset.from_list(ROWS).with_format("arrow").save_to_disk(tmp_path / "corpus")
        assert texts(str(tmp_path / "corpus")) == expected(ROWS)

    def test_pictures_beside_the_text_are_not_opened(self, tmp_path):
        features = datasets.Features(text=datasets.Value("string"), picture=datasets.Image())
        rows = [{"text": "x", "picture": {"bytes": b"no picture", "path": None}}]
        Dataset.from_list(rows, features=features).save_to_disk(tmp_path / "corpus")
        assert texts(str(tmp_path / "corpus")) == ["x"]

    def test_globs_of_directories(self, tmp_path):
        for name in ("b", "a"):
            save_splits(tmp_path / name)
        assert texts(f"{tmp_path}/*?split=test") == expected(ROWS[80:]) * 2
        for name in ("d", "c"):
            save(tmp_path / "alone" / name, [{"text": name}])
        assert texts(f"{tmp_path}/alone/*") == ["c", "d"]

    def test_another_file_system(self, tmp_path):
        save(tmp_path / "corpus")
        fsspec.filesystem("memory").put(str(tmp_path / "corpus"), "/nexus-ray-datasets/corpus", recursive=True)
        assert texts("memory://nexus-ray-datasets/corpus") == expected(ROWS)

    def test_a_directory_that_holds_no_dataset(self, tmp_path):
        (tmp_path / "corpus").mkdir()
        assert "unknown kind" in refusal(str(tmp_path / "corpus")).message
        assert "cannot be read" in refusal(f"{tmp_path}/corpus?split=train").message

    def test_a_damaged_dataset(self, tmp_path):
        path = save(tmp_path / "corpus")
        for file in Path(path).glob("*.arrow"):
            file.write_bytes(b"no table")
        assert f"{path}?split= cannot be read" in refusal(path).message

    def test_no_such_split(self, tmp_path):
        error = refusal(save_splits(tmp_path / "corpus") + "?split=dev")
        assert 'Unknown split "dev"' in error.message
        assert "train" in error.message

    def test_no_rows(self, tmp_path):
        assert "has no rows" in refusal(save_splits(tmp_path / "corpus") + "?split=train[:0]").message


class TestNamedDatasets:
    def test_a_downloaded_repository(self, tmp_path):
        files = repository(tmp_path / "files", train=ROWS[:80], test=ROWS[80:])
        assert texts(f"datasets://{files}?split=test") == expected(ROWS[80:])

    def test_the_only_split_need_not_be_named(self, tmp_path):
        files = repository(tmp_path / "files", train=ROWS)
        assert texts(f"datasets://{files}") == expected(ROWS)
        [*_, shard] = list_shards(section(f"datasets://{files}"), "train")
        assert shard.path == f"datasets://{files}?split=train", "a worker need not ask which splits there are"

    def test_several_splits_and_none_chosen(self, tmp_path):
        files = repository(tmp_path / "files", train=ROWS[:80], test=ROWS[80:])
        assert "has the splits test, train" in refusal(f"datasets://{files}").message.replace(
            "train, test", "test, train"
        )

    @pytest.mark.parametrize(
        ("query", "message"),
        [("split=dev", 'Unknown split "dev"'), ("config=prose&split=train", "prose"), ("split=train[", "train[")],
    )
    def test_what_the_dataset_does_not_have(self, tmp_path, query, message):
        error = refusal(f"datasets://{repository(tmp_path / 'files', train=ROWS)}?{query}")
        assert "cannot be had" in error.message
        assert message in error.message
        assert "save_to_disk" in (error.hint or "")

    def test_a_script_is_not_run(self, tmp_path):
        (tmp_path / "corpus").mkdir()
        (tmp_path / "corpus" / "corpus.py").write_text("raise SystemExit('run')\n")
        assert "scripts are no longer supported" in refusal(f"datasets://{tmp_path}/corpus?split=train").message

    @pytest.mark.usefixtures("no_hub")
    def test_without_a_network_it_fails_at_once_and_says_what_to_do(self):
        started = time.monotonic()
        error = refusal("datasets://nobody/nothing-of-this-name?split=train")
        assert time.monotonic() - started < 20, "the library alone tries for longer"
        assert "datasets://nobody/nothing-of-this-name?split=train cannot be had" in error.message
        assert "without an answer from the hub" in error.message
        for part in ("load_dataset('nobody/nothing-of-this-name', ...).save_to_disk(DIRECTORY)", ".parquet"):
            assert part in (error.hint or "")

    @pytest.mark.usefixtures("no_hub")
    def test_without_a_network_a_downloaded_copy_serves(self, tmp_path):
        cache = Path(datasets.config.HF_DATASETS_CACHE)
        datasets.load_dataset(repository(tmp_path / "corpus", train=ROWS))
        shutil.move(cache / "corpus", cache / "someone___corpus")  # where the library keeps someone/corpus
        assert texts("datasets://someone/corpus?split=train[:7]") == expected(ROWS[:7])

    def test_the_library_is_told_to_work_offline(self):
        script = (
            "from nexus_ray.data.hub_datasets import open_dataset\n"
            "from nexus_ray.errors import DataError\n"
            "try:\n    open_dataset('datasets://nobody/nothing?split=train')\n"
            "except DataError as error:\n    print(error)\n"
        )
        environment = os.environ | {"HF_DATASETS_OFFLINE": "1"}
        done = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60, check=True
        )
        assert "datasets://nobody/nothing?split=train cannot be had" in done.stdout
        assert "save_to_disk" in done.stdout

    def test_the_switch_to_downloaded_datasets_is_taken_back(self):
        before = datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE

        def fail() -> None:
            with downloaded_only():
                assert huggingface_hub.is_offline_mode()
                raise KeyError

        with pytest.raises(KeyError):
            fail()
        assert before == (datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE)


class TestHeldOut:
    @pytest.mark.parametrize(
        ("train", "heldout", "shared"),
        [
            ("train", "train", True),
            ("train", "test", False),
            ("train[:90%]", "train[90%:]", False),
            ("train[:90%]", "train[80%:]", True),
            ("train+test[:5]", "test[5:]", False),
            ("train+test[:5]", "test[4:]", True),
        ],
    )
    @pytest.mark.parametrize("kind", ["saved", "named"])
    def test_rows_that_are_trained_on_must_not_be_held_out(self, tmp_path, kind, train, heldout, shared):
        if kind == "saved":
            place = save_splits(tmp_path / "corpus")
        else:
            place = "datasets://" + repository(tmp_path / "corpus", train=ROWS[:80], test=ROWS[80:])
        arguments = f"{place}?split={train}", f"{place}?split={heldout}"
        if shared:
            assert "is also trained on" in refusal(*arguments).message
        else:
            assert list_shards(section(*arguments), "heldout")

    def test_a_whole_dataset_shares_rows_with_its_slice(self, tmp_path):
        path = save(tmp_path / "corpus")
        assert "is also trained on" in refusal(path, f"{path}?split=train[:5]").message


class TestIdentity:
    def identity(self, train: str) -> list[list[str | int]]:
        return describe_files(section(train), "train")

    def test_equal_data_in_another_place_is_the_same(self, tmp_path):
        one, two = save(tmp_path / "one" / "corpus"), save(tmp_path / "two" / "corpus")
        assert self.identity(one) == self.identity(two)

    def test_other_data_another_split_and_another_slice_differ(self, tmp_path):
        one = save(tmp_path / "one" / "corpus")
        two = save(tmp_path / "two" / "corpus", [*ROWS[:-1], {"text": "changed", "label": 99}])
        both = tmp_path / "both" / "corpus"
        DatasetDict(train=Dataset.from_list(ROWS), test=Dataset.from_list(ROWS)).save_to_disk(both)
        places = [one, two, f"{both}?split=test", f"{one}?split=train[:50%]", f"{one}?split=train[50%:]"]
        assert len({str(self.identity(place)) for place in places}) == len(places)

    def test_a_changed_repository_differs(self, tmp_path):
        one = repository(tmp_path / "one", train=ROWS)
        before = self.identity(f"datasets://{one}?split=train")
        two = repository(tmp_path / "two", train=ROWS[1:])
        assert self.identity(f"datasets://{two}?split=train")[0][-1] != before[0][-1]

    def test_the_text_field_is_part_of_what_is_read(self, tmp_path):
        data = {"train": save(tmp_path / "corpus"), "text_field": "body"}
        other = DataSection.model_validate({"sources": {"play": data}})
        assert describe_files(other, "train") != self.identity(data["train"])


class TestPlanning:
    def test_tokens_are_close_to_those_of_the_same_text_in_a_file(
        self, micro_config: Callable[..., Config], micro_texts: Path, tmp_path: Path
    ):
        rows = [json.loads(line) for line in (micro_texts / "play.train.jsonl").read_text().splitlines()]
        saved = save(tmp_path / "corpus", [row | {"note": "x" * len(row["text"])} for row in rows])
        plain = measure_text(micro_config(tmp_path))["play"]
        found = measure_text(micro_config(tmp_path, **{"data.sources.play.train": saved}))["play"]
        assert found.size == text_size(f"{saved}?split=train") > 1.5 * plain.size
        assert found.tokens == pytest.approx(plain.tokens, rel=0.05)

    def test_nothing_is_downloaded(self, micro_config: Callable[..., Config], tmp_path: Path, caplog, monkeypatch):
        def unexpected(*_: object, **__: object) -> None:
            raise AssertionError("the hub was asked")

        monkeypatch.setattr(huggingface_hub, "get_session", unexpected)
        config = micro_config(tmp_path, **{"data.sources.play.train": "datasets://nobody/nothing?split=train"})
        assert list(measure_text(config)) == ["prose"]
        assert "datasets://nobody/nothing?split=train cannot be had" in caplog.text


class TestReferences:
    @pytest.mark.parametrize(
        "text",
        [
            "datasets://name",
            "datasets://owner/name?config=a-b&split=train[:10%]&revision=0123",
            "/data/part?/corpus?split=train[10%:20%]+test[-3:]",
            "s3://bucket/corpus?split=",
        ],
    )
    def test_a_reference_is_written_as_it_was_read(self, text):
        assert is_reference(text)
        assert str(Reference.parse(text)) == text

    def test_its_parts(self):
        reference = Reference.parse("datasets://owner/name?split=train[:10%]+test&config=c")
        assert reference == Reference("owner/name", saved=False, config="c", split="train[:10%]+test")

    @pytest.mark.parametrize("path", ["/data/part-?.jsonl", "a.txt", "s3://bucket/?.parquet", "dir"])
    def test_a_pattern_of_files_is_none(self, path):
        assert not is_reference(path)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("datasets://name?split=train&token=x", "there is no token="),
            ("/corpus?split=train&config=x", "there is no config="),
            ("datasets://?split=train", "the name is missing"),
        ],
    )
    def test_what_is_no_reference(self, text, message):
        assert message in refusal(text).message
