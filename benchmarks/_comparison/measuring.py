"""Memory and speed of a training step of each method, in a process of its own on an otherwise idle machine."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass

import torch
from _common import MemoryPeak, memory_bytes

from _comparison.methods import METHODS, Method, build
from _comparison.settings import Settings
from _comparison.text import load_text
from _comparison.training import Run, steps_of
from nexus_ray.console import progress
from nexus_ray.storage import make_directory, write_json

_STEPS = 5
_FROZEN_EXPERTS = ("shared", "attention", "router")
_MIB = 1 << 20


@dataclass(frozen=True)
class Measured:
    """A training step on one thread.

    Attributes:
        peak_mib: most anonymous memory, model and optimiser included, above that of the process before loading.
        tokens_per_second: of the fastest step but the first.
    """

    peak_mib: float
    tokens_per_second: float


def forms_of(method: Method) -> tuple[str, ...]:
    """How a method can have its routed experts: those that it does not train may stay packed."""
    return ("eager", "packed") if method.kind in _FROZEN_EXPERTS else ("eager",)


def measure_all(methods: Sequence[Method], settings: Settings) -> dict[tuple[str, str], Measured]:
    """Measure what has not been measured, one after the other; by method and form of its experts.

    Other initialisations and variants of the shared expert are left out: they compute the same.
    """
    make_directory(settings.measures)
    compared = [method for method in methods if {"budget", "usual"} & set(method.tables)]
    wanted = [(method.name, form) for method in compared for form in forms_of(method)]
    found = {}
    with progress("measure", len(wanted)) as advance:
        for name, form in wanted:
            path = settings.measures / f"{name}-{form}.json"
            if not path.exists():
                write_json(path, asdict(_in_new_process(name, form, settings)))
            found[name, form] = Measured(**json.loads(path.read_text(encoding="utf-8")))
            advance(1)
    return found


def _in_new_process(name: str, form: str, settings: Settings) -> Measured:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, name, form, settings).result()


def measure(name: str, form: str, settings: Settings) -> Measured:
    """Load the method's model and train a few steps with it in this process."""
    torch.set_num_threads(1)
    method, text = METHODS[name], load_text(settings, "train")
    before = memory_bytes("RssAnon")
    steps = steps_of(build(method, settings, 0, form), text, Run(name, method.learning_rate, 0), settings)
    tokens = settings.config.data.sequence_length * sum(settings.config.sequences_per_step().values())
    seconds = []
    with MemoryPeak() as peak:
        started = time.perf_counter()
        for _ in itertools.islice(steps, _STEPS):
            seconds.append(time.perf_counter() - started)
            started = time.perf_counter()
    return Measured((peak.anonymous - before) / _MIB, tokens / min(seconds[1:]))
