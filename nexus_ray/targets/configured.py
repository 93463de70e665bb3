"""How a run's targets are encoded, from its settings and the sizes of its model; nothing is loaded."""

from __future__ import annotations

from nexus_ray.config import Config
from nexus_ray.errors import ConfigError
from nexus_ray.families import MoeDimensions
from nexus_ray.targets.encoding.encodings import HiddenEncoding, OutputEncoding, SampledEncoding
from nexus_ray.targets.encoding.routers import RouterEncoding
from nexus_ray.targets.encoding.top_k import TopKEncoding


def sources_with(config: Config, term: str) -> frozenset[str]:
    """Sources whose stored targets a term of the loss needs; none in online training."""
    if config.train.mode == "online":
        return frozenset()
    return frozenset(name for name, section in config.train.sources.items() if getattr(section, term))


def output_encoding(config: Config, *, vocabulary: int, hidden_size: int) -> OutputEncoding:
    """The encoding of next-token distributions, for a run that stores them.

    Raises:
        ConfigError: more tokens are to be kept than the vocabulary has.
    """
    section, temperature = config.targets, config.train.output_temperature.constant
    if section.mode == "hidden":
        return HiddenEncoding(hidden_size=hidden_size, dtype=section.hidden_dtype)
    assert temperature is not None  # the configuration refuses one that changes
    if section.mode == "sampled":
        return SampledEncoding(draws=section.draws, vocabulary=vocabulary, temperature=temperature)
    if section.top_k > vocabulary:
        raise ConfigError(
            f"targets.top_k={section.top_k} is more than the model's vocabulary of {vocabulary} tokens",
            "lower it; 64 is the default",
        )
    return TopKEncoding(k=section.top_k, vocabulary=vocabulary, value_bits=section.value_bits, temperature=temperature)


def router_encoding(config: Config, dimensions: MoeDimensions) -> RouterEncoding:
    """The encoding of routers, for a run that stores them.

    Raises:
        ConfigError: a layer is asked for that the model does not have.
    """
    section = config.targets
    layers = section.router_layers or tuple(range(dimensions.layers))
    if layers[-1] >= dimensions.layers:
        raise ConfigError(
            f"targets.router_layers names layer {layers[-1]}, the model has layers 0 to {dimensions.layers - 1}",
            "leave out layers that the model does not have",
        )
    assert section.router != "none"  # the configuration refuses it where a source has router_kl
    return RouterEncoding(
        mode=section.router,
        layers=layers,
        every=section.router_every,
        experts=dimensions.experts,
        experts_per_token=dimensions.experts_per_token,
        temperature=config.train.router_temperature.constant if section.router == "selected" else None,
    )
