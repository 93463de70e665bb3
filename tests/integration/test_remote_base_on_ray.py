"""Workers on Ray with the base model in an object store make what they make from a local copy, and fetch it once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from object_store import BUCKET, ObjectStore

from nexus_ray.config import Config
from nexus_ray.layout import RunLayout
from nexus_ray.pipeline import run_pipeline
from nexus_ray.storage import place_of, sha256_file


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_statistics_are_the_same_bytes(
    ray_session: None,
    object_store: ObjectStore,
    make_micro_config: Callable[..., Config],
    micro_model: Path,
    tmp_path: Path,
) -> None:
    for file in micro_model.iterdir():
        object_store.client().put_object(Bucket=BUCKET, Key=f"bases/micro/{file.name}", Body=file.read_bytes())
    hashes = []
    for name, base in (("local", str(micro_model)), ("remote", f"s3://{BUCKET}/bases/micro")):
        config = make_micro_config(tmp_path / name)
        config = config.model_copy(update={"model": config.model.model_copy(update={"path": place_of(base)})})
        object_store.requests.clear()
        run_pipeline(config, last="collect")
        hashes.append(sha256_file(RunLayout(config.run.directory).router_stats))
    assert hashes[0] == hashes[1]
    gets = [
        one for one in object_store.requests if one.path.endswith("/generation_config.json") and one.method == "GET"
    ]
    assert len(gets) == 2  # for the description that tokenises, and for the model that computes, by two workers
