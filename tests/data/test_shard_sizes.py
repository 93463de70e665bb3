"""Sizes of shards without reading them: in proportion to their text, and fewer tokens than there are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from nexus_ray.config import DataSection
from nexus_ray.data.packing import pack_shard
from nexus_ray.data.shard_sizes import estimate_tokens
from nexus_ray.data.sources import list_shards

SHAKESPEARE = Path(__file__).parents[2] / "assets/text/shakespeare.train.jsonl"


def data_of(path: Path, shard_bytes: int) -> DataSection:
    return DataSection.model_validate({"sources": {"play": {"train": str(path)}}, "shard_bytes": shard_bytes})


def test_bytes_of_lines_are_divided_as_the_shards_are(tmp_path: Path) -> None:
    path = tmp_path / "play.jsonl"
    path.write_text('{"text": "' + "x" * 9987 + '"}\n')
    shards = list_shards(data_of(path, 4000), "train")
    np.testing.assert_array_equal(estimate_tokens(shards), [500, 500, 250])


@pytest.mark.parametrize("container", ["parquet", "dataset"])
def test_rows_and_row_groups_share_the_bytes_of_their_table(container: str, tmp_path: Path) -> None:
    path = tmp_path / f"play.{container}"
    rows = [{"text": f"{number} " + "speak the speech " * 50} for number in range(40)]
    if container == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=10)
        size = path.stat().st_size
    else:
        Dataset.from_list(rows).save_to_disk(path)
        size = sum(len(row["text"]) for row in rows)
    shards = list_shards(data_of(path, 9000), "train")
    assert len(shards) > 2
    estimates = estimate_tokens(shards)
    rows_of = np.asarray([shard.stop - shard.start for shard in shards])
    np.testing.assert_allclose(estimates / estimates.sum(), rows_of / rows_of.sum())
    assert estimates.sum() == pytest.approx(size / 8, rel=0.1)


def test_real_text_has_more_tokens_than_are_estimated(tokenizer_directory: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_directory)
    shards = list_shards(data_of(SHAKESPEARE, 1 << 16), "train")
    for shard, estimate in list(zip(shards, estimate_tokens(shards), strict=True))[:3]:
        tokens = sum(sequence.num_tokens for sequence in pack_shard(shard, tokenizer, 512))
        assert estimate < tokens < 4 * estimate
