"""The run configuration: one YAML file, validated, with dotted overrides.

Every field has a default or is required; unknown keys are refused with the nearest valid name. `load_config`
remembers where each value came from, which `nexus-ray config` prints.
"""

from __future__ import annotations

import difflib
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, Self, TypeVar

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    field_validator,
    model_validator,
)

from nexus_ray.errors import ConfigError
from nexus_ray.storage import write_text

Initialisation = Annotated[
    str,
    StringConstraints(pattern=r"^(top1_zero|zero|random|top1|top1_average|top4_average|pca_top(K|[1-9]\d*))$"),
]
STAGES = ("collect", "select", "convert", "precompute", "train", "evaluate")


class Section(BaseModel):
    """Base of every section: unknown fields are errors, values cannot be changed after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class RunSection(Section):
    """Where a run keeps its artefacts, and the seed of everything random in it."""

    directory: Path = Field(description="run directory; every artefact of the run lives below it")
    seed: int = Field(0, ge=0, description="seed of sampling, initialisation and data order")


class ModelSection(Section):
    """The frozen base model."""

    path: Path = Field(description="Hugging Face directory of the base model (GPT-OSS layout)")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="compute type of the base; auto: bfloat16 on a GPU, float32 on a CPU"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: a GPU when Ray gives the worker one")
    experts_implementation: Literal["grouped_mm", "eager", "batched_mm"] = Field(
        "grouped_mm", description="how transformers computes the routed experts"
    )


class SourceSection(Section):
    """One body of text: its training files and its held-out files, which no stage before evaluate opens."""

    train: tuple[str, ...] = Field(description="files, globs or URIs of .jsonl, .txt or .parquet")
    heldout: tuple[str, ...] = Field((), description="files that only `evaluate` reads")
    role: Literal["domain", "retention"] = Field(
        "domain", description="domain: what to learn; retention: what must not get worse"
    )
    text_field: str = Field("text", description="field that holds the text in .jsonl and .parquet rows")

    @field_validator("train", "heldout", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value


class DataSection(Section):
    """Text and how it is packed into sequences."""

    sources: dict[str, SourceSection] = Field(description="named text sources", min_length=1)
    sequence_length: int = Field(512, ge=8, description="tokens of a packed sequence")
    shard_bytes: int = Field(
        1 << 20,
        ge=1024,
        description="bytes of text a unit of parallel work; one Parquet file of targets each",
    )


class ResourcesSection(Section):
    """What Ray gives to each worker of a stage."""

    workers: int = Field(2, ge=1, description="workers of a stage")
    cpus_per_worker: int = Field(1, ge=1, description="CPU cores, and torch threads, of a worker")
    gpus_per_worker: float = Field(0, ge=0, description="GPUs of a worker; 0 runs on CPU")
    memory_gib_per_worker: float | None = Field(None, gt=0, description="memory that Ray reserves for a worker")
    max_failures: int = Field(2, ge=0, description="worker crashes that training recovers from by itself")


class CollectSection(Section):
    """Router statistics."""

    tokens_per_source: int = Field(
        65_536, ge=1, description="calibration tokens of each source (whole sequences, rounded up per shard)"
    )
    batch_sequences: int = Field(8, ge=1, description="sequences of one forward pass")


class SelectSection(Section):
    """Which experts matter in each layer."""

    method: Literal["pca", "usage"] = Field("pca", description="pca: the reference formula; usage: selection count")
    top_k: int = Field(8, ge=1, description="experts kept per layer")
    components: int = Field(20, ge=1, description="principal components in the pca score")
    sources: tuple[str, ...] | None = Field(None, description="sources whose statistics count; default: the domain")


class ConvertSection(Section):
    """How the shared expert starts."""

    initialisation: Initialisation = Field(
        "top1_zero",
        description="top1_zero: the most used expert with its down projection zeroed; zero; random; top1; "
        "top1_average; top4_average; pca_topK (K = select.top_k) or pca_top24",
    )
    token_gate: bool = Field(True, description="a one-logit sigmoid gate per token on the shared expert's output")
    scale: float = Field(1.0, gt=0, description="output scale of the shared expert")
    learn_scale: bool = Field(False, description="train the output scale too")
    width: int | None = Field(
        None, ge=1, description="intermediate size; default: the routed experts' (zero, random only)"
    )


class TargetsSection(Section):
    """Teacher targets: packed sequences with the base model's top-K log-probabilities."""

    top_k: int = Field(64, ge=1, description="log-probabilities kept per token; the rest is one tail mass")
    batch_sequences: int = Field(8, ge=1, description="sequences of one forward pass")


class TrainSourceSection(Section):
    """How one source enters the loss."""

    sequences_per_step: int = Field(ge=1, description="sequences of this source in each global batch")
    cross_entropy: float = Field(0.0, ge=0, description="weight of next-token cross-entropy")
    output_kl: float = Field(0.0, ge=0, description="weight of KL(teacher || student) on next-token distributions")
    router_kl: float = Field(0.0, ge=0, description="weight of KL(teacher || student) on router distributions")


class ScheduleSection(Section):
    """Learning-rate schedule, in fractions of the run."""

    warmup: float = Field(0.05, ge=0, le=1, description="fraction of steps of linear warm-up")
    decay: float = Field(0.5, ge=0, le=1, description="fraction of steps of decay at the end; the rest is stable")
    shape: Literal["cosine", "linear"] = Field("cosine", description="shape of the decay")
    floor: float = Field(0.1, ge=0, le=1, description="learning rate at the end, as a fraction of the peak")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.warmup + self.decay > 1:
            raise ValueError("warmup + decay must be at most 1")
        return self


class OptimiserSection(Section):
    """AdamW and its schedule."""

    learning_rate: float = Field(1e-2, gt=0)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0)
    clip_norm: float = Field(1.0, gt=0, description="largest global gradient norm")
    schedule: ScheduleSection = ScheduleSection()


class TrainSection(Section):
    """Distillation of the shared experts."""

    mode: Literal["offline", "online"] = Field(
        "offline",
        description="offline: stored targets; online: the same model with shared experts off, on the fly",
    )
    steps: int = Field(160, ge=1, description="optimiser steps")
    sources: dict[str, TrainSourceSection] = Field(description="what each source contributes", min_length=1)
    micro_batch_sequences: int = Field(8, ge=1, description="sequences of one forward pass on one worker")
    optimiser: OptimiserSection = OptimiserSection()
    router_temperature: float = Field(1.0, gt=0, description="temperature of the router KL")
    validation_sequences: int = Field(
        16, ge=1, description="sequences of each source kept out of training to choose the best checkpoint"
    )
    validate_every: int = Field(40, ge=1, description="steps between validations")
    checkpoint_every: int = Field(40, ge=1, description="steps between checkpoints")
    keep_checkpoints: int = Field(2, ge=1, description="recovery checkpoints kept")


class EvaluateSection(Section):
    """Base against student on held-out text."""

    batch_sequences: int = Field(8, ge=1)
    max_sequences_per_source: int | None = Field(None, ge=2, description="default: all held-out text")
    bootstrap_samples: int = Field(2000, ge=100)
    confidence: float = Field(0.95, gt=0, lt=1)


class ServeSection(Section):
    """The HTTP service."""

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=1, le=65535)
    name: str | None = Field(None, description="student's model id; default: the run directory's name")
    replicas: int = Field(1, ge=1)
    max_new_tokens: int = Field(512, ge=1, description="largest max_tokens a request may ask for")
    max_concurrent_requests: int = Field(16, ge=1)


class ArchitectureSection(Section):
    """Shape of a model trained from scratch (GPT-OSS architecture)."""

    layers: int = Field(6, ge=1)
    hidden_size: int = Field(192, ge=32, multiple_of=32)
    intermediate_size: int = Field(192, ge=32, multiple_of=32)
    experts: int = Field(16, ge=1)
    experts_per_token: int = Field(4, ge=1)
    head_dim: int = Field(32, ge=8, multiple_of=2)
    attention_heads: int = Field(6, ge=1)
    key_value_heads: int = Field(2, ge=1)
    sliding_window: int = Field(128, ge=1)
    max_position_embeddings: int = Field(2048, ge=16)
    rope_theta: float = Field(150_000.0, gt=0)
    rope_factor: float = Field(4.0, ge=1, description="YaRN factor; original context = max_position / factor")


class PretrainSection(Section):
    """A small MoE trained from scratch: how the embedded model was made."""

    tokenizer: Path = Field(description="directory of the tokenizer to train with")
    output: Path = Field(description="where the Hugging Face directory is written")
    architecture: ArchitectureSection = ArchitectureSection()
    steps: int = Field(2500, ge=1)
    sequences_per_step: int = Field(16, ge=1)
    micro_batch_sequences: int = Field(16, ge=1)
    optimiser: OptimiserSection = OptimiserSection(learning_rate=2e-3, weight_decay=0.1)
    load_balancing: float = Field(0.01, ge=0, description="coefficient of the load-balancing loss")
    validate_every: int = Field(100, ge=1)
    validation_sequences: int = Field(64, ge=1)
    checkpoint_every: int = Field(100, ge=1)
    keep_checkpoints: int = Field(1, ge=1)
    prompts: tuple[str, ...] = Field((), description="texts continued at each validation")


class Config(Section):
    """A run: base model, text, and one section a stage."""

    run: RunSection
    model: ModelSection
    data: DataSection
    resources: ResourcesSection = ResourcesSection()
    collect: CollectSection = CollectSection()
    select: SelectSection = SelectSection()
    convert: ConvertSection = ConvertSection()
    targets: TargetsSection = TargetsSection()
    train: TrainSection
    evaluate: EvaluateSection = EvaluateSection()
    serve: ServeSection = ServeSection()

    @model_validator(mode="after")
    def _sources_exist(self) -> Self:
        _require_known(self.train.sources, self.data.sources, "train.sources")
        _require_known(self.select.sources or (), self.data.sources, "select.sources")
        if not any(source.role == "domain" for source in self.data.sources.values()):
            raise ValueError("data.sources needs at least one source with role: domain")
        return self


class PretrainRun(Section):
    """A pretraining run: text, architecture and optimiser, no base model."""

    run: RunSection
    data: DataSection
    resources: ResourcesSection = ResourcesSection()
    pretrain: PretrainSection


def _require_known(names: typing.Iterable[str], known: typing.Collection[str], field: str) -> None:
    for name in names:
        if name not in known:
            raise ValueError(f"{field}: there is no source {name!r} in data.sources{_nearest(name, known)}")


def _nearest(name: str, known: typing.Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"


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
    origins = dict.fromkeys(_flatten(values), str(path))
    for override in overrides:
        dotted, value = _parse_override(override)
        _set_dotted(values, dotted, value, override)
        origins |= dict.fromkeys(_flatten({dotted: value}), f"override {override}")
    try:
        config = schema.model_validate(values)
    except ValidationError as error:
        raise ConfigError(
            f"{path}: " + _explain(error, schema),
            "`nexus-ray config configs/demo.yaml` shows every field and its default",
        ) from error
    return Resolved(config, {key: origins.get(key, "default") for key in _flatten(config.model_dump(mode="json"))})


def load_config(path: Path, overrides: typing.Sequence[str] = ()) -> Config:
    """`resolve_config` of a `Config`, without the origins."""
    return resolve_config(path, overrides, Config).config


def save_config(config: Section, path: Path) -> None:
    """Write the resolved configuration as YAML; `load_config` reads it back to an equal value."""
    write_text(path, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))


def flatten(config: Section) -> dict[str, Any]:
    """All fields as {dotted name: value}."""
    return _flatten(config.model_dump(mode="json"))


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


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _explain(error: ValidationError, schema: type[BaseModel]) -> str:
    lines = []
    for problem in error.errors():
        location = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            *parents, name = (str(part) for part in problem["loc"])
            lines.append(f"unknown field {location!r}{_nearest(name, _fields_at(schema, parents))}")
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
