"""What the teacher says about a batch, encoded: columns of bytes, one entry a position.

Logits are formed a few positions at a time and encoded at once, so [sequences, length, vocabulary] is never in memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nexus_ray.data.packing import Batch
from nexus_ray.errors import DataError, ModelError
from nexus_ray.modeling.head import chunks
from nexus_ray.modeling.loading import LoadedModel
from nexus_ray.targets.encoding.encodings import HiddenEncoding, SampledEncoding
from nexus_ray.targets.encoding.top_k import TopKEncoding
from nexus_ray.targets.format import Header

_HINT = "check the base model's weights; in bfloat16 try model.dtype=float32"


class EncodingTeacher:
    """The base model, and how its answers are encoded.

    Args:
        model: the base.
        header: of the target set.

    Raises:
        ModelError: this worker has another model than the set is of.
    """

    def __init__(self, model: LoadedModel, header: Header) -> None:
        if model.fingerprint != header.base_fingerprint:
            raise ModelError(
                f"the base model of this worker is {model.fingerprint[:12]}, the targets are of "
                f"{(header.base_fingerprint or 'none')[:12]}",
                "give all nodes of the cluster the same model, and leave it alone while targets are made",
            )
        self.model = model
        self.header = header

    @torch.no_grad()
    def columns(
        self, batch: Batch, random: np.random.Generator, *, output: bool, router: bool
    ) -> dict[str, NDArray[np.uint8]]:
        """Run the model over a batch.

        Args:
            batch: the sequences.
            random: of the draws, used in the order of positions.
            output: whether next-token targets are wanted.
            router: whether router targets are wanted.

        Returns:
            [positions, width] uint8 of each column: of output targets the positions whose next token is in the loss
            mask, of router targets those that their encoding keeps; of all rows, one after the other.

        Raises:
            DataError: the model gives NaN or infinity.
        """
        input_ids = torch.from_numpy(batch.input_ids).long().to(self.model.device)
        valid = torch.from_numpy(batch.valid).to(self.model.device)
        hidden, router_logits = self.model.hidden_states(input_ids, valid)
        columns: dict[str, NDArray[np.uint8]] = {}
        if output:
            is_target = torch.from_numpy(batch.is_target).to(self.model.device)
            assert self.header.output is not None
            pieces = self._output(hidden[:, :-1][is_target[:, 1:]], random)
            columns |= _joined(pieces, self.header.output.widths())
        if router:
            assert self.header.router is not None
            columns |= _joined([self._router(router_logits, valid)], self.header.router.widths())
        return columns

    def _output(self, hidden: Tensor, random: np.random.Generator) -> Iterator[Mapping[str, Tensor]]:
        """Encoded output targets of [positions, hidden] states, in pieces."""
        encoding = self.header.output
        assert encoding is not None
        _check(hidden, "final hidden states")
        if isinstance(encoding, HiddenEncoding):
            yield encoding.encode(hidden)
            return
        for rows in chunks(hidden, encoding.vocabulary):
            # In the head's own type: the encoding makes float32 of a few of them at a time.
            logits = torch.nn.functional.linear(hidden[rows].to(self.model.head.dtype), self.model.head)
            yield self._encode(encoding, logits, random)

    def _encode(
        self, encoding: TopKEncoding | SampledEncoding, logits: Tensor, random: np.random.Generator
    ) -> Mapping[str, Tensor]:
        try:
            if isinstance(encoding, TopKEncoding):
                return encoding.encode(logits)
            return encoding.encode(logits, torch.from_numpy(random.random(len(logits))).to(logits.device))
        except ValueError as error:
            raise DataError(f"the teacher's logits cannot be stored: {error}", _HINT) from error

    def _router(self, logits: Tensor, valid: Tensor) -> Mapping[str, Tensor]:
        """Encoded router targets of [sequences, length, layers, experts] logits."""
        encoding = self.header.router
        assert encoding is not None
        positions = torch.arange(valid.shape[1], device=valid.device)
        kept = logits[valid & (positions % encoding.every == 0)]
        chosen = kept[:, torch.tensor(encoding.layers, device=kept.device)]
        _check(chosen, "router logits")
        return encoding.encode(chosen)


def _joined(pieces: Iterable[Mapping[str, Tensor]], widths: Mapping[str, int]) -> dict[str, NDArray[np.uint8]]:
    """The pieces of each column, if any, one after the other, in memory of this machine."""
    arrays = [{name: column.cpu().numpy() for name, column in piece.items()} for piece in pieces]
    empty = {name: np.zeros((0, width), np.uint8) for name, width in widths.items()}
    return {name: np.concatenate([empty[name], *(piece[name] for piece in arrays)]) for name in widths}


def _check(values: Tensor, what: str) -> None:
    """Refuse what no target can be made of.

    Raises:
        DataError: it is not finite.
    """
    if not bool(torch.isfinite(values).all()):
        raise DataError(f"the teacher's {what} are NaN or infinite", _HINT)
