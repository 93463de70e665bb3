"""Whether a target set has what a training needs, asked before any worker starts."""

from __future__ import annotations

import logging
from collections import Counter

from nexus_ray.checkpoints.overlay import OverlayConfig
from nexus_ray.config import Config
from nexus_ray.errors import ArtefactError, ConfigError, DataError
from nexus_ray.targets.encoding.encodings import HiddenEncoding
from nexus_ray.targets.format import REMAKE, Manifest

logger = logging.getLogger(__name__)
_HOLDS = {"output_kl": "output", "hidden_mse": "output", "router_kl": "router"}


def check_targets(manifest: Manifest, config: Config, description: OverlayConfig) -> None:
    """Refuse targets that were made for something else, lack what a loss needs, or are too few.

    Raises:
        ArtefactError: they are of another base or temperature, or lack targets of a source.
        ConfigError: fewer sequences in a step than workers.
        DataError: a source has too few sequences.
    """
    if manifest.base_fingerprint != description.base_fingerprint:
        raise ArtefactError("the targets were made with another base model than the overlay", REMAKE)
    _check_sequences(manifest, config)
    if config.train.mode == "offline":
        for term in _HOLDS:
            _check_held(manifest, config, term)
    per_step = sum(config.sequences_per_step().values())
    if per_step < config.resources.workers:
        raise ConfigError(
            f"train.sources: a step has {per_step} sequences, fewer than resources.workers={config.resources.workers}"
        )


def _check_sequences(manifest: Manifest, config: Config) -> None:
    held = _sequences(manifest)
    for name, per_step in config.sequences_per_step().items():
        needed = config.train.validation_sequences + per_step
        if held[name] < needed:
            raise DataError(
                f"source {name} has {held[name]} sequences; validation and one step need {needed}",
                "add text, or lower train.validation_sequences or data.sequence_length",
            )


def _check_held(manifest: Manifest, config: Config, term: str) -> None:
    """The sources that a term has a weight for must have its targets, made at its temperature."""
    kind = _HOLDS[term]
    names = [name for name, section in config.train.sources.items() if getattr(section, term)]
    for file in manifest.files:
        if file.source in names and not getattr(file, kind):
            raise ArtefactError(f"the targets hold no {kind} targets of source {file.source}, which has {term}", REMAKE)
    if not names:
        return
    if term == "hidden_mse" and not isinstance(manifest.output, HiddenEncoding):
        raise ArtefactError(f"the targets hold no hidden states, which {names[0]} needs for its {term}", REMAKE)
    made, wanted = _temperature(manifest, kind), getattr(config.train, f"{kind}_temperature")
    if made is not None and made != wanted.constant:
        raise ArtefactError(
            f"the {kind} targets were made at temperature {made:g}, but train.{kind}_temperature is {wanted}", REMAKE
        )


def _temperature(manifest: Manifest, kind: str) -> float | None:
    """That targets were made at; None where they serve every temperature."""
    encoding = manifest.output if kind == "output" else manifest.router
    return None if encoding is None or isinstance(encoding, HiddenEncoding) else encoding.temperature


def report_epochs(manifest: Manifest, config: Config) -> None:
    """Log which sources training reads more than once."""
    held, train = _sequences(manifest), config.train
    for name, per_step in config.sequences_per_step().items():
        sequences = held[name] - train.validation_sequences
        epochs = train.steps * per_step / sequences
        if epochs > 1:
            logger.info(
                "source %s: %d sequences are read %.2f times in %d steps; add text to read more of it",
                name,
                sequences,
                epochs,
                train.steps,
            )


def _sequences(manifest: Manifest) -> Counter[str]:
    held: Counter[str] = Counter()
    for file in manifest.files:
        held[file.source] += file.sequences
    return held
