"""The form of a target set: Parquet files of packed sequences and a manifest that describes them.

One row is one packed sequence. Teacher columns are empty lists for sources whose losses need no teacher.

| column | type | meaning |
|---|---|---|
| source | string | name in `data.sources` |
| input_ids | list<int32> [length] | tokens, padded at the end |
| num_tokens | int32 | tokens before the padding |
| top_ids | list<int32> [length * K] | tokens the teacher finds most likely next, best first |
| top_log_probs | list<float16> [length * K] | their natural-log probabilities |
| tail_log_prob | list<float32> [length] | log of the probability of all other tokens together |
| router_logits | list<float16> [length * layers * experts] | the teacher's router logits |

Position t of a teacher column is the distribution of token t + 1 given tokens 0..t.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, ValidationError

from nexus_ray.errors import ArtefactError
from nexus_ray.storage import atomic_file, read_json, write_json

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
REMAKE = "run `nexus-ray precompute CONFIG`"

SCHEMA = pa.schema(
    [
        ("source", pa.string()),
        ("input_ids", pa.list_(pa.int32())),
        ("num_tokens", pa.int32()),
        ("top_ids", pa.list_(pa.int32())),
        ("top_log_probs", pa.list_(pa.float16())),
        ("tail_log_prob", pa.list_(pa.float32())),
        ("router_logits", pa.list_(pa.float16())),
    ]
)


class TargetFile(BaseModel):
    """One Parquet file of a target set."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    source: str
    sequences: int
    tokens: int
    bytes: int
    sha256: str


class Manifest(BaseModel):
    """What a target set holds and what it was made from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: int = FORMAT_VERSION
    base_fingerprint: str | None
    tokenizer_sha256: str
    vocabulary: int
    sequence_length: int
    top_k: int
    teacher_sources: tuple[str, ...]
    files: tuple[TargetFile, ...]

    def save(self, directory: Path) -> None:
        """Write `manifest.json`; its presence says that the set is complete."""
        write_json(directory / MANIFEST, self.model_dump(mode="json"))

    @classmethod
    def load(cls, directory: Path) -> Manifest:
        """Read the manifest of a target set.

        Raises:
            ArtefactError: there is none, it is damaged, or of another format version.
        """
        values = read_json(directory / MANIFEST, what="target manifest", hint=REMAKE)
        try:
            manifest = cls.model_validate(values)
        except ValidationError as error:
            raise ArtefactError(f"{directory / MANIFEST} is not a target manifest: {error}", REMAKE) from error
        if manifest.format_version != FORMAT_VERSION:
            raise ArtefactError(
                f"{directory} has target format {manifest.format_version}, not {FORMAT_VERSION}", REMAKE
            )
        return manifest


def write_rows(path: Path, columns: dict[str, list[Any]]) -> None:
    """Write one Parquet file atomically, zstd-compressed."""
    table = pa.table(columns, schema=SCHEMA)
    with atomic_file(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def read_table(path: Path) -> pa.Table:
    """Read one Parquet file of a target set.

    Raises:
        ArtefactError: it is missing, damaged or has other columns.
    """
    try:
        with pq.ParquetFile(path) as file:
            missing = [name for name in SCHEMA.names if name not in file.schema_arrow.names]
            if missing:
                raise ArtefactError(f"{path} has no column {missing[0]}", "delete it and " + REMAKE)
            return file.read(columns=SCHEMA.names).cast(SCHEMA)
    except FileNotFoundError as error:
        raise ArtefactError(f"{path} is missing from the target set", REMAKE) from error
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ArtefactError(f"{path} is damaged: {error}", "delete it and " + REMAKE) from error
