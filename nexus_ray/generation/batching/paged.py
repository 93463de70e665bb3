"""The one place that knows the inside of transformers' continuous batching: its set-up, and what it is about to do.

Written against transformers 5.23, which pyproject.toml pins.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager, OutputRouter
from transformers.generation.continuous_batching.scheduler import SCHEDULER_MAPPING, FIFOScheduler
from transformers.generation.logits_process import LogitsProcessorList

from nexus_ray.generation.batching.attention import NAME as ATTENTION
from nexus_ray.generation.batching.attention import Plan
from nexus_ray.generation.batching.sampling import RowSampler
from nexus_ray.modeling.loading import LoadedModel

_SCHEDULER = "nexus"


@dataclass(frozen=True)
class BatchLimits:
    """How much an engine does at one time.

    Attributes:
        requests: requests that wait or run; more are refused.
        batch_requests: requests of one forward pass.
        batch_tokens: tokens of one forward pass; longer prompts take several.
        window_tokens: tokens of one window that is scored; attention over it is computed at once.
        cache_tokens: tokens of all requests together in the key-value cache.
        page_tokens: tokens of a page of the cache.
        stuck_seconds: a forward pass that takes longer counts as stuck.
    """

    requests: int = 64
    batch_requests: int = 32
    batch_tokens: int = 512
    window_tokens: int = 8192
    cache_tokens: int = 65_536
    page_tokens: int = 64
    stuck_seconds: float = 300.0


class _Delivery(OutputRouter):
    """Hands the end of each request to the engine, on the thread that met it."""

    def __init__(self, deliver: Callable[[str, str | None], None]) -> None:
        super().__init__()
        self._deliver = deliver

    def deliver(self, output: Any) -> None:
        """One request is over, well or not."""
        self._deliver(output.request_id, output.error)

    def deliver_batch(self, outputs: Sequence[Any]) -> None:
        """Several are."""
        for output in outputs:
            self.deliver(output)


class _Scheduler(FIFOScheduler):
    """First in, first out; a full cache keeps new requests out only while there are others to wait for.

    transformers lets them in again when a request finishes, not when the last one is cancelled.
    """

    def schedule_batch(self, token_budget: int, cache_budget: int) -> Any:
        """Choose the requests of the next pass."""
        if not self.active_requests:
            self.block_new_requests = False
        return super().schedule_batch(token_budget, cache_budget)


SCHEDULER_MAPPING[_SCHEDULER] = _Scheduler


def paged_manager(
    base: LoadedModel, limits: BatchLimits, sampler: RowSampler, deliver: Callable[[str, str | None], None]
) -> ContinuousBatchingManager:
    """transformers' manager, not started yet, with our attention, choice of tokens and delivery.

    Args:
        base: its attention is set to ours, which without a paged cache is the model's own.
        limits: bounds of the cache and of a forward pass; without them it would take most of the memory.
        sampler: chooses tokens and hands them out.
        deliver: takes the id and the error of each request that transformers is done with.
    """
    greedy = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
    config = ContinuousBatchingConfig(
        page_size=limits.page_tokens,
        num_blocks=math.ceil(limits.cache_tokens / limits.page_tokens) + 1,
        max_batch_tokens=limits.batch_tokens,
        max_requests_per_batch=limits.batch_requests,
        max_blocks_per_request=0,
        scheduler_type=_SCHEDULER,
        auto_switch_to_flash=False,
        use_async_batching=False,
        use_cuda_graph=False,
    )
    manager = base.model.init_continuous_batching(greedy, config)
    base.model.set_attn_implementation(ATTENTION)
    processors = manager.logit_processor
    processors.logits_processor = LogitsProcessorList([sampler])
    processors.tensors_required = 1
    processors.do_processing = True
    manager.output_router = _Delivery(deliver)
    return manager


def accepts(manager: ContinuousBatchingManager) -> bool:
    """Whether its loop runs and no error is ending it."""
    return manager.is_running() and manager.background_thread_status.can_accept_new_requests() is None


def ensure_running(manager: ContinuousBatchingManager) -> None:
    """Start its loop, also if an error has ended it or is ending it now; what is queued is kept."""
    if accepts(manager):
        return
    if (ending := manager._generation_thread) is not None:
        ending.join()
    manager.start()


def requests_of(manager: ContinuousBatchingManager) -> Sequence[Any]:
    """The requests of the pass that is about to run, in the order of their tokens; `query_length` tokens each."""
    requests: Sequence[Any] = manager.batch_processor.inputs_and_outputs.requests_in_batch
    return requests


def plans_of(arguments: dict[str, Any], base: LoadedModel) -> dict[str, Plan]:
    """{kind of layer: what attends to what} of a pass, from the arguments that transformers calls the model with."""
    queries = arguments["cu_seq_lens_q"].tolist()
    window = getattr(base.model.config, "sliding_window", None)
    return {
        kind: Plan.of(queries, ends.tolist(), window if kind == "sliding_attention" else None, base.device)
        for kind, ends in arguments["cu_seq_lens_k"].items()
    }
