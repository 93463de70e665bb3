"""Describing a target set for people."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table

from nexus_ray.targets.reader import TargetSet


def describe(directory: Path, *, verify: bool = False) -> Table:
    """A table of what a target set holds, by source.

    Args:
        directory: the target set.
        verify: compare every file with its checksum first.

    Raises:
        ArtefactError: it is missing, incomplete or damaged.
    """
    targets = TargetSet.open(directory)
    if verify:
        targets.verify()
    manifest = targets.manifest
    teacher = f"top {manifest.top_k} log-probabilities" if manifest.top_k else "none"
    base = (manifest.base_fingerprint or "none")[:12]
    table = Table(
        title=f"{directory}: sequences of {manifest.sequence_length} tokens, teacher {teacher}, base {base}",
        title_justify="left",
    )
    for heading in ("source", "files", "sequences", "tokens", "MB", "bytes/token", "teacher"):
        table.add_column(heading, justify="left" if heading in ("source", "teacher") else "right")
    for source in dict.fromkeys(file.source for file in manifest.files):
        files = [file for file in manifest.files if file.source == source]
        tokens, size = sum(file.tokens for file in files), sum(file.bytes for file in files)
        table.add_row(
            source,
            f"{len(files)}",
            f"{sum(file.sequences for file in files):,}",
            f"{tokens:,}",
            f"{size / 1e6:.1f}",
            f"{size / tokens:.0f}",
            "yes" if source in manifest.teacher_sources else "-",
        )
    return table
