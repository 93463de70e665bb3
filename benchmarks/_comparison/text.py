"""The text of a comparison, packed once, and what the frozen base says about it: every method's teacher.

Only whole sequences are used, so that every step and every measurement has the same number of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from _comparison.settings import Settings
from nexus_ray.console import progress
from nexus_ray.data.packing import pack_shard
from nexus_ray.data.sources import list_shards
from nexus_ray.modeling.loading import LoadedModel, load_base
from nexus_ray.storage import atomic_file, make_directory
from nexus_ray.training.feeding.order import SourceOrder

Split = Literal["train", "heldout"]
SPLITS: tuple[Split, ...] = ("train", "heldout")
_TEACHER_BATCH = 8


@dataclass(frozen=True)
class Part:
    """Sequences of one source.

    Attributes:
        ids: [sequences, length] int32 tokens.
        teacher: [sequences, length, hidden] float32 final hidden states of the base, mapped; None of the domain's
            training text, which has no loss that needs them.
    """

    ids: NDArray[np.int32]
    teacher: NDArray[np.float32] | None

    def rows(self, chosen: NDArray[np.int64]) -> tuple[Tensor, Tensor | None]:
        """Token ids [n, length] and the base's hidden states [n, length, hidden] of some sequences."""
        hidden = None if self.teacher is None else torch.from_numpy(np.array(self.teacher[chosen]))
        return torch.from_numpy(self.ids[chosen]).long(), hidden


def prepare_text(settings: Settings) -> None:
    """Pack the text of all sources and run the base over it, unless that is done."""
    wanted = [(split, name) for split in SPLITS for name in settings.config.data.sources]
    missing = [(split, name) for split, name in wanted if not _complete(settings, split, name)]
    if not missing:
        return
    make_directory(_path(settings, "train", "ids").parent)
    base = load_base(settings.config.model)
    for split, name in missing:
        ids = _packed(settings, base, split, name)
        if _has_teacher(settings, split, name):
            _write_teacher(_path(settings, split, f"{name}.teacher"), base, ids)
        with atomic_file(_path(settings, split, name)) as path, path.open("wb") as file:
            np.save(file, ids)


def load_text(settings: Settings, split: Split) -> dict[str, Part]:
    """What `prepare_text` wrote, by source."""
    return {name: _load(settings, split, name) for name in settings.config.data.sources}


def orders(settings: Settings, text: dict[str, Part], seed: int) -> dict[str, SourceOrder]:
    """The order in which a run reads each source: a function of the seed, the same for every method."""
    train = settings.config.train
    return {
        name: SourceOrder(np.arange(len(text[name].ids)), per_step, train.validation_sequences, seed, name)
        for name, per_step in settings.config.sequences_per_step().items()
    }


def spread(count: int, wanted: int) -> NDArray[np.int64]:
    """`wanted` of `count` numbers at even distances, or all of them."""
    return np.arange(min(count, wanted), dtype=np.int64) * count // min(count, wanted)


def _packed(settings: Settings, base: LoadedModel, split: Split, name: str) -> NDArray[np.int32]:
    data = settings.config.data
    length = data.sequence_length
    sequences = [
        sequence.input_ids
        for shard in list_shards(data, split, (name,))
        for sequence in pack_shard(shard, base.tokenizer, length)
        if sequence.num_tokens == length
    ]
    wanted = settings.train_sequences if split == "train" else settings.test_sequences
    return np.stack(sequences)[spread(len(sequences), wanted)]


@torch.no_grad()
def _write_teacher(path: Path, base: LoadedModel, ids: NDArray[np.int32]) -> None:
    """Final hidden states of the base on all sequences."""
    shape = (*ids.shape, base.dimensions.hidden_size)
    with atomic_file(path) as temporary, progress(path.stem, len(ids)) as advance:
        states = np.lib.format.open_memmap(temporary, "w+", np.float32, shape)
        for start in range(0, len(ids), _TEACHER_BATCH):
            batch = torch.from_numpy(ids[start : start + _TEACHER_BATCH]).long()
            hidden, _ = base.hidden_states(batch, torch.ones_like(batch, dtype=torch.bool))
            states[start : start + len(batch)] = hidden.numpy()
            advance(len(batch))
        states.flush()


def _has_teacher(settings: Settings, split: Split, name: str) -> bool:
    """Held-out text always has one: that is what the base itself and every method's divergence is measured by."""
    return split == "heldout" or bool(settings.config.train.sources[name].needs_output)


def _path(settings: Settings, split: Split, name: str) -> Path:
    return settings.start / "text" / f"{split}.{name}.npy"


def _complete(settings: Settings, split: Split, name: str) -> bool:
    return _path(settings, split, name).exists()


def _load(settings: Settings, split: Split, name: str) -> Part:
    teacher = _path(settings, split, f"{name}.teacher")
    return Part(np.load(_path(settings, split, name)), np.load(teacher, mmap_mode="r") if teacher.exists() else None)
