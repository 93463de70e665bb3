"""Loss buffers against what autograd keeps of the project's own losses, and the order of micro-batches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from nexus_ray.config import Config
from nexus_ray.planning.losses import loss_buffers, micro_batches, online_teacher, worker_steps
from nexus_ray.targets.compression import compress
from nexus_ray.training import trainer
from nexus_ray.training.distil import DistilTask
from nexus_ray.training.objective import MicroBatch, Teacher, combine, term_counts, token_sums

_VOCABULARY, _LENGTH = 20_000, 16
_TERMS = [{"cross_entropy": 1.0}, {"output_kl": 2.0}, {"cross_entropy": 1.0, "output_kl": 2.0}]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["offline", "online"])
@pytest.mark.parametrize("terms", _TERMS, ids=lambda terms: "+".join(terms))
def test_saved_bytes_of_a_source(
    micro_config: Callable[..., Config],
    saved_bytes: Callable[..., int],
    most_allocated: Callable[[Callable[[], object]], int],
    tmp_path: Path,
    mode: str,
    terms: dict,
    dtype: torch.dtype,
) -> None:
    sources = {"play": {"sequences_per_step": 4, "cross_entropy": 1.0}, "prose": {"sequences_per_step": 2, **terms}}
    config = micro_config(tmp_path, **{"train.mode": mode, "train.sources": sources})
    logits = torch.randn(2, _LENGTH, _VOCABULARY).to(dtype).requires_grad_(True)
    top = compress(torch.randn(2, _LENGTH, 32), 16)
    teacher = Teacher(logits=torch.randn(2, _LENGTH, _VOCABULARY).to(dtype)) if mode == "online" else Teacher(top=top)
    ids = torch.randint(0, _VOCABULARY, (2, _LENGTH))
    batch = MicroBatch("prose", ids, torch.ones_like(ids, dtype=torch.bool), teacher)
    section = config.train.sources["prose"]
    counts = term_counts({"prose": section}, {"prose": 30}, {"prose": 32})

    def loss() -> Tensor:
        return combine(token_sums(batch, logits, torch.zeros(0), section, 1.0), section, counts)

    planned = loss_buffers({"prose": 2}, config, vocabulary=_VOCABULARY, itemsize=dtype.itemsize, length=_LENGTH)
    assert planned.saved == pytest.approx(saved_bytes(loss), rel=0.1)
    assert planned.saved + planned.forward == pytest.approx(most_allocated(loss), rel=0.1)
    assert planned.backward == pytest.approx(most_allocated(loss().backward), rel=0.1)


@pytest.mark.parametrize(("workers", "size"), [(1, 3), (2, 3), (3, 2), (2, 64)])
def test_micro_batches_are_those_that_training_forms(
    micro_config: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int, size: int
) -> None:
    config = micro_config(tmp_path, **{"resources.workers": workers, "train.micro_batch_sequences": size})
    monkeypatch.setattr(trainer, "world", lambda: (0, workers))
    task = SimpleNamespace(train=config.train)
    rows = {name: np.arange(section.sequences_per_step) for name, section in config.train.sources.items()}
    formed = [{name: len(part) for name, part in group} for group in DistilTask._share(task, rows)]
    assert micro_batches(config) == formed
    assert worker_steps(config) == len(formed)


def test_only_an_online_teacher_has_logits(micro_config: Callable[..., Config], tmp_path: Path) -> None:
    sizes = {"vocabulary": 100, "itemsize": 2, "length": 10}
    batch = {"play": 1, "prose": 3}
    offline, online = (micro_config(tmp_path, **{"train.mode": mode}) for mode in ("offline", "online"))
    assert online_teacher(batch, offline, **sizes) == 0
    assert online_teacher(batch, online, **sizes) == 3 * 100 * 2 * 10  # prose alone learns from the teacher
