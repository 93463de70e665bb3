"""Collecting router statistics: a pool of frozen models reads the calibration text and leaves exact moments.

The text is cut into units of a few batches each. A unit's batches are the same whoever computes them; its moments are
kept as a part until the stage ends, so a killed job continues; and the parts are merged in the order of the units.
So the artefact has the same bytes for any number of workers.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import reduce
from typing import Any

from nexus_ray.checkpoints.fingerprint import fingerprint, full_sha256
from nexus_ray.checkpoints.reader import read_model_config
from nexus_ray.cluster import map_over_pool, set_worker_threads
from nexus_ray.config import Config
from nexus_ray.data.vocabulary import tokenizer_digest
from nexus_ray.errors import ArtefactError, DataError
from nexus_ray.families import family_of
from nexus_ray.layout import RunLayout
from nexus_ray.modeling.loading import LoadedModel, load_base, load_student, load_tokenizer
from nexus_ray.modeling.packed_experts import ExpertNorms
from nexus_ray.parts import Parts
from nexus_ray.router.accumulate import moments_of_logits
from nexus_ray.router.artefact import Description, RouterStatistics
from nexus_ray.router.calibration import Calibration, choose_calibration
from nexus_ray.router.candidates import CalibrationText
from nexus_ray.router.moments import RouterMoments
from nexus_ray.router.probabilities import ProbabilityRows, save_probabilities
from nexus_ray.storage import Place, digest, local_directory

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Unit:
    """A piece of work: some calibration sequences of one source.

    Attributes:
        index: position among all units; results are merged in this order.
        source: name of the source.
        start: first of its calibration sequences.
        stop: one past the last.
        export: leading tokens whose probabilities are written out.
    """

    index: int
    source: str
    start: int
    stop: int
    export: int = 0


def collect(config: Config, layout: RunLayout, overlay: Place | None = None) -> RouterStatistics:
    """Write the router statistics of every source, continuing what an interrupted call left.

    Args:
        config: the run.
        layout: its paths.
        overlay: directory of an overlay: the routers of the student are observed instead of the base's, on the text
            that was chosen for the base.

    Raises:
        ModelError: the base model is missing or damaged.
        ArtefactError: the overlay is missing, damaged or of another base, or no text was chosen yet.
        DataError: a source is missing or unreadable, or the router gives NaN.
        StorageError: the file system refused.
    """
    started = time.monotonic()
    if overlay is None:
        calibration, output = choose_calibration(config, layout.calibration), layout.router_stats
    else:
        calibration, output = Calibration.load(layout.calibration), layout.student_router_stats
    description = describe_statistics(config, calibration, overlay)
    units = plan_units(config, calibration, export=config.collect.export_probabilities if overlay is None else 0)
    recipe = _recipe(config, description, units)
    parts = Parts(output.with_name(output.stem + ".partial"), ".safetensors", f"unit-{recipe[:12]}")
    parts.begin(recipe)
    read = _run(config, parts, units, layout.calibration, overlay)
    _log_speed(read, time.monotonic() - started)
    exporting = [parts.path(unit) for unit in units if unit.export]
    if exporting:
        save_probabilities(layout.router_probabilities, exporting, description, config.model.path.name)
    statistics = RouterStatistics(description, _merge_parts(parts, units, description))
    statistics.save(output)
    parts.discard()
    return statistics


def plan_units(config: Config, calibration: Calibration, export: int = 0) -> list[Unit]:
    """Cut every source's calibration sequences into units.

    Args:
        config: the run.
        calibration: the text.
        export: tokens whose probabilities are written out, spread over the sources.
    """
    size = config.collect.batch_sequences * config.collect.unit_batches
    units: list[Unit] = []
    for number, (name, text) in enumerate(calibration.sources.items()):
        wanted, left = divmod(export, len(calibration.sources))
        wanted += number < left
        for start in range(0, len(text), size):
            stop = min(start + size, len(text))
            exported = min(wanted, int(text.num_tokens[start:stop].sum()))
            units.append(Unit(len(units), name, start, stop, exported))
            wanted -= exported
    return units


class StatisticsCollector:
    """Actor that runs the model over units of calibration text and writes the moments of its routers.

    Args:
        config: the run.
        parts: where moments are left.
        calibration: the calibration text's file.
        overlay: of the student; None observes the base.
    """

    def __init__(self, config: Config, parts: Parts, calibration: Place, overlay: Place | None) -> None:
        set_worker_threads(config.resources)
        self.config = config
        self.parts = parts
        self.calibration = Calibration.load(calibration)
        self.model = load_base(config.model) if overlay is None else load_student(config.model, overlay)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Process one `Unit`; says when it began and ended, in seconds of this machine's clock."""
        started = time.time()
        unit = Unit(**row)
        text = self.calibration.sources[unit.source].take(slice(unit.start, unit.stop))
        names = text.places(self.calibration.description.shards)
        exported = ProbabilityRows(unit.export)
        try:
            moments = observe(self.model, text, self.config, names, exported)
        except DataError as error:
            if self.model.overlay is None:
                raise
            hint = "train again with a lower train.optimiser.learning_rate"
            raise ArtefactError(f"the overlay diverged: the student's {error.message}", hint) from error
        exported.save(self.parts.path(unit))
        moments.save(self.parts.path(unit))
        return {"tokens": moments.tokens, "started": started, "ended": time.time()}


def observe(
    model: LoadedModel,
    text: CalibrationText,
    config: Config,
    names: Sequence[str] = (),
    exported: ProbabilityRows | None = None,
) -> RouterMoments:
    """Run the model over `text` in batches of `collect.batch_sequences`; moments of its routers.

    Args:
        model: base or student.
        text: the sequences, each with its half.
        config: the run.
        names: of the sequences, for messages.
        exported: takes the probabilities too.

    Raises:
        DataError: a router's logit is NaN or infinite; names layer and sequence.
    """
    dimensions, size = model.dimensions, config.collect.batch_sequences
    records_norms = config.collect.expert_norms and config.model.experts == "packed"
    moments = RouterMoments.empty(dimensions.layers, dimensions.experts)
    for start in range(0, len(text), size):
        rows = slice(start, start + size)
        piece = text.take(rows)
        batch = piece.batch()
        with _recording_norms(model, records_norms) as norms:
            logits = model.route_batch(batch)
        moments = moments.merge(
            moments_of_logits(logits, batch.valid, piece.half, dimensions.experts_per_token, norms, names[rows])
        )
        if exported is not None:
            exported.add(logits, batch.valid)
    return moments


def _recording_norms(model: LoadedModel, wanted: bool) -> AbstractContextManager[list[ExpertNorms]]:
    return model.recording_expert_norms() if wanted else nullcontext([])


def _run(config: Config, parts: Parts, units: Sequence[Unit], calibration: Place, overlay: Place | None) -> int:
    """Make the missing parts; return the tokens read in this call."""
    missing = parts.missing(units)
    arguments = {"config": config, "parts": parts, "calibration": calibration, "overlay": overlay}
    text = Calibration.load(calibration).sources
    total = sum(int(text[unit.source].num_tokens[unit.start : unit.stop].sum()) for unit in missing)
    rows = map_over_pool(
        StatisticsCollector,
        arguments,
        [asdict(unit) for unit in missing],
        config.resources,
        "collect router statistics",
        amount=("tokens", total),
    )
    return sum(int(row["tokens"]) for row in rows)


def _merge_parts(parts: Parts, units: Sequence[Unit], description: Description) -> dict[str, RouterMoments]:
    """Moments by source, parts merged in the order of the units."""
    sources = {}
    for name in dict.fromkeys(unit.source for unit in units):
        loaded = (RouterMoments.load(parts.path(unit)) for unit in units if unit.source == name)
        empty = RouterMoments.empty(description.layers, description.experts)
        sources[name] = reduce(RouterMoments.merge, loaded, empty)
    return sources


def describe_statistics(config: Config, calibration: Calibration, overlay: Place | None) -> Description:
    """What statistics of this run's base, or of its student, would say of themselves."""
    model = read_model_config(config.model.path)
    dimensions = family_of(model).dimensions(model)
    samples = calibration.description.samples
    return Description(
        base_fingerprint=fingerprint(config.model.path),
        overlay_sha256=None if overlay is None else digest(full_sha256(local_directory(overlay), stem="overlay")),
        tokenizer_sha256=tokenizer_digest(load_tokenizer(config.model.path, model)),
        sequence_length=config.data.sequence_length,
        layers=dimensions.layers,
        experts=dimensions.experts,
        experts_per_token=dimensions.experts_per_token,
        tokens={name: sample.tokens for name, sample in samples.items()},
        compute=config.compute,
        calibration_sha256=calibration.description.sha256,
        calibration=samples,
    )


def _recipe(config: Config, description: Description, units: Sequence[Unit]) -> str:
    """Digest of everything that decides the bytes of the parts."""
    return digest(
        {
            "description": description.model_dump(mode="json"),
            "batch_sequences": config.collect.batch_sequences,
            "expert_norms": config.collect.expert_norms,
            "threads": config.resources.cpus_per_worker,
            "units": [asdict(unit) for unit in units],
        }
    )


def _log_speed(tokens: int, seconds: float) -> None:
    if tokens:
        logger.info(
            "router statistics of %s tokens in %.0f s: %.0f tokens/s",
            f"{tokens:,}", seconds, tokens / max(seconds, 1e-9),
        )  # fmt: skip
