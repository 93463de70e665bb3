"""What `nexus-ray targets inspect` prints: tables of a target set and lines of a decoded sequence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table

from nexus_ray.targets.inspection.example import Example, Outcome, Place, choose_sequence, decode_example
from nexus_ray.targets.inspection.inspect import PARQUET, ColumnSize, SourceTotals, by_column, by_source, facts
from nexus_ray.targets.reading.reader import TargetSet

_WORDS = ("source", "column", "teacher")
# What a source holds, by whether it holds output and router targets.
_TEACHER = {(True, True): "both", (True, False): "output", (False, True): "router", (False, False): "-"}


def inspect(
    location: str, *, verify: bool = True, sequence: int | None = None, tokenizer: Path | None = None
) -> Iterator[str | Table]:
    """Everything there is to say about a target set, in pieces, each when it is known.

    Args:
        location: directory or URI.
        verify: compare every byte with its checksums.
        sequence: number of the sequence to decode; default: the first that holds targets.
        tokenizer: directory of the set's tokenizer; default: where it was when the set was made.

    Raises:
        ArtefactError: the set is missing, incomplete or damaged.
        ConfigError: there is no such sequence.
        StorageError: the file system refused.
    """
    targets = TargetSet.open(location)
    totals = by_source(targets.manifest)
    yield from facts_lines(str(targets.place), facts(targets.manifest))
    yield source_table(totals)
    yield from unreadable_lines(totals)
    if verify:
        targets.verify()
    yield checksum_line(totals, verified=verify)
    yield column_table(by_column(targets))
    if any(row.sequences for row in totals):
        number = choose_sequence(targets) if sequence is None else sequence
        yield from example_lines(decode_example(targets, number, tokenizer))


def checksum_line(totals: Sequence[SourceTotals], *, verified: bool) -> str:
    """What is known about the checksums."""
    count, size = sum(row.shards for row in totals), sum(row.bytes for row in totals)
    result = "every checksum fits" if verified else "checksums were not compared (--no-verify)"
    return f"{count:,} shards, {size:,} bytes: {result}"


def facts_lines(place: str, facts: Mapping[str, str]) -> list[str]:
    """Where the set is and its facts, one a line."""
    width = max(map(len, facts))
    return [place, *(f"  {name:<{width}}  {value}" for name, value in facts.items())]


def source_table(totals: Sequence[SourceTotals]) -> Table:
    """A row a source."""
    table = _table("source", "shards", "sequences", "tokens", "targets", "size", "B/token", "teacher")
    for row in totals:
        table.add_row(
            row.source,
            f"{row.shards:,}",
            f"{row.sequences:,}",
            f"{row.tokens:,}",
            f"{row.targets:,}",
            _size(row.bytes),
            _per_token(row.bytes, row.tokens),
            _TEACHER[row.output, row.router],
        )
    return table


def unreadable_lines(totals: Sequence[SourceTotals]) -> list[str]:
    """Rows of each source that could not be read, and the first of them."""
    return [
        f"{row.source}: {row.unreadable:,} rows could not be read, first {row.unreadable_example}"
        for row in totals
        if row.unreadable
    ]


def column_table(sizes: Sequence[ColumnSize]) -> Table:
    """A row a column; bytes a token are of the shards that have it."""
    table = _table("column", "size", "B/token", "share")
    total = sum(size.bytes for size in sizes)
    for size in sizes:
        name = "(Parquet's own)" if size.name == PARQUET else size.name
        share = f"{size.bytes / max(1, total):.1%}"
        table.add_row(name, _size(size.bytes), _per_token(size.bytes, size.tokens), share)
    return table


def example_lines(example: Example) -> Iterator[str]:
    """The sequence, line by line."""
    counts = f"{example.tokens:,} tokens, {example.targets:,} targets"
    yield f"sequence {example.number:,} of {example.source}: {counts}"
    yield from (f"  ({note})" for note in example.notes)
    yield f"  begins: {example.beginning}"
    for place in example.places:
        yield from _place_lines(place)


def _place_lines(place: Place) -> Iterator[str]:
    yield f"  token {place.position:,}: ...{place.before} -> {place.token}"
    if place.likely:
        yield f"    teacher: {', '.join(map(_with_amount, place.likely))}{_beside(place)}"
    for routing in place.routing:
        experts = f"experts {', '.join(map(_with_amount, routing.experts))}; all others {routing.rest:.1%}"
        yield f"    router of layer {routing.layer} at {routing.position:,}: {experts}"


def _beside(place: Place) -> str:
    """What the teacher said besides the likely tokens."""
    amounts = {"all others": place.rest, "the next token": place.chance}
    known = [f"; {name} {amount:.1%}" for name, amount in amounts.items() if amount is not None]
    return "".join(known) + ("" if place.entropy is None else f"; entropy {place.entropy:.2f} nats")


def _with_amount(outcome: Outcome) -> str:
    amount = f"x {outcome.draws}" if outcome.draws is not None else f"({outcome.probability:.1%})"
    return f"{outcome.name} {amount}"


def _per_token(size: int, tokens: int) -> str:
    return f"{size / max(1, tokens):,.1f}"


def _size(size: int) -> str:
    """Bytes with a decimal unit."""
    exponent = min(4, max(1, (len(str(size)) - 1) // 3))
    return f"{size / 1000**exponent:,.1f} {'_kMGT'[exponent]}B"


def _table(*headings: str) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in headings:
        words = heading in _WORDS
        table.add_column(heading, justify="left" if words else "right", no_wrap=not words, overflow="fold")
    return table
