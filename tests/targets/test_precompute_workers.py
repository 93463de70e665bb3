"""Precompute on Ray: any number of workers leaves the same files, and progress ends with all tokens."""

from __future__ import annotations

import logging

import pytest
from precompute_here import contents

from nexus_ray.layout import RunLayout
from nexus_ray.targets.writing.precompute import precompute_run

pytestmark = pytest.mark.ray


@pytest.mark.usefixtures("ray_session")
def test_one_and_two_workers_write_the_same_files(make_micro_config, tmp_path, caplog) -> None:
    found = {}
    for workers in (1, 2):
        config = make_micro_config(
            tmp_path / str(workers),
            **{
                "resources.workers": workers,
                "targets.mode": "sampled",
                "train.sources.play.router_kl": 1.0,
                "data.shard_bytes": 8192,
            },
        )
        layout = RunLayout(config.run.directory)
        with caplog.at_level(logging.INFO):
            manifest = precompute_run(config, layout)
        found[workers] = contents(layout.targets)
        assert {file.source for file in manifest.files} == {"play", "prose"}
    assert found[1] == found[2]
    said = [record.message for record in caplog.records]
    for name in ("play", "prose"):
        [line] = {message for message in said if message.startswith(f"targets of {name}: ")}
        tokens = sum(file.tokens for file in manifest.files if file.source == name)
        assert f" sequences, {tokens:,} tokens in " in line
        assert line.endswith(" bytes/token")
    assert any(message.endswith(" tokens/s") and message.startswith("targets: ") for message in said)
