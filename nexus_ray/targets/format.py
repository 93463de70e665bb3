"""The form of a target set: Parquet shards of packed sequences and a manifest that describes them.

`docs/targets-format.md` is the specification. A set is content-addressed: a shard's name is the digest of everything
that decides its bytes, and only shards that the manifest lists belong to the set. The manifest is replaced last and at
once, so a set can be read while shards are added beside it.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nexus_ray.errors import ArtefactError
from nexus_ray.targets.encoding.encodings import OutputEncoding
from nexus_ray.targets.encoding.routers import RouterEncoding

FORMAT_VERSION: Literal[2] = 2
MANIFEST = "manifest.json"
REMAKE = "run `nexus-ray precompute CONFIG`"
METADATA_KEY = b"nexus_ray.targets"
# Bytes of targets in a row group, the least that random access reads; at most one sequence where one is longer.
ROW_GROUP_BYTES = 1 << 18

_TOKENS = (
    ("sequence_id", pa.string()),
    ("num_tokens", pa.int32()),
    ("num_targets", pa.int32()),
    ("input_ids", pa.list_(pa.int32())),
    ("loss_mask", pa.list_(pa.bool_())),
)


_Count = Annotated[int, Field(ge=0)]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Header(_Record):
    """What a reader must know to decode a shard; every shard carries it.

    Attributes:
        format_version: of this module.
        base_fingerprint: identity of the teacher; None where only text was packed.
        compute: what `Config.compute` says of the teacher: device, type and so on; None without one.
        tokenizer_sha256: identity of the tokenizer with its chat template.
        vocabulary: outcomes of a next-token distribution.
        sequence_length: tokens of a full sequence.
        separator: token id before, between and after documents.
        output: how next-token distributions are encoded; None without them.
        router: how routers are encoded; None without them.
    """

    format_version: Literal[2] = FORMAT_VERSION
    base_fingerprint: str | None
    compute: dict[str, str] | None
    tokenizer_sha256: str
    vocabulary: int
    sequence_length: int
    separator: int
    output: OutputEncoding | None
    router: RouterEncoding | None


class TargetFile(_Record):
    """One shard of a target set.

    Attributes:
        name: of the file.
        source: of its text, as `data.sources` calls it.
        text: where the text was, for people.
        sequences: rows.
        tokens: of all sequences.
        targets: tokens in loss masks.
        output: whether it holds output targets.
        router: whether it holds router targets.
        bytes: of the file.
        sha256: of the file.
        blocks: CRC-32 of each block of the file, eight hexadecimal digits each (`checksums.py`).
        unreadable: rows of the text that could not be read.
        unreadable_example: the first of them, and why.
    """

    name: str
    source: str
    text: str
    sequences: _Count
    tokens: _Count
    targets: _Count
    output: bool
    router: bool
    bytes: _Count
    sha256: str
    blocks: str
    unreadable: _Count = 0
    unreadable_example: str = ""


class Manifest(Header):
    """What a target set holds and what it was made from.

    Attributes:
        tokenizer: directory of the tokenizer (and the model) when the set was made, for people and `inspect`.
        files: its shards, in the order of the text.
    """

    tokenizer: str
    files: tuple[TargetFile, ...]

    @property
    def header(self) -> Header:
        """The part that every shard carries."""
        return Header(**{name: getattr(self, name) for name in Header.model_fields})

    @classmethod
    def parse(cls, values: Any, place: str) -> Manifest:
        """The manifest in the JSON value of `place`.

        Raises:
            ArtefactError: it is no manifest, or one of another format version.
        """
        found = values.get("format_version") if isinstance(values, dict) else None
        if isinstance(values, dict) and found != FORMAT_VERSION:
            raise ArtefactError(f"{place} is of target format {found}, not {FORMAT_VERSION}", REMAKE)
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise ArtefactError(f"{place} is not a target manifest: {error}", REMAKE) from error


def shard_schema(header: Header, source: str, *, output: bool, router: bool) -> pa.Schema:
    """Columns of a shard, with the header in the metadata.

    Args:
        header: of the set.
        source: of the shard's text.
        output: whether it holds output targets.
        router: whether it holds router targets.
    """
    names = [*(header.output.widths() if output and header.output else ())]
    names += [*(header.router.widths() if router and header.router else ())]
    described = {"header": header.model_dump(mode="json"), "source": source, "output": output, "router": router}
    metadata = {METADATA_KEY: json.dumps(described, sort_keys=True).encode()}
    return pa.schema([*_TOKENS, *((name, pa.binary()) for name in names)], metadata=metadata)
