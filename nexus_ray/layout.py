"""Where each artefact of a run lives below its directory: the one place that knows the file names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunLayout:
    """Paths below a run directory."""

    directory: Path

    @property
    def config(self) -> Path:
        """The resolved configuration of the last stage that ran here."""
        return self.directory / "config.yaml"

    @property
    def stages(self) -> Path:
        """One record a finished stage: what it was made from and what it made."""
        return self.directory / "stages"

    @property
    def router_stats(self) -> Path:
        """Router moments (safetensors); the description is beside it with suffix .json."""
        return self.directory / "router_stats.safetensors"

    @property
    def student_router_stats(self) -> Path:
        """The same of the student on the same text, for comparison."""
        return self.directory / "router_stats-student.safetensors"

    @property
    def router_probabilities(self) -> Path:
        """Router probabilities of a few tokens, in the reference system's format."""
        return self.directory / "router_probs.npz"

    @property
    def calibration(self) -> Path:
        """Calibration text: the sequences that the routers are observed on; its description is beside it."""
        return self.directory / "calibration.safetensors"

    @property
    def selection(self) -> Path:
        """Ranked experts of each layer."""
        return self.directory / "selection.json"

    @property
    def selection_report(self) -> Path:
        """The selection in words, tables and figures, as Markdown."""
        return self.directory / "selection.md"

    @property
    def initial_overlay(self) -> Path:
        """Overlay as `convert` wrote it."""
        return self.directory / "overlay-initial"

    @property
    def conversion(self) -> Path:
        """What the initial overlay was made from."""
        return self.directory / "convert.json"

    @property
    def targets(self) -> Path:
        """Target set."""
        return self.directory / "targets"

    @property
    def training(self) -> Path:
        """Ray Train's own state."""
        return self.directory / "training"

    @property
    def checkpoints(self) -> Path:
        """Recovery checkpoints of the training, one directory each."""
        return self.directory / "checkpoints"

    @property
    def best(self) -> Path:
        """Checkpoint with the lowest validation loss so far."""
        return self.directory / "best"

    @property
    def metrics(self) -> Path:
        """One JSON line a training record."""
        return self.directory / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        """The same for TensorBoard."""
        return self.directory / "tensorboard"

    @property
    def trackers(self) -> Path:
        """Names that trackers elsewhere know the training by."""
        return self.directory / "trackers.json"

    @property
    def overlay(self) -> Path:
        """The trained overlay."""
        return self.directory / "overlay"

    @property
    def router_drift(self) -> Path:
        """Routers of base and student on the calibration text, compared."""
        return self.directory / "router_drift.json"

    @property
    def report(self) -> Path:
        """The report as JSON; the Markdown is beside it with suffix .md."""
        return self.directory / "report.json"

    @property
    def plots(self) -> Path:
        """Figures of all stages."""
        return self.directory / "plots"
