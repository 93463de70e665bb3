"""Warnings that a training is going wrong: what was seen, and which setting to change.

They follow from the records of the metrics alone, so a resumed run warns as one that was never stopped does.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nexus_ray.config import WarningsSection

_ROUTER_STEPS = 10  # routers are judged by the mean of so many steps: one step's tokens may be unusual
_CLIP_STEPS = 50
_MARGIN = 0.05  # a value has recovered when it is this share of the bound on the good side of it
_LOWER_RATE = "lower train.optimiser.learning_rate"


@dataclass(frozen=True)
class Reading:
    """One thing that is watched.

    Attributes:
        kind: what is watched; one warning a kind until it has recovered.
        value: what it is now.
        bound: what it must not pass.
        seen: the sentence that says so.
        hint: what to do.
        from_above: bad is below the bound, not above.
    """

    kind: str
    value: float
    bound: float
    seen: str
    hint: str
    from_above: bool = False

    @property
    def excess(self) -> float:
        """How far the value is on the bad side of the bound."""
        return self.bound - self.value if self.from_above else self.value - self.bound


class Warnings:
    """Reads records in their order and says when something is wrong.

    Args:
        section: the bounds.
        roles: role of each source, for the retention losses.
    """

    def __init__(self, section: WarningsSection, roles: Mapping[str, str]) -> None:
        self._section = section
        self._roles = roles
        self._active: set[str] = set()
        self._routers: deque[Mapping[str, Any]] = deque(maxlen=_ROUTER_STEPS)
        self._clipped: deque[bool] = deque(maxlen=_CLIP_STEPS)
        self._first_entropy: Sequence[float | None] = ()
        self._base: dict[str, float] = {}
        self._compared_in_steps = self._compared_in_validation = False

    def see(self, record: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Take in a record; returns the warnings that it gives rise to: kind, value, bound, message, hint."""
        readings: list[Reading] = []
        if record["event"] == "step":
            readings = [*self._of_routers(record.get("router", {})), *self._of_clipping(record)]
        elif record["event"] == "validation":
            readings = [*self._of_validated_routers(record.get("router", {})), *self._of_retention(record)]
        return [_as_record(reading) for reading in readings if self._is_news(reading)]

    def _is_news(self, reading: Reading) -> bool:
        if reading.kind in self._active:
            if reading.excess < -_MARGIN * reading.bound:
                self._active.remove(reading.kind)
            return False
        if reading.excess > 0:
            self._active.add(reading.kind)
        return reading.excess > 0

    def _of_routers(self, routers: Mapping[str, Any]) -> Iterator[Reading]:
        """Of a step, unless only validations know the base's routers and have told of them."""
        self._compared_in_steps |= "kl" in routers
        if routers and (self._compared_in_steps or not self._compared_in_validation):
            self._first_entropy = self._first_entropy or routers.get("entropy", ())
            self._routers.append(routers)
            yield from self._judged()

    def _of_validated_routers(self, routers: Mapping[str, Any]) -> Iterator[Reading]:
        """Of one validation, where steps do not know the base's routers: its tokens are always the same."""
        if "kl" in routers and not self._compared_in_steps:
            self._compared_in_validation = True
            self._routers.clear()
            self._routers.append(routers)
            yield from self._judged()

    def _judged(self) -> Iterator[Reading]:
        if kl := self._layers("kl"):
            yield _router_kl(kl, self._section.router_kl)
        if overlap := self._layers("overlap"):
            yield _overlap(overlap, self._section.overlap)
        if left := self._entropy_left():
            yield _entropy(left, self._section.entropy)

    def _layers(self, name: str) -> dict[int, float]:
        """Mean of a measure over the last steps, by layer; layers without any are left out."""
        columns = zip(*(record[name] for record in self._routers if name in record), strict=True)
        known = {layer: [value for value in values if value is not None] for layer, values in enumerate(columns)}
        return {layer: sum(values) / len(values) for layer, values in known.items() if values}

    def _entropy_left(self) -> dict[int, float]:
        """Share of the teacher's router entropy that the student has, by layer; of its own at first, without one."""
        now = self._layers("entropy")
        reference = dict(enumerate(self._first_entropy)) | self._layers("teacher_entropy")
        return {layer: value / whole for layer, value in now.items() if (whole := reference.get(layer))}

    def _of_clipping(self, record: Mapping[str, Any]) -> Iterator[Reading]:
        if "clipped" not in record:
            return
        self._clipped.append(bool(record["clipped"]))
        if len(self._clipped) == _CLIP_STEPS:
            yield _clipping(sum(self._clipped) / _CLIP_STEPS, self._section.clipped)

    def _of_retention(self, record: Mapping[str, Any]) -> Iterator[Reading]:
        self._base |= record.get("base_losses", {})
        for name, loss in record.get("losses", {}).items():
            if self._roles.get(name) == "retention" and name in self._base:
                yield _retention(name, loss, self._base[name], self._section.retention)


def _as_record(reading: Reading) -> dict[str, Any]:
    return {
        "kind": reading.kind,
        "value": reading.value,
        "bound": reading.bound,
        "message": reading.seen,
        "hint": reading.hint,
    }


def _router_kl(layers: dict[int, float], bound: float) -> Reading:
    mean, worst = sum(layers.values()) / len(layers), max(layers, key=layers.__getitem__)
    seen = (
        f"the router KL is {mean:.3g} nats a token, most in layer {worst} ({layers[worst]:.3g}); "
        f"train.warnings.router_kl is {bound:g}: routers see inputs that the base's do not"
    )
    hint = f"raise router_kl or output_kl of the sources to be kept (train.sources.NAME), or {_LOWER_RATE}"
    return Reading("router_kl", mean, bound, seen, hint)


def _overlap(layers: dict[int, float], bound: float) -> Reading:
    mean, worst = sum(layers.values()) / len(layers), min(layers, key=layers.__getitem__)
    seen = (
        f"{mean:.0%} of the base's selected experts are still selected, fewest in layer {worst} "
        f"({layers[worst]:.0%}); train.warnings.overlap is {bound:.0%}"
    )
    hint = f"give sources a router_kl weight (train.sources.NAME.router_kl), or {_LOWER_RATE}"
    return Reading("overlap", mean, bound, seen, hint, from_above=True)


def _entropy(layers: dict[int, float], bound: float) -> Reading:
    worst = min(layers, key=layers.__getitem__)
    seen = (
        f"the routers of layer {worst} keep {layers[worst]:.0%} of their entropy; train.warnings.entropy is "
        f"{bound:.0%}: they collapse to few experts"
    )
    hint = f"{_LOWER_RATE}; with trained routers give a load_balancing or router_z weight (train.sources.NAME)"
    return Reading("entropy", layers[worst], bound, seen, hint, from_above=True)


def _clipping(share: float, bound: float) -> Reading:
    seen = (
        f"the last {_CLIP_STEPS} steps: {share:.0%} had their gradient clipped; train.warnings.clipped is {bound:.0%}"
    )
    hint = f"{_LOWER_RATE}, lengthen train.optimiser.schedule.warmup, or raise train.optimiser.clip_norm"
    return Reading("clipped", share, bound, seen, hint)


def _retention(name: str, loss: float, base: float, bound: float) -> Reading:
    seen = (
        f"{name}: the validation loss is {loss:.4g} nats a token, {loss - base:.3g} above the base's {base:.4g}; "
        f"train.warnings.retention is {bound:g}"
    )
    hint = f"raise train.sources.{name}.output_kl or its share of a step, or {_LOWER_RATE}"
    return Reading(f"retention/{name}", loss - base, bound, seen, hint)
