"""The engine: one loaded model that answers and scores for many callers, one at a time and in order.

Work runs on a single thread of its own. The shared experts are switched on or off there, for one piece of work,
so that base and student serve from the same weights. Callers wait in a queue of bounded length.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from nexus_ray.config import Config
from nexus_ray.data.encoding import encode_messages
from nexus_ray.errors import ArtefactError
from nexus_ray.generation.harmony import HarmonyTokens
from nexus_ray.generation.request import (
    BusyError,
    ClosedError,
    ContextLengthError,
    Event,
    Generation,
    Prompt,
    SamplingParams,
    Which,
)
from nexus_ray.generation.scoring import Scorer, TextScore
from nexus_ray.generation.text import AnswerDecoder
from nexus_ray.modeling.loading import LoadedModel, load_student

ResultT = TypeVar("ResultT")
DEFAULT_MAX_TOKENS = 256
_COLDEST = 1e-4  # below this temperature sampling is greedy: dividing by it would overflow


class Engine:
    """Answers chats and scores texts with one loaded model.

    Args:
        loaded: the model, with or without shared experts.
        scorer: scores texts with the same model.
        max_new_tokens: most tokens that a request may ask for.
        max_requests: requests waiting and running at one time; more are refused.
    """

    def __init__(self, loaded: LoadedModel, scorer: Scorer, max_new_tokens: int = 512, max_requests: int = 16) -> None:
        self.loaded = loaded
        self.max_new_tokens = max_new_tokens
        self.max_requests = max_requests
        self.context_length = int(loaded.config["max_position_embeddings"])
        self.sequence_length = scorer.sequence_length
        self._scorer = scorer
        self._end_ids = _end_ids(loaded)
        self._harmony = HarmonyTokens.of(loaded.tokenizer, self._end_ids)
        self._slots = threading.BoundedSemaphore(max_requests)
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine")
        self._closing = threading.Event()
        # Encoding text and encoding chats set different options of one tokenizer.
        self._tokenizer_lock = threading.Lock()

    @classmethod
    def of(cls, loaded: LoadedModel, config: Config) -> Engine:
        """An engine with the limits and the sequence length of a run's configuration."""
        scorer = Scorer(loaded, config.data.sequence_length, config.evaluate.batch_sequences)
        return cls(loaded, scorer, config.serve.max_new_tokens, config.serve.max_concurrent_requests)

    def prepare(self, messages: Sequence[dict[str, Any]], which: Which, params: SamplingParams) -> Prompt:
        """Render and tokenise a conversation and check that the answer fits.

        Raises:
            DataError: the chat template refuses the messages.
            ContextLengthError: prompt and answer are longer than the model's context.
            ArtefactError: there is no student.
        """
        self._require(which)
        self._check_characters(messages)
        with self._tokenizer_lock:
            ids = encode_messages(self.loaded.tokenizer, list(messages), prompt=True)
        left = self.context_length - len(ids)
        default = min(DEFAULT_MAX_TOKENS, self.max_new_tokens, max(left, 1))
        max_tokens = default if params.max_tokens is None else params.max_tokens
        if max_tokens > left:
            raise ContextLengthError(
                f"the model's context is {self.context_length} tokens, but the messages take {len(ids)} "
                f"and the answer may take {max_tokens}",
                "shorten the messages or lower max_tokens",
            )
        return Prompt(ids, which, max_tokens, params)

    def submit(self, prompt: Prompt, emit: Callable[[Event], None] | None = None) -> Generation:
        """Queue a prepared request.

        Args:
            prompt: from `prepare`.
            emit: takes each event on the engine's thread: pieces, then None at the end or the exception that
                ended it. Without it, iterate over the result.

        Raises:
            BusyError: the queue is full.
            ClosedError: the engine is shutting down.
        """
        generation = Generation(len(prompt.ids), emit)
        job = self._enqueue(lambda: self._generate(prompt, generation))
        job.add_done_callback(lambda done: generation.emit(_failure(done)))
        return generation

    def generate(self, messages: Sequence[dict[str, Any]], which: Which, params: SamplingParams) -> Generation:
        """`prepare` and `submit` in one."""
        return self.submit(self.prepare(messages, which, params))

    def score(
        self, texts: Sequence[str], which: Sequence[Which], cancelled: threading.Event
    ) -> Future[list[dict[Which, TextScore]]]:
        """Queue the scoring of texts with each model of `which`.

        Args:
            texts: non-empty texts.
            which: the models.
            cancelled: set it to abandon the work; the future then fails with InterruptedError.

        Raises:
            DataError: a text is empty.
            BusyError, ClosedError: as `submit`.
            ArtefactError: there is no student.
        """
        for name in which:
            self._require(name)
        with self._tokenizer_lock:
            encoded = [self._scorer.encode(text) for text in texts]

        def should_stop() -> bool:
            return cancelled.is_set() or self._closing.is_set()

        return self._enqueue(lambda: [{name: self._score(ids, name, should_stop) for name in which} for ids in encoded])

    def close(self) -> None:
        """Stop what is running, refuse what is waiting, and wait for the thread to end."""
        self._closing.set()
        self._worker.shutdown(wait=True, cancel_futures=True)

    def _check_characters(self, messages: Sequence[dict[str, Any]]) -> None:
        """Refuse at once what cannot fit even in the longest tokens: tokenising megabytes holds everybody up."""
        characters = sum(len(str(message.get("content") or "")) for message in messages)
        if characters > self.context_length * self._scorer.longest_token:
            raise ContextLengthError(
                f"the messages have {characters} characters, far more than the model's context of "
                f"{self.context_length} tokens holds",
                "shorten the messages",
            )

    def _require(self, which: Which) -> None:
        if which == "student" and self.loaded.shared_experts is None:
            raise ArtefactError("there is no student: the base was loaded without an overlay")

    def _enqueue(self, job: Callable[[], ResultT]) -> Future[ResultT]:
        if self._closing.is_set():
            raise ClosedError("the service is shutting down")
        if not self._slots.acquire(blocking=False):
            raise BusyError(
                f"all {self.max_requests} places of the queue are taken", "try again later or raise serve.replicas"
            )
        future = self._worker.submit(job)
        future.add_done_callback(lambda _: self._slots.release())
        return future

    def _score(self, ids: list[int], which: Which, should_stop: Callable[[], bool]) -> TextScore:
        with self._as(which):
            return self._scorer.score(ids, should_stop)

    def _as(self, which: Which) -> AbstractContextManager[None]:
        return self.loaded.base() if which == "base" else nullcontext()

    def _generate(self, prompt: Prompt, generation: Generation) -> None:
        if generation.cancelled:
            return
        watch = _Watch(generation, AnswerDecoder(self._harmony, self._decode, prompt.params.stop), self._closing)
        ids = torch.tensor([prompt.ids], device=self.loaded.device)
        with self._as(prompt.which), _seeded(prompt.params.seed, self.loaded.device):
            self.loaded.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                generation_config=self._generation_config(prompt),
                stopping_criteria=StoppingCriteriaList([watch]),
            )
        watch.finish()

    def _decode(self, ids: list[int]) -> str:
        with self._tokenizer_lock:
            return str(self.loaded.tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    def _generation_config(self, prompt: Prompt) -> GenerationConfig:
        """Everything is set here, so that nothing comes from the model directory's generation_config.json."""
        greedy = prompt.params.temperature < _COLDEST
        sampling = {"temperature": prompt.params.temperature, "top_p": prompt.params.top_p, "top_k": 0}
        return GenerationConfig(
            max_new_tokens=prompt.max_tokens,
            do_sample=not greedy,
            eos_token_id=sorted(self._end_ids),
            pad_token_id=min(self._end_ids, default=0),
            **({} if greedy else sampling),
        )


class _Watch(StoppingCriteria):
    """Sees every generated token once: emits the text it completes and ends the generation when told to."""

    def __init__(self, generation: Generation, decoder: AnswerDecoder, closing: threading.Event) -> None:
        self._generation = generation
        self._decoder = decoder
        self._closing = closing

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        self._generation.completion_tokens += 1
        for piece in self._decoder.push(int(input_ids[0, -1])):
            self._generation.emit(piece)
        done = self._decoder.finished or self._generation.cancelled or self._closing.is_set()
        return torch.full((len(input_ids),), done, dtype=torch.bool, device=input_ids.device)

    def finish(self) -> None:
        """Emit the text still held back and say why the answer ended."""
        for piece in self._decoder.flush():
            self._generation.emit(piece)
        self._generation.finish_reason = "stop" if self._decoder.finished else "length"


def require_overlay(overlay: Path) -> None:
    """Check that a run was trained.

    Raises:
        ArtefactError: there is no overlay.
    """
    if not overlay.exists():
        raise ArtefactError(f"no trained overlay at {overlay}", "run `nexus-ray run CONFIG` first")


def load_served_model(config: Config, overlay: Path) -> LoadedModel:
    """The student of a run, from which the base is served too.

    Raises:
        ArtefactError: the run has no trained overlay, or it is damaged or belongs to another base.
        ModelError: the base cannot be loaded.
    """
    require_overlay(overlay)
    return load_student(config.model, overlay)


def _failure(done: Future[Any]) -> Exception | None:
    """What ended a job: nothing, or an exception that its caller should see."""
    if done.cancelled():
        return ClosedError("the service is shutting down")
    error = done.exception()
    return error if error is None or isinstance(error, Exception) else RuntimeError(repr(error))


def _end_ids(loaded: LoadedModel) -> frozenset[int]:
    """The ids at which the model's own configuration ends a text."""
    config = loaded.model.generation_config
    ids = config.eos_token_id if config is not None else None
    ids = loaded.tokenizer.eos_token_id if ids is None else ids
    return frozenset(() if ids is None else [ids] if isinstance(ids, int) else ids)


@contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Random numbers of their own for one generation; the process's generators are put back after it."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(secrets.randbits(63) if seed is None else seed)
        yield
