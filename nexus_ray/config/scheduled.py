"""Values that may change during a run: a number, or points joined by straight lines."""

from __future__ import annotations

from typing import Annotated, Any, Self

import numpy as np
from pydantic import (
    AfterValidator,
    ConfigDict,
    RootModel,
    ValidationError,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)

Point = tuple[float, float]


class Scheduled(RootModel[float | tuple[Point, ...]]):
    """A number, or points [share of the run, value] joined by straight lines; constant before the first and after the
    last. `4` is always 4; `[[0, 0], [0.1, 4]]` rises from 0 to 4 in the first tenth of the run and stays there.
    """

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    @field_validator("root", mode="wrap")
    @classmethod
    def _number_or_points(cls, value: Any, read: ValidatorFunctionWrapHandler) -> Any:
        try:
            return read(value)
        except ValidationError as error:  # which would name both forms, neither in words of a configuration
            raise ValueError("give a finite number, or points [share of the run, value]") from error

    @model_validator(mode="after")
    def _points_ascend(self) -> Self:
        shares = [share for share, _ in self._points]
        if not shares:
            raise ValueError("give a number, or at least one point [share of the run, value]")
        if shares != sorted(set(shares)) or not 0 <= shares[0] <= shares[-1] <= 1:
            raise ValueError("points are [share of the run, value] with ascending shares between 0 and 1")
        return self

    @property
    def _points(self) -> tuple[Point, ...]:
        return self.root if isinstance(self.root, tuple) else ((0.0, self.root),)

    @property
    def values(self) -> tuple[float, ...]:
        """The number, or those of all points."""
        return tuple(value for _, value in self._points)

    @property
    def constant(self) -> float | None:
        """The value where it never changes, else None."""
        return self.values[0] if len(set(self.values)) == 1 else None

    @property
    def final(self) -> float:
        """The value at the end of the run."""
        return self.values[-1]

    def at(self, share: float) -> float:
        """The value when `share` of the run, from 0 to 1, is over."""
        shares = [point for point, _ in self._points]
        return float(np.interp(share, shares, self.values))

    def __bool__(self) -> bool:
        return any(self.values)

    def __str__(self) -> str:
        return f"{self.root:g}" if isinstance(self.root, float) else str([list(point) for point in self.root])


def _not_negative(scheduled: Scheduled) -> Scheduled:
    if min(scheduled.values) < 0:
        raise ValueError("a weight must not be negative")
    return scheduled


def _positive(scheduled: Scheduled) -> Scheduled:
    if min(scheduled.values) <= 0:
        raise ValueError("a temperature must be greater than 0")
    return scheduled


Weight = Annotated[Scheduled, AfterValidator(_not_negative)]
Temperature = Annotated[Scheduled, AfterValidator(_positive)]
