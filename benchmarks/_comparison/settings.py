"""What all runs of one comparison have in common: the demo's configuration at another length, and where results lie."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from nexus_ray.config import Config, load_config
from nexus_ray.errors import ConfigError
from nexus_ray.layout import RunLayout
from nexus_ray.storage import make_directory, read_json, write_json

ROOT = Path(__file__).parents[2]
TUNING_SEED = 1000
_SIZES = ("steps", "train_sequences", "test_sequences")


@dataclass(frozen=True)
class Settings:
    """A comparison.

    Attributes:
        directory: of its results.
        steps: optimiser steps of a run.
        train_sequences: of each source at most, spread evenly over its training text.
        test_sequences: of each source, spread evenly over its held-out text.
        seeds: runs of a method at its learning rate, with other data order and other random weights.
    """

    directory: Path
    steps: int = 60
    train_sequences: int = 512
    test_sequences: int = 48
    seeds: int = 4

    @cached_property
    def config(self) -> Config:
        """configs/demo.yaml with half the sequences a step, in float32, the experts as transformers computes them."""
        sizes = {"shakespeare": 4, "speeches": 2, "code": 2}
        return load_config(
            ROOT / "configs" / "demo.yaml",
            [
                f"run.directory={self.start}",
                f"model.path={ROOT / 'assets' / 'tiny-gpt-oss'}",
                "model.dtype=float32",
                "model.experts=eager",
                f"train.steps={self.steps}",
                *(f"data.sources.{name}.train={ROOT / 'assets/text'}/{name}.train.jsonl" for name in sizes),
                *(f"data.sources.{name}.heldout={ROOT / 'assets/text'}/{name}.heldout.jsonl" for name in sizes),
                *(f"train.sources.{name}.sequences_per_step={count}" for name, count in sizes.items()),
            ],
        )

    @property
    def start(self) -> Path:
        """Run directory of what comes before training: router statistics, selection, packed text."""
        return self.directory / "start"

    @property
    def layout(self) -> RunLayout:
        """Paths below `start`."""
        return RunLayout(self.start)

    @property
    def runs(self) -> Path:
        """One file a finished run."""
        return self.directory / "runs"

    @property
    def measures(self) -> Path:
        """One file a measurement of memory and speed."""
        return self.directory / "measures"

    def of_role(self, role: str) -> list[str]:
        """Names of the sources that are there to be learned (domain) or kept (retention)."""
        return [name for name, source in self.config.data.sources.items() if source.role == role]

    def claim(self) -> None:
        """Mark the directory as this comparison's, so that runs that cannot be compared are never put together.

        Raises:
            ConfigError: it holds a comparison of another size.
        """
        path = self.directory / "settings.json"
        mine: dict[str, Any] = {name: asdict(self)[name] for name in _SIZES}
        make_directory(self.directory)
        if not path.exists():
            write_json(path, mine)
        found = read_json(path, what="settings of a comparison", hint="choose another --directory")
        if found != mine:
            raise ConfigError(
                f"{self.directory} holds a comparison of {found}, not of {mine}", "choose another --directory"
            )
