"""The sections of a configuration, one a concern (training and serving apart): every field, its default and meaning.

`nexus-ray config CONFIG` prints the descriptions.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, StringConstraints, field_validator, model_validator

from nexus_ray.config.base import Section
from nexus_ray.config.training import OptimiserSection
from nexus_ray.storage import PlaceField

Initialisation = Annotated[
    str,
    StringConstraints(
        pattern=r"^(top1_zero|zero|random|top1|top1_average|top4_average|lstsq|(pca|reap|aligned)_top(K|[1-9]\d*))$"
    ),
]
Predict = Literal["all", "assistant"]
Attention = Literal["sequence", "document"]
_MIXTURE_TOLERANCE = 1e-6


class RunSection(Section):
    """Where a run keeps its artefacts, and the seed of everything random in it."""

    directory: PlaceField = Field(description="run directory or URI; every artefact of the run lives below it")
    seed: int = Field(0, ge=0, description="seed of sampling, initialisation and data order")


class ModelSection(Section):
    """The frozen base model."""

    path: PlaceField = Field(
        description="Hugging Face directory of the base model (GPT-OSS layout): local, or a URI such as "
        "s3://bucket/gpt-oss-20b, which each node that loads it fetches once"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="compute type of the base; auto: bfloat16 on a GPU, float32 on a CPU"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: a GPU when Ray gives the worker one")
    experts: Literal["packed", "grouped_mm", "eager", "batched_mm"] = Field(
        "packed",
        description="packed: routed experts as stored, MXFP4 stays 4-bit in memory; "
        "else dequantised, computed by the transformers implementation of that name",
    )
    attention: Attention = Field(
        "sequence",
        description="what a token of a packed sequence attends to: sequence: all before it; document: only its own "
        "document, whose positions start at 0",
    )


class SourceSection(Section):
    """One body of text: its training files and its held-out files, which no stage before evaluate opens."""

    train: tuple[str, ...] = Field(
        description="files, globs or URIs of .jsonl, .txt or .parquet; directories of datasets' save_to_disk; "
        "datasets://NAME?config=CONFIG&split=SPLIT"
    )
    heldout: tuple[str, ...] = Field((), description="the same, for text that only `evaluate` reads")
    role: Literal["domain", "retention"] = Field(
        "domain", description="domain: what to learn; retention: what must not get worse"
    )
    text_field: str | None = Field(
        None,
        min_length=1,
        description="field of a row that holds the text, before all forms that rows are known by; "
        "default: a conversation in one of the usual forms, else `text`",
    )
    predict: Predict = Field(
        "all",
        description="which tokens losses and perplexity count: all; assistant: of conversations only what the "
        "assistant wrote (plain text counts whole)",
    )

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
    strict: bool = Field(
        False, description="fail at the first row that cannot be read; else such rows are left out and counted"
    )


class ResourcesSection(Section):
    """What Ray gives to each worker of a stage."""

    workers: int = Field(2, ge=1, description="workers of a stage")
    min_workers: int | None = Field(
        None,
        ge=1,
        description="a pool over text starts with as many and grows to `workers`; training makes do with as many; "
        "default: all at once",
    )
    cpus_per_worker: int = Field(1, ge=1, description="CPU cores, and torch threads, of a worker")
    gpus_per_worker: float = Field(0, ge=0, description="GPUs of a worker; 0 runs on CPU")
    memory_gib_per_worker: float | None = Field(None, gt=0, description="memory that Ray reserves for a worker")
    max_failures: int = Field(2, ge=0, description="worker crashes that training recovers from by itself")

    @model_validator(mode="after")
    def _pool_can_grow(self) -> Self:
        if self.min_workers is not None and self.min_workers > self.workers:
            raise ValueError(f"min_workers ({self.min_workers}) is more than workers ({self.workers})")
        return self


class CollectSection(Section):
    """Router statistics: on which text, and what is recorded."""

    tokens: int = Field(
        196_608, ge=1, description="calibration tokens of all sources together (whole sequences, rounded up)"
    )
    mixture: dict[str, Annotated[float, Field(gt=0, le=1)]] | None = Field(
        None, description="share of the tokens that each source gives; default: equal shares of all sources"
    )
    sampling: Literal["coverage", "random"] = Field(
        "coverage", description="coverage: the sequences that cover the vocabulary best; random: any"
    )
    candidates: int = Field(8, ge=1, description="sequences tokenised for each one chosen")
    batch_sequences: int = Field(8, ge=1, description="sequences of one forward pass")
    unit_batches: int = Field(4, ge=1, description="batches of a unit of work, the most that a killed worker loses")
    expert_norms: bool = Field(True, description="record what REAP needs: gate x output norm (packed experts only)")
    export_probabilities: int = Field(
        0, ge=0, description="tokens whose router probabilities are written to router_probs.npz, for other tools"
    )

    @model_validator(mode="after")
    def _mixture_is_whole(self) -> Self:
        if self.mixture is not None and abs(sum(self.mixture.values()) - 1) > _MIXTURE_TOLERANCE:
            total = round(sum(self.mixture.values()), 6)
            raise ValueError(f"mixture: the shares add up to {total}, not to 1")
        return self


class SelectSection(Section):
    """Which experts matter in each layer."""

    method: Literal["pca", "pca_variance", "usage", "gate_mass", "reap"] = Field(
        "pca",
        description="pca: the reference formula; pca_variance: variance in the leading components; usage: selection "
        "count; gate_mass: sum of gate weights; reap: mean of gate x output norm over the tokens an expert gets "
        "(needs packed experts)",
    )
    top_k: int = Field(8, ge=1, description="experts selected per layer, unless coverage is set")
    coverage: float | None = Field(
        None, gt=0, le=1, description="select as few experts of each layer as have this share of its score"
    )
    max_correlation: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="pass over an expert whose router probability is correlated more than this with a better one's; "
        "default: none is passed over",
    )
    components: int = Field(20, ge=1, description="principal components in the pca and pca_variance scores")
    sources: tuple[str, ...] | None = Field(None, description="sources whose statistics count; default: the domain")


class ConvertSection(Section):
    """How the shared expert starts."""

    initialisation: Initialisation = Field(
        "top1_zero",
        description="top1_zero: the most used expert with its down projection zeroed; zero; random; top1; "
        "top1_average; top4_average; mean of the K selected in a layer, or of the best 24: pca_topK, pca_top24 "
        "(by select.method), reap_topK (by REAP), aligned_topK (neurons matched first); lstsq: the most used "
        "expert, its down projection fitted to the routed output (use with scale=0.1)",
    )
    token_gate: bool = Field(True, description="a one-logit sigmoid gate per token on the shared expert's output")
    scale: float = Field(1.0, gt=0, description="output scale of the shared expert")
    learn_scale: bool = Field(False, description="train the output scale too")
    width: int | None = Field(
        None,
        ge=1,
        description="intermediate size; default: the routed experts'. Smaller keeps the neurons of largest norm, "
        "larger adds neurons without output",
    )
    dtype: Literal["bfloat16", "float32"] = Field("bfloat16", description="storage type of the overlay's tensors")
    shard_bytes: int = Field(5_000_000_000, ge=1, description="most bytes of one file of the initial overlay")
    calibration_sequences: int = Field(
        16, ge=1, description="calibration sequences of the domain that lstsq fits to, in one forward pass"
    )
    ridge: float = Field(1e-3, gt=0, description="penalty of lstsq, as a share of the features' mean variance")


class TargetsSection(Section):
    """Teacher targets: packed sequences with what the base model says about them, for offline training."""

    mode: Literal["topk", "sampled", "hidden", "none"] = Field(
        "topk",
        description="of next-token distributions: topk: the top_k most likely tokens and the mass of the rest; "
        "sampled: draws, unbiased, smallest; hidden: final hidden states, exact, largest; none: tokens only",
    )
    top_k: int = Field(64, ge=1, description="topk: tokens kept at a position; the rest is one tail mass")
    value_bits: int = Field(4, ge=2, le=16, description="topk: bits of a log-probability")
    draws: int = Field(12, ge=1, le=65_535, description="sampled: draws at a position")
    hidden_dtype: Literal["bfloat16", "float8"] = Field(
        "bfloat16", description="hidden: stored type; float8 is e4m3 with a scale a position"
    )
    router: Literal["none", "selected", "logits"] = Field(
        "logits",
        description="of routers, where a source has router_kl: logits: all, in 8 bits; selected: the chosen experts "
        "and the mass of the rest, smaller",
    )
    router_layers: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(
        None, min_length=1, description="layers whose routers are stored, from 0; default: all (online: always all)"
    )
    router_every: int = Field(1, ge=1, description="store routers of every n-th position only (online: all)")
    max_tokens: int | None = Field(
        None, ge=1, description="tokens wanted of each source, in whole shards; default: all of its text"
    )
    batch_sequences: int = Field(8, ge=1, description="sequences of one forward pass")

    @field_validator("router_layers")
    @classmethod
    def _layers_once(cls, layers: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if layers is not None and list(layers) != sorted(set(layers)):
            raise ValueError("list every layer once, in ascending order")
        return layers


class ContinuationsSection(Section):
    """Texts that base and student continue side by side, greedily, to be read."""

    prompts: tuple[str, ...] = Field((), description="beginnings of text of your own, before those of the sources")
    per_source: int = Field(1, ge=0, description="held-out documents of each source whose beginnings are continued")
    prompt_tokens: int = Field(32, ge=1, description="tokens of such a beginning")
    tokens: int = Field(48, ge=1, description="tokens of each continuation at most, the most likely ones")


class LmEvalSection(Section):
    """Tasks of lm-eval, with base and student (pip install 'nexus-ray[eval]')."""

    tasks: tuple[str, ...] = Field(min_length=1, description="names of tasks or groups, as lm-eval lists them")
    include_path: Path | None = Field(None, description="directory with task files (YAML) of your own")
    limit: int | None = Field(None, ge=1, description="documents of each task, from its beginning; default: all")
    num_fewshot: int | None = Field(None, ge=0, description="examples in the prompt; default: as each task says")
    max_length: int | None = Field(
        None, ge=2, description="tokens that a prompt or window has at most; default: the model's context, at most 4096"
    )


class EvaluateSection(Section):
    """Base against student on held-out text."""

    windows: Literal["packed", "rolling"] = Field(
        "packed",
        description="packed: documents joined and cut into sequences, as in training; rolling: each document on its "
        "own in windows of data.sequence_length, as lm-eval's rolling log-likelihood",
    )
    stride: int | None = Field(
        None,
        ge=1,
        description="tokens that a rolling window scores after the first, each with at least data.sequence_length - "
        "stride + 1 tokens before it; default: data.sequence_length, windows that overlap by one token",
    )
    batch_sequences: int = Field(8, ge=1, description="sequences or windows of one forward pass")
    max_sequences_per_source: int | None = Field(
        None, ge=2, description="packed sequences, or documents in rolling windows; default: all held-out text"
    )
    bootstrap_samples: int = Field(2000, ge=100)
    confidence: float = Field(0.95, gt=0, lt=1)
    samples: ContinuationsSection = ContinuationsSection()
    lm_eval: LmEvalSection | None = None

    @model_validator(mode="after")
    def _stride_is_of_rolling_windows(self) -> Self:
        if self.stride is not None and self.windows != "rolling":
            raise ValueError("stride is of rolling windows: set evaluate.windows=rolling, or leave stride out")
        return self


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
