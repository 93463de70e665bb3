"""Reading a configuration: a YAML file and dotted overrides, validated, with the origin of every value."""

from __future__ import annotations

import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from nexus_ray.config.base import Section
from nexus_ray.config.schema import Config, nearest
from nexus_ray.errors import ConfigError
from nexus_ray.storage import Place, write_text

SectionT = TypeVar("SectionT", bound=Section)


@dataclass(frozen=True)
class Resolved(Generic[SectionT]):
    """A validated configuration and, for each dotted field, where its value came from."""

    config: SectionT
    origins: dict[str, str]


def resolve_config(path: Path, overrides: typing.Sequence[str], schema: type[SectionT]) -> Resolved[SectionT]:
    """Read a YAML file, apply `section.field=value` overrides, validate.

    Raises:
        ConfigError: the file cannot be read, is not YAML, or a field is unknown or has a wrong value.
    """
    values = _read_yaml(path)
    origins = dict.fromkeys(flatten_values(values), str(path))
    for override in overrides:
        dotted, value = _parse_override(override)
        _set_dotted(values, dotted, value, override)
        origins |= dict.fromkeys(flatten_values({dotted: value}), f"override {override}")
    try:
        config = schema.model_validate(values)
    except ValidationError as error:
        raise ConfigError(
            f"{path}: " + _explain(error, schema),
            "`nexus-ray config configs/demo.yaml` shows every field and its default",
        ) from error
    return Resolved(
        config, {key: origins.get(key, "default") for key in flatten_values(config.model_dump(mode="json"))}
    )


def load_config(path: Path, overrides: typing.Sequence[str] = ()) -> Config:
    """`resolve_config` of a `Config`, without the origins."""
    return resolve_config(path, overrides, Config).config


def save_config(config: Section, path: Place) -> None:
    """Write the resolved configuration as YAML; `load_config` reads it back to an equal value."""
    write_text(path, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))


def flatten(config: Section) -> dict[str, Any]:
    """All fields as {dotted name: value}."""
    return flatten_values(config.model_dump(mode="json"))


def describe_field(schema: type[BaseModel], dotted: str) -> str:
    """What the field with this dotted name means; empty where its name says it."""
    section, description = schema, ""
    for part in dotted.split("."):
        field = section.model_fields.get(part)
        if field is not None:  # else a key of a dictionary, such as a source's name
            description = field.description or ""
            section = _section_in(field.annotation) or section
    return description


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"no configuration file at {path}", "try configs/demo.yaml") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold sections such as `model:`, found {type(values).__name__}")
    return values


def _parse_override(override: str) -> tuple[str, Any]:
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise ConfigError(f"override {override!r} is not of the form section.field=value", "e.g. train.steps=320")
    try:
        return dotted, yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not valid YAML: {error}") from error


def _set_dotted(values: dict[str, Any], dotted: str, value: Any, override: str) -> None:
    *sections, field = dotted.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise ConfigError(f"override {override!r}: {section!r} is a value, not a section")
    values[field] = value


def flatten_values(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values as {dotted name: value}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= flatten_values(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _explain(error: ValidationError, schema: type[BaseModel]) -> str:
    lines = []
    for problem in error.errors():
        location = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            *parents, name = (str(part) for part in problem["loc"])
            lines.append(f"unknown field {location!r}{nearest(name, _fields_at(schema, parents))}")
        elif problem["type"] == "missing":
            lines.append(f"{location} is required")
        else:
            found = "" if isinstance(problem["input"], dict) else f" (found {problem['input']!r})"
            message = problem["msg"].removeprefix("Value error, ")
            lines.append(f"{location}: {message}{found}" if location else message)
    return "; ".join(lines)


def _fields_at(schema: type[BaseModel], parents: list[str]) -> list[str]:
    """Field names of the section that the path `parents` leads to."""
    for parent in parents:
        field = schema.model_fields.get(parent)
        schema = _section_in(field.annotation if field else None) or schema
    return list(schema.model_fields)


def _section_in(annotation: Any) -> type[BaseModel] | None:
    """The section class in an annotation such as `Section`, `Section | None` or `dict[str, Section]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in typing.get_args(annotation) if (found := _section_in(part))), None)
