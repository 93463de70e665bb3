"""Gradient checkpointing: decoder layers that keep their input alone and run again in the backward pass.

transformers' layers checkpoint themselves where their own `training` flag is set. Only that flag is set, and only
during the forward pass: everything inside the layers stays in evaluation mode, and generation keeps its cache.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from nexus_ray.errors import ModelError
from nexus_ray.modeling.shared_expert import shared_experts_are_off, shared_experts_switched

_RECOMPUTING: ContextVar[bool] = ContextVar("recomputing", default=False)


def require_checkpointing(layers: Sequence[nn.Module]) -> None:
    """Make sure that these decoder layers can do it.

    Raises:
        ModelError: one of them cannot.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer  # takes seconds, and a plan needs none of it

    for layer in layers:
        if not isinstance(layer, GradientCheckpointingLayer):
            raise ModelError(
                f"{type(layer).__name__} does not support gradient checkpointing",
                "set train.gradient_checkpointing=false; a smaller train.micro_batch_sequences saves memory too",
            )


@contextmanager
def checkpointed(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Within the block, forward passes of these layers keep only their inputs for the backward pass."""
    before = [layer.training for layer in layers]
    for layer in layers:
        _switch(layer, checkpointing=True, training=True)
    try:
        yield
    finally:
        for layer, training in zip(layers, before, strict=True):
            _switch(layer, checkpointing=False, training=training)


def _switch(layer: Any, *, checkpointing: bool, training: bool) -> None:
    """Set the flags of this module alone, not of those within it."""
    layer.gradient_checkpointing, layer.training = checkpointing, training
    layer._gradient_checkpointing_func = _run


def recomputing() -> bool:
    """Whether this thread runs a layer again for its backward pass."""
    return _RECOMPUTING.get()


class _AsThen(AbstractContextManager[None]):
    """Runs a layer again as it ran when this was made; in the thread of autograd, which knows no context."""

    def __init__(self) -> None:
        self._off = shared_experts_are_off()
        self._stack = ExitStack()

    def __enter__(self) -> None:
        self._stack.enter_context(shared_experts_switched(off=self._off))
        self._stack.callback(_RECOMPUTING.reset, _RECOMPUTING.set(True))

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def _contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return nullcontext(), _AsThen()


# In evaluation mode nothing is random, so there is no random state to restore.
_run = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False, context_fn=_contexts)
