"""The stages of a run in order, each skipped when its artefact is complete and made from the same inputs.

A stage's recipe is a digest of the configuration and the text it depends on and of the recipes of the stages
before it. When a stage ends, a record with its recipe and the sizes of its outputs is written to `stages/`; the
stage is complete while the record still fits. An interrupted stage continues when its recipe is unchanged and
starts over when it is not.
"""

from __future__ import annotations

import logging
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from nexus_ray.checkpoints.fingerprint import fingerprint
from nexus_ray.config import STAGES, Config, flatten_values, save_config
from nexus_ray.data.sources import describe_files
from nexus_ray.data.vocabulary import tokenizer_files
from nexus_ray.errors import ConfigError, NexusError
from nexus_ray.layout import RunLayout
from nexus_ray.stages import BY_NAME
from nexus_ray.storage import digest, make_directory, read_json, sha256_file, write_json

logger = logging.getLogger(__name__)


class Run:
    """A configuration and its run directory."""

    def __init__(self, config: Config) -> None:
        self.config: Config = config
        self.layout: RunLayout = RunLayout(config.run.directory)

    @cached_property
    def fingerprint(self) -> str:
        """Identity of the base model."""
        return fingerprint(self.config.model.path)

    @cached_property
    def tokenizer(self) -> dict[str, str]:
        """Identity of the tokenizer and the chat template."""
        return tokenizer_files(Path(self.config.model.path))

    @cached_property
    def train_text(self) -> list[list[str | int]]:
        """Identity of the training text."""
        return describe_files(self.config.data, "train")

    @cached_property
    def heldout_text(self) -> list[list[str | int]]:
        """Identity of the held-out text."""
        return describe_files(self.config.data, "heldout")

    def recipe(self, name: str) -> str:
        """Digest of everything that decides the result of a stage."""
        stage = BY_NAME[name]
        before = [self.recipe(earlier) for earlier in stage.after]
        return digest({"stage": name, "after": before, **stage.sections(self)})

    def is_complete(self, name: str) -> bool:
        """Whether a stage's outputs are there, whole, and made from the present inputs, themselves complete."""
        if not all(self.is_complete(earlier) for earlier in BY_NAME[name].after):
            return False
        record_path = _record_path(self.layout, name)
        if not record_path.exists():
            return False
        record = read_json(record_path, what="stage record", hint=f"delete {record_path}")
        return bool(
            record.get("recipe") == self.recipe(name)
            and record.get("after") == self.records_before(name)
            and record.get("outputs") == _sizes(self.layout, name)
        )

    def records_before(self, name: str) -> dict[str, str | None]:
        """SHA-256 of the records of the stages before one: they change when such a stage is done again."""
        paths = {earlier: _record_path(self.layout, earlier) for earlier in BY_NAME[name].after}
        return {earlier: sha256_file(path) if path.exists() else None for earlier, path in paths.items()}


def run_pipeline(config: Config, first: str | None = None, last: str | None = None) -> None:
    """Run all stages from `first` to `last`, skipping complete ones; a named `first` is done again.

    Raises:
        ConfigError: there is no such stage, or `first` comes after `last`.
        NexusError: a stage failed.
    """
    names = _between(first, last)
    run = Run(config)
    if "precompute" in names:
        check_targets(config)
    with locked(run):
        for name in names:
            if name != first and run.is_complete(name):
                logger.info("%s: complete, skipped", name)
            else:
                _run_stage(run, name, afresh=name == first)


def run_single_stage(config: Config, name: str, *, force: bool = False) -> None:
    """Run one stage, unless it is complete and `force` is not given."""
    run = Run(config)
    with locked(run):
        if not force and run.is_complete(name):
            logger.info("%s: complete, skipped (--force does it again)", name)
            return
        _run_stage(run, name, afresh=force)


def forget(run: Run, name: str) -> None:
    """Let a stage start over: drop its record and what it keeps for continuing or would reuse, no other artefact."""
    _record_path(run.layout, name).unlink(missing_ok=True)
    _started_path(run.layout, name).unlink(missing_ok=True)
    _remove(BY_NAME[name].state(run.layout))
    _remove(BY_NAME[name].reused(run.layout))


def check_targets(config: Config) -> None:
    """Refuse targets that the model cannot give, before the stages that come earlier take their time.

    Raises:
        ConfigError: a setting does not fit the model.
        ModelError: the base model is missing or damaged.
    """
    from nexus_ray.targets.writing.job import job_of_run

    job_of_run(config)


@contextmanager
def locked(run: Run) -> Iterator[None]:
    """Hold the run directory: two commands must not work in it at the same time.

    Raises:
        NexusError: another process holds it.
    """
    make_directory(run.layout.directory)
    save_config(run.config, run.layout.config)
    try:
        with FileLock(run.layout.directory / ".lock", timeout=0):
            yield
    except Timeout as error:
        raise NexusError(
            f"another nexus-ray is working in {run.layout.directory}",
            "wait for it to end, or choose another place with run.directory=PATH",
        ) from error


def _run_stage(run: Run, name: str, *, afresh: bool) -> None:
    recipe = run.recipe(name)
    started = _started_path(run.layout, name)
    BY_NAME[name].check(run)
    if afresh:
        forget(run, name)
    _prepare(run, name, recipe)
    _record_path(run.layout, name).unlink(missing_ok=True)  # of outputs that are about to change
    logger.info("%s: started", name)
    begin = time.monotonic()
    BY_NAME[name].run(run, recipe)
    seconds = round(time.monotonic() - begin, 2)
    record = {
        "stage": name,
        "recipe": recipe,
        "after": run.records_before(name),
        "finished": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "seconds": seconds,
        "outputs": _sizes(run.layout, name),
    }
    write_json(_record_path(run.layout, name), record)
    started.unlink()
    logger.info("%s: done in %.0f s", name, seconds)


def _prepare(run: Run, name: str, recipe: str) -> None:
    """Keep what an earlier attempt left when it was made the same way; else remove it.

    Raises:
        ConfigError: it was made another way, and is too dear to be removed unasked.
    """
    marker, stage = _started_path(run.layout, name), BY_NAME[name]
    before = {earlier: run.recipe(earlier) for earlier in stage.after}
    now = {"recipe": recipe, "settings": flatten_values(stage.sections(run)), "before": before}
    if marker.exists():
        then = read_json(marker, what="stage marker", hint=f"delete {marker}")
        if then["recipe"] == recipe:
            return
        unfinished = stage.unfinished(run.layout)
        if unfinished:
            raise ConfigError(
                f"{name}: {run.layout.directory} holds {unfinished}, made with other settings: "
                + "; ".join(_differences(then, now)),
                "put them back to continue, start over with --force, or choose another run.directory",
            )
    _remove(stage.state(run.layout))
    write_json(marker, now)


def _differences(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What two stage markers disagree about, by name."""
    old, new = then.get("settings", {}), now["settings"]
    changed = [name for name in dict.fromkeys([*old, *new]) if old.get(name) != new.get(name)]
    lines = [f"{name} was {_shown(old.get(name))} and is {_shown(new.get(name))}" for name in changed]
    stages = [stage for stage, recipe in now["before"].items() if then.get("before", {}).get(stage) != recipe]
    return lines + [f"{stage} was made with other settings or data" for stage in stages]


def _shown(value: Any) -> str:
    """A setting's value; the digest of a file in few digits."""
    text = str(value)
    return text[:12] if re.fullmatch(r"[0-9a-f]{64}", text) else text


def _between(first: str | None, last: str | None) -> Sequence[str]:
    for name in (first, last):
        if name is not None and name not in STAGES:
            raise ConfigError(f"there is no stage {name!r}", f"stages: {', '.join(STAGES)}")
    start = STAGES.index(first) if first else 0
    stop = STAGES.index(last) + 1 if last else len(STAGES)
    if start >= stop:
        raise ConfigError(f"--from {first} comes after --until {last}", f"the order is {', '.join(STAGES)}")
    return STAGES[start:stop]


def _record_path(layout: RunLayout, name: str) -> Path:
    return layout.stages / f"{name}.json"


def _started_path(layout: RunLayout, name: str) -> Path:
    return layout.stages / f"{name}.started.json"


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _sizes(layout: RunLayout, name: str) -> dict[str, int]:
    """{path below the run directory: bytes} of a stage's outputs; -1 for one that is missing."""
    sizes: dict[str, int] = {}
    for output in BY_NAME[name].outputs(layout):
        files = sorted(output.rglob("*")) if output.is_dir() else [output]
        for file in files:
            if not file.is_dir():
                sizes[str(file.relative_to(layout.directory))] = file.stat().st_size if file.exists() else -1
    return sizes
