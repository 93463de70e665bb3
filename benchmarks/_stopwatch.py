"""Where the time of a training step goes: expert dequantisation and products, attention, shared experts, the rest."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from nexus_ray.modeling import packed_experts
from nexus_ray.modeling.loading import LoadedModel

_WHOLE = ("forward", "loss", "backward", "optimizer")


class StepTimes:
    """Seconds by part. Modules are timed by hooks, forward and backward; expert computations by wrapping them."""

    def __init__(self, student: LoadedModel) -> None:
        self.seconds: Counter[str] = Counter()
        self._started: dict[str, float] = {}
        assert student.shared_experts is not None
        for layer in student.family.layers(student.model):
            self._watch_attention(layer.get_submodule("self_attn"))
        for expert in student.shared_experts.layers:
            self._watch(expert, "shared_experts")
        self._watch(student.model.get_submodule("lm_head"), "lm_head")
        packed_experts.dequantise = self._timed("dequantise", packed_experts.dequantise)
        function = packed_experts._FrozenExperts
        for name in ("forward", "backward"):
            setattr(function, name, staticmethod(self._timed("experts", getattr(function, name))))

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        """Add the time of the block to `part`."""
        started = time.perf_counter()
        yield
        self.seconds[part] += time.perf_counter() - started

    def parts(self, steps: int) -> dict[str, float]:
        """Seconds a step: total, and the parts that add up to it."""
        each = {name: value / steps for name, value in self.seconds.items()}
        parts = {
            "dequantise": each["dequantise"],
            "matmul": each["experts"] - each["dequantise"],
            "attention": each["attention"],
            "shared_experts": each["shared_experts"],
            "loss": each["loss"] + each["lm_head"],
            "optimizer": each["optimizer"],
        }
        total = sum(each[name] for name in _WHOLE)
        parts["other"] = total - sum(parts.values())
        return {name: round(value, 2) for name, value in ({"total": total} | parts).items()}

    def _timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            with self.measure(part):
                return function(*arguments)

        return timed

    def _begin(self, part: str) -> None:
        self._started[part] = time.perf_counter()

    def _end(self, part: str) -> None:
        self.seconds[part] += time.perf_counter() - self._started[part]

    def _watch(self, module: nn.Module, part: str) -> None:
        """Time a module whose only input is positional: forward, and from its output's gradient to its input's."""
        module.register_forward_pre_hook(lambda *_: self._begin(part))
        module.register_forward_hook(lambda *_: self._end(part))
        module.register_full_backward_pre_hook(lambda *_: self._begin(part))
        module.register_full_backward_hook(lambda *_: self._end(part))

    def _watch_attention(self, module: nn.Module) -> None:
        """Time self-attention, which gets its hidden states by name, where module hooks do not see their gradient."""

        def stop(_module: nn.Module, _args: Any, kwargs: dict[str, Any], output: Any) -> None:
            self._end("attention")
            hidden_states: Tensor = kwargs["hidden_states"]
            if hidden_states.requires_grad:  # the norm before made it for attention alone
                output[0].register_hook(lambda _: self._begin("attention"))
                hidden_states.register_hook(lambda _: self._end("attention"))

        module.register_forward_pre_hook(lambda *_: self._begin("attention"))
        module.register_forward_hook(stop, with_kwargs=True)
