"""Datasets of the `datasets` library as text sources: directories that `save_to_disk` wrote, and names on the hub.

Paths here are references (`references.py`). Rows are read in ranges of the Arrow table that the library maps into
memory, so a shard costs what it holds. Code that a dataset brings along is never run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import PurePosixPath
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from nexus_ray.data.references import Reference
from nexus_ray.errors import DataError

_SPLIT_NAME = re.compile(r"\w+")
_MARKERS = ("state.json", "dataset_dict.json")  # what save_to_disk leaves of a Dataset, and of a DatasetDict
_NOT_TEXT = ("Audio", "Image", "Video", "Pdf", "Nifti", "Mesh")
_REACHABLE_SECONDS = 5.0


def is_saved(directory: str) -> bool:
    """Whether a path or URI is a directory that `save_to_disk` wrote."""
    filesystem, plain = fsspec.core.url_to_fs(directory)
    return any(filesystem.isfile(f"{plain}/{marker}") for marker in _MARKERS)


def resolve(path: str) -> str:
    """A reference with its split named, when the dataset has only one and none was given.

    Raises:
        DataError: the dataset cannot be had, or has several splits.
    """
    return str(_resolved(Reference.parse(path)))


def row_ranges(path: str, shard_bytes: int) -> list[tuple[int, int]]:
    """Row ranges of about `shard_bytes` of Arrow data each; they depend on the table only.

    Raises:
        DataError: the dataset cannot be had or has no rows.
    """
    dataset = _text_only(open_dataset(path))
    rows = len(dataset)
    if not rows:
        raise DataError(f"{path} has no rows", "choose another split")
    each = max(1, shard_bytes * rows // max(1, _arrow_bytes(dataset)))
    return [(start, min(start + each, rows)) for start in range(0, rows, each)]


def read_rows(path: str, start: int, stop: int) -> Iterator[tuple[int, Callable[[], dict[str, Any]]]]:
    """(number, what decodes it to a dictionary) of each row in a range."""
    dataset = _text_only(open_dataset(path))
    for row in range(start, stop):
        yield row, partial(dataset.__getitem__, row)


def identity(path: str) -> list[str | int]:
    """[name and split, rows, fingerprint] of a dataset: equal when its data is the same."""
    dataset, reference = open_dataset(path), Reference.parse(path)
    name = PurePosixPath(reference.place).name if reference.saved else reference.place
    return [f"{name}?split={reference.split}", len(dataset), str(dataset._fingerprint)]


def size(path: str, rows: range | None = None) -> int:
    """Bytes that rows of a dataset, all of them by default, take in memory."""
    dataset = _text_only(open_dataset(path))
    return _arrow_bytes(dataset if rows is None else dataset.select(rows))


def overlap(first: str, second: str) -> bool:
    """Whether two references share a row: the same dataset, and splits or slices that meet."""
    one, other = Reference.parse(first), Reference.parse(second)
    if (one.place, one.saved, one.config) != (other.place, other.saved, other.config):
        return False
    mine, theirs = (_parts(resolved, _lengths(resolved)) for resolved in map(_resolved, (one, other)))
    return any(
        name == other_name and start < other_stop and other_start < stop
        for name, start, stop in mine
        for other_name, other_start, other_stop in theirs
    )


def open_dataset(path: str) -> Any:
    """The `datasets.Dataset` of a reference. Nothing is read of a local one but its headers.

    Raises:
        DataError: it cannot be had: unknown, not allowed, no network, no such split.
    """
    reference = Reference.parse(path)
    is_local = reference.saved and isinstance(fsspec.core.url_to_fs(reference.place)[0], LocalFileSystem)
    return _open(reference) if is_local else _open_once(reference)


@contextmanager
def downloaded_only() -> Iterator[None]:
    """While it lasts, only datasets that were downloaded before can be had, and the hub is not asked."""
    from datasets import config
    from huggingface_hub import constants

    before = config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before


def _open(reference: Reference) -> Any:
    from datasets import concatenate_datasets, load_dataset

    if not reference.saved:
        return _ask(load_dataset, reference, name=reference.config, split=reference.split)
    splits = _saved_splits(reference)
    named = replace(reference, split=reference.split or _only(list(splits), reference))
    chosen = []
    for name, start, stop in _parts(named, {name: len(split) for name, split in splits.items()}):
        whole = (start, stop) == (0, len(splits[name]))
        chosen.append(splits[name] if whole else splits[name].select(range(start, stop)))
    return chosen[0] if len(chosen) == 1 else concatenate_datasets(chosen)


# A store or the hub is asked once a process, not once a shard.
_open_once = lru_cache(maxsize=8)(_open)


def _ask(function: Callable[..., Any], reference: Reference, **options: str) -> Any:
    """Call a function of the library about a named dataset, without waiting long for a network that is not there."""
    given = {key: value for key, value in (options | {"revision": reference.revision}).items() if value}
    answers = _hub_answers()
    try:
        with nullcontext() if answers else downloaded_only():
            return function(reference.place, **given)
    except Exception as error:  # the library lets through what the hub, the network and parsers of files raise
        raise _unavailable(reference, error, "" if answers else "without an answer from the hub, ") from error


def _hub_answers() -> bool:
    from datasets import config
    from huggingface_hub import constants, get_session

    if config.HF_HUB_OFFLINE or constants.is_offline_mode():
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=_REACHABLE_SECONDS)
    except Exception:  # of whatever client the library uses
        return False
    return True


def _unavailable(reference: Reference, error: Exception, circumstance: str = "") -> DataError:
    reason = circumstance + (" ".join(str(error).split()) or type(error).__name__)
    if reference.saved:
        return DataError(f"{reference} cannot be read: {reason}", "save it again with save_to_disk")
    return DataError(
        f"{reference} cannot be had: {reason}",
        f"check name, config and split. Without a network or access: where there is one, run "
        f"datasets.load_dataset({reference.place!r}, ...).save_to_disk(DIRECTORY), bring the directory here and "
        "give its path in place of the name; or give the dataset's .parquet files",
    )


def _saved_splits(reference: Reference) -> dict[str, Any]:
    """The splits of a saved dataset by name; a Dataset saved alone is one split."""
    import datasets

    try:
        loaded = datasets.load_from_disk(reference.place)
    except Exception as error:  # as in `_ask`
        raise _unavailable(reference, error) from error
    if isinstance(loaded, datasets.DatasetDict):
        return dict(loaded)
    name = str(loaded.split or "train")
    return {name if _SPLIT_NAME.fullmatch(name) else "train": loaded}


def _resolved(reference: Reference) -> Reference:
    return reference if reference.split else replace(reference, split=_only(_split_names(reference), reference))


def _split_names(reference: Reference) -> list[str]:
    if reference.saved:
        return list(_saved_splits(reference))
    from datasets import get_dataset_split_names

    return list(_ask(get_dataset_split_names, reference, config_name=reference.config))


def _only(names: list[str], reference: Reference) -> str:
    if len(names) != 1:
        example = replace(reference, split=names[0] if names else "train")
        raise DataError(f"{reference} has the splits {', '.join(names)}", f"choose one, for example {example}")
    return names[0]


def _parts(reference: Reference, lengths: dict[str, int]) -> list[tuple[str, int, int]]:
    """(split, first row, row past the last) of what a reference takes from whole splits of `lengths` rows."""
    from datasets import ReadInstruction

    try:
        instructions = ReadInstruction.from_spec(reference.split).to_absolute(lengths)
    except (ValueError, AssertionError) as error:
        hint = "name a split of the dataset, or a slice such as train[:10%]"
        raise DataError(f"{reference}: {error}", hint) from error
    return [(part.splitname, int(part.from_), int(part.to)) for part in instructions]


def _lengths(reference: Reference) -> dict[str, int]:
    """Rows of each whole split."""
    if reference.saved:
        return {name: len(split) for name, split in _saved_splits(reference).items()}
    return {name: int(split.num_examples) for name, split in open_dataset(str(reference)).info.splits.items()}


def _text_only(dataset: Any) -> Any:
    """Without columns that would have to be decoded as pictures or sound, and with plain Python values."""
    columns = [name for name, feature in dataset.features.items() if type(feature).__name__ in _NOT_TEXT]
    return dataset.remove_columns(columns).with_format(None)


def _arrow_bytes(dataset: Any) -> int:
    """Bytes of the rows; those of a shuffled dataset, whose table holds other rows too, by their share."""
    return int(dataset.data.nbytes * len(dataset) / max(1, dataset.data.num_rows))
