"""Where each artefact of a run lives below its directory: the one place that knows the file names."""

from __future__ import annotations

from dataclasses import dataclass

from nexus_ray.storage import Place


@dataclass(frozen=True)
class RunLayout:
    """Places below a run directory, which is local or a URI."""

    directory: Place

    @property
    def config(self) -> Place:
        """The resolved configuration of the last stage that ran here."""
        return self.directory / "config.yaml"

    @property
    def stages(self) -> Place:
        """One record a finished stage: what it was made from and what it made."""
        return self.directory / "stages"

    @property
    def router_stats(self) -> Place:
        """Router moments (safetensors); the description is beside it with suffix .json."""
        return self.directory / "router_stats.safetensors"

    @property
    def student_router_stats(self) -> Place:
        """The same of the student on the same text, for comparison."""
        return self.directory / "router_stats-student.safetensors"

    @property
    def router_probabilities(self) -> Place:
        """Router probabilities of a few tokens, in the reference system's format."""
        return self.directory / "router_probs.npz"

    @property
    def calibration(self) -> Place:
        """Calibration text: the sequences that the routers are observed on; its description is beside it."""
        return self.directory / "calibration.safetensors"

    @property
    def selection(self) -> Place:
        """Ranked experts of each layer."""
        return self.directory / "selection.json"

    @property
    def selection_report(self) -> Place:
        """The selection in words, tables and figures, as Markdown."""
        return self.directory / "selection.md"

    @property
    def initial_overlay(self) -> Place:
        """Overlay as `convert` wrote it."""
        return self.directory / "overlay-initial"

    @property
    def conversion(self) -> Place:
        """What the initial overlay was made from."""
        return self.directory / "convert.json"

    @property
    def targets(self) -> Place:
        """Target set."""
        return self.directory / "targets"

    @property
    def training(self) -> Place:
        """Ray Train's own state."""
        return self.directory / "training"

    @property
    def checkpoints(self) -> Place:
        """Recovery checkpoints of the training, one directory each."""
        return self.directory / "checkpoints"

    @property
    def best(self) -> Place:
        """Checkpoint with the lowest validation loss so far."""
        return self.directory / "best"

    @property
    def metrics(self) -> Place:
        """One JSON line a training record."""
        return self.directory / "metrics.jsonl"

    @property
    def tensorboard(self) -> Place:
        """The same for TensorBoard."""
        return self.directory / "tensorboard"

    @property
    def trackers(self) -> Place:
        """Names that trackers elsewhere know the training by."""
        return self.directory / "trackers.json"

    @property
    def overlay(self) -> Place:
        """The trained overlay."""
        return self.directory / "overlay"

    @property
    def router_drift(self) -> Place:
        """Routers of base and student on the calibration text, compared."""
        return self.directory / "router_drift.json"

    @property
    def report(self) -> Place:
        """The report as JSON; the Markdown is beside it with suffix .md."""
        return self.directory / "report.json"

    @property
    def plots(self) -> Place:
        """Figures of all stages."""
        return self.directory / "plots"
