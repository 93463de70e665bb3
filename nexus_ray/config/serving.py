"""The section of a configuration that is about the HTTP service."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from nexus_ray.config.base import Section
from nexus_ray.storage import PlaceField


class ServeSection(Section):
    """The HTTP service."""

    host: str = Field("127.0.0.1", description="address to listen on; the default is reached from this machine only")
    port: int = Field(8000, ge=1, le=65535)
    name: str | None = Field(None, description="student's model id; default: the run directory's name")
    overlays: dict[str, PlaceField] = Field({}, description="further students: overlays, paths or URIs, by model id")
    replicas: int = Field(1, ge=1, description="replicas, each with its own copy of the base, at the start at least")
    max_replicas: int | None = Field(None, ge=1, description="with more load Ray Serve starts up to as many")
    target_ongoing_requests: float = Field(16, gt=0, description="requests of a replica that autoscaling aims at")
    max_new_tokens: int = Field(512, ge=1, description="largest max_tokens a request may ask for")
    max_concurrent_requests: int = Field(
        64, ge=1, description="requests that a replica works on or holds; more get 429 and Retry-After"
    )
    batch_requests: int = Field(32, ge=1, description="requests that generate in one forward pass")
    batch_tokens: int = Field(512, ge=16, description="tokens of one forward pass; longer prompts take several")
    window_tokens: int = Field(8192, ge=16, description="tokens of one window of text that is scored, at most")
    cache_tokens: int = Field(65_536, ge=256, description="tokens of all requests together in the key-value cache")
    max_body_bytes: int = Field(4 << 20, ge=1024, description="larger requests get 413")
    request_timeout_s: float = Field(600, gt=0, description="a request that takes longer is ended")
    stuck_seconds: float = Field(300, gt=0, description="a replica whose forward pass takes longer is replaced")
    drain_seconds: float = Field(60, ge=0, description="time that running requests get when a replica is stopped")
    api_keys: Path | None = Field(
        None,
        description="file of `NAME:SHA256-OF-KEY` lines, see `nexus-ray api-key`; clients then need a "
        "key. The variable NEXUS_RAY_API_KEYS holds such lines too",
    )
    log_text: bool = Field(False, description="write prompts and answers into the access log")

    @model_validator(mode="after")
    def _replicas_can_grow(self) -> Self:
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ValueError(f"max_replicas ({self.max_replicas}) is less than replicas ({self.replicas})")
        return self
