"""The stages of a run in order, each skipped when its artefact is complete and made from the same inputs.

A stage's recipe is a digest of the configuration and the text it depends on and of the recipes of the stages
before it. When a stage ends, a record with its recipe and the sizes of its outputs is written to `stages/`; the
stage is complete while the record still fits. An interrupted stage continues when its recipe is unchanged and
starts over when it is not, unless that would cost a training: nobody loses one unasked.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

from nexus_ray.checkpoints.fingerprint import fingerprint
from nexus_ray.checkpoints.node_cache import local_description
from nexus_ray.checkpoints.reader import checkpoint_bytes
from nexus_ray.config import STAGES, Config, flatten_values, save_config
from nexus_ray.data.sources import describe_files
from nexus_ray.data.vocabulary import tokenizer_files
from nexus_ray.errors import ConfigError
from nexus_ray.layout import RunLayout
from nexus_ray.run_lock import RunLock, locked
from nexus_ray.stages import BY_NAME
from nexus_ray.storage import (
    Place,
    digest,
    exists,
    file_sizes,
    is_remote,
    read_json,
    remove,
    sha256_file,
    size_of,
    sizes_of,
    write_json,
)

logger = logging.getLogger(__name__)
_LONGEST_SHOWN = 80  # characters of a setting's value in a message: lists of files are longer


class Run:
    """A configuration and its run directory."""

    def __init__(self, config: Config) -> None:
        self.config: Config = config
        self.layout: RunLayout = RunLayout(config.run.directory)

    @cached_property
    def fingerprint(self) -> str:
        """Identity of the base model."""
        base = self.config.model.path
        if is_remote(base):
            size = f"{checkpoint_bytes(base) / 1e9:,.1f} GB"
            logger.info("%s (%s) is fetched once by each node that loads it; its workers' logs say how far", base, size)
        return fingerprint(base)

    @cached_property
    def tokenizer(self) -> dict[str, str]:
        """Identity of the tokenizer and the chat template."""
        return tokenizer_files(local_description(self.config.model.path))

    @cached_property
    def train_text(self) -> list[list[str | int]]:
        """Identity of the training text."""
        return describe_files(self.config.data, "train")

    @cached_property
    def heldout_text(self) -> list[list[str | int]]:
        """Identity of the held-out text."""
        return describe_files(self.config.data, "heldout")

    @cached_property
    def task_files(self) -> list[list[str]]:
        """[name, digest] of every file beside lm-eval tasks of one's own; none without them."""
        section = self.config.evaluate.lm_eval
        directory = section.include_path if section is not None else None
        files = sorted(directory.rglob("*")) if directory is not None else []
        kept = [file for file in files if file.is_file() and "__pycache__" not in file.parts]
        return [[str(file.relative_to(str(directory))), sha256_file(file)] for file in kept]

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
        if not exists(record_path):
            return False
        record = _read(record_path)
        return bool(
            record.get("recipe") == self.recipe(name)
            and record.get("after") == self.records_before(name)
            and record.get("outputs") == _sizes(self.layout, name)
        )

    def records_before(self, name: str) -> dict[str, str | None]:
        """SHA-256 of the records of the stages before one: they change when such a stage is done again."""
        paths = {earlier: _record_path(self.layout, earlier) for earlier in BY_NAME[name].after}
        return {earlier: sha256_file(path) if exists(path) else None for earlier, path in paths.items()}


def run_pipeline(config: Config, first: str | None = None, last: str | None = None) -> None:
    """Run all stages from `first` to `last`, skipping complete ones; a named `first` is done again.

    Raises:
        ConfigError: there is no such stage, or `first` comes after `last`; or a stage would replace, unasked, what is
            dear and was made with other settings.
        NexusError: a stage failed.
    """
    names = _between(first, last)
    run = Run(config)
    with locked(run.layout) as lock:
        if first is None:
            _refuse_to_replace(run, names)
        for name in names:
            if name == first or not run.is_complete(name):
                BY_NAME[name].ahead(config)
        for name in names:
            if name == first:
                _run_stage(run, name, lock, afresh=True, replaced=_of_other_settings(run, names))
            elif run.is_complete(name):
                logger.info("%s: complete, skipped", name)
            else:
                _run_stage(run, name, lock)


def run_single_stage(config: Config, name: str, *, force: bool = False) -> None:
    """Run one stage, unless it is complete and `force` is not given.

    Raises:
        ConfigError: it would replace, unasked, what is dear and was made with other settings, or what it would go on
            from was made with other settings.
        NexusError: it failed.
    """
    run = Run(config)
    with locked(run.layout) as lock:
        if not force:
            _refuse_to_replace(run, [name])
        if not force and run.is_complete(name):
            logger.info("%s: complete, skipped (--force does it again)", name)
            return
        BY_NAME[name].ahead(config)
        _run_stage(run, name, lock, afresh=force)


def forget(run: Run, name: str) -> None:
    """Let a stage start over: drop its record and what it keeps for continuing or would reuse, no other artefact."""
    stage = BY_NAME[name]
    for place in (*_markers(run.layout, name), *stage.state(run.layout), *stage.reused(run.layout)):
        remove(place)


def _run_stage(run: Run, name: str, lock: RunLock, *, afresh: bool = False, replaced: Iterable[str] = ()) -> None:
    """Do a stage.

    Args:
        run: the run.
        name: of the stage.
        lock: of the run directory, looked at before what it has is touched and before the record is written.
        afresh: whether it starts over, whatever it could continue.
        replaced: stages whose results lose their records when this one begins: they are to be made with new settings.
    """
    stage, recipe = BY_NAME[name], run.recipe(name)
    _refuse_stale(run, name)
    stage.check(run)
    lock.check()
    save_config(run.config, run.layout.config)
    if afresh:
        forget(run, name)
    for marker in [marker for other in replaced for marker in _markers(run.layout, other)]:
        remove(marker)
    started, how = _started_path(run.layout, name), _how(run, name)
    if not (exists(started) and _read(started)["recipe"] == recipe):
        for place in stage.state(run.layout):
            remove(place)
        write_json(started, how)
    remove(_record_path(run.layout, name))  # of outputs that are about to change
    logger.info("%s: started", name)
    begin = time.monotonic()
    stage.run(run, recipe)
    seconds = round(time.monotonic() - begin, 2)
    record = {
        "stage": name,
        **how,
        "after": run.records_before(name),
        "finished": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "seconds": seconds,
        "outputs": _sizes(run.layout, name),
    }
    lock.check()
    write_json(_record_path(run.layout, name), record)
    remove(started)
    logger.info("%s: done in %.0f s", name, seconds)


def _how(run: Run, name: str) -> dict[str, Any]:
    """How the present configuration makes a stage, for its marker and its record."""
    stage = BY_NAME[name]
    return {
        "recipe": run.recipe(name),
        "settings": flatten_values(stage.sections(run)),
        "before": {earlier: run.recipe(earlier) for earlier in stage.after},
    }


def _made(run: Run, name: str) -> dict[str, Any] | None:
    """How what is there of a stage was made, unfinished or finished; None where nothing is."""
    for path in (_started_path(run.layout, name), _record_path(run.layout, name)):
        if exists(path):
            return _read(path)
    return None


def _of_other_settings(run: Run, names: Iterable[str]) -> list[str]:
    """Those of the stages of which something is there that was made with other settings."""
    made = {name: _made(run, name) for name in names}
    return [name for name, how in made.items() if how is not None and how["recipe"] != run.recipe(name)]


def _first_of_other_settings(run: Run, name: str) -> str:
    """The stage to begin with so that `name` and all before it are made with the present settings."""
    return _of_other_settings(run, STAGES[: STAGES.index(name) + 1])[0]


def _refuse_to_replace(run: Run, names: Sequence[str]) -> None:
    """Keep what has taken long from being made again, in place, because a setting has changed.

    Raises:
        ConfigError: it names the settings and how to ask for it.
    """
    for name in _of_other_settings(run, names):
        stage = BY_NAME[name]
        is_unfinished = exists(_started_path(run.layout, name))
        held = stage.unfinished(run.layout) if is_unfinished else stage.finished
        if held:
            raise ConfigError(
                f"{name}: {run.layout.directory} holds {held}, made with other settings: "
                + "; ".join(_differences(run, name)),
                f"put them back{' to continue' if is_unfinished else ''}, choose another run.directory, or start over "
                f"here, which removes it: `nexus-ray run CONFIG --from {_first_of_other_settings(run, name)}`",
            )


def _refuse_stale(run: Run, name: str) -> None:
    """Refuse to go on from what an earlier stage has made with other settings.

    Raises:
        ConfigError: it names the settings.
    """
    for earlier in BY_NAME[name].after:
        path = _record_path(run.layout, earlier)
        if exists(path) and _read(path)["recipe"] != run.recipe(earlier):
            raise ConfigError(
                f"{name} would go on from what {earlier} has made with other settings: "
                + "; ".join(_differences(run, earlier)),
                "put them back, or do both again: "
                f"`nexus-ray run CONFIG --from {_first_of_other_settings(run, name)} --until {name}`",
            )


def _differences(run: Run, name: str) -> list[str]:
    """What has changed since a stage was made, in it and in those before it, by name."""
    made, now = _made(run, name), _how(run, name)
    if made is None:
        return [f"{name} is to be done again"]
    lines = differing_settings(made.get("settings", {}), now["settings"])
    for earlier, recipe in now["before"].items():
        if made.get("before", {}).get(earlier) != recipe:
            lines += _differences(run, earlier) or [f"{earlier} has been done again with other settings or data"]
    return list(dict.fromkeys(lines))


def differing_settings(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What two {dotted name: value} disagree about, in words."""
    changed = [field for field in dict.fromkeys([*old, *new]) if old.get(field) != new.get(field)]
    lines = []
    for field in changed:
        was, now = _shown(old.get(field)), _shown(new.get(field))
        is_short = max(len(was), len(now)) <= _LONGEST_SHOWN
        lines.append(f"{field} was {was} and is {now}" if is_short else f"{field} has changed")
    return lines


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


def _read(path: Place) -> dict[str, Any]:
    record: dict[str, Any] = read_json(path, what="stage record", hint=f"delete {path}")
    return record


def _record_path(layout: RunLayout, name: str) -> Place:
    return layout.stages / f"{name}.json"


def _started_path(layout: RunLayout, name: str) -> Place:
    return layout.stages / f"{name}.started.json"


def _markers(layout: RunLayout, name: str) -> tuple[Place, Place]:
    return _record_path(layout, name), _started_path(layout, name)


def _sizes(layout: RunLayout, name: str) -> dict[str, int]:
    """{path below the run directory: bytes} of a stage's outputs; -1 for one that is missing."""
    sizes: dict[str, int] = {}
    for output in BY_NAME[name].outputs(layout):
        beginning = str(output).removeprefix(str(layout.directory)).lstrip("/")
        for inside, size in _sizes_inside(output, name).items():
            sizes[f"{beginning}/{inside}" if inside else beginning] = -1 if size is None else size
    return sizes


def _sizes_inside(output: Place, name: str) -> Mapping[str, int | None]:
    """{path in a directory: bytes}, or {"": bytes} of a file; in an object store as exact names say, not a listing."""
    size = size_of(output)
    if size is not None:
        return {"": size}
    named = list(BY_NAME[name].names(output)) if is_remote(output) else []
    if named:
        return dict(zip(named, sizes_of(output / inside for inside in named), strict=True))
    if is_remote(output) or output.is_dir():
        return file_sizes(output) if exists(output) else {"": None}
    return {"": None}
