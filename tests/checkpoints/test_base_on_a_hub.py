"""A base model on a hub (`hf://owner/name`) goes through the same cache, checked against the hub's own SHA-256."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from checkpoints.fake_hub import REPOSITORY, FakeHub
from huggingface_hub import HfFileSystem, constants

from nexus_ray.checkpoints import fetching
from nexus_ray.checkpoints.fingerprint import fingerprint
from nexus_ray.checkpoints.node_cache import local_description, local_model
from nexus_ray.errors import StorageError
from nexus_ray.storage import place_of, sha256_file

URI = f"hf://{REPOSITORY}"
WEIGHTS = "model.safetensors"


@pytest.fixture
def hub(micro_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    monkeypatch.setenv("NEXUS_RAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fetching, "PIECE_BYTES", 65_536)
    with FakeHub(micro_model).running() as server:
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, server.endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        HfFileSystem.clear_instance_cache()
        yield server
        HfFileSystem.clear_instance_cache()


def test_it_is_the_same_model(hub: FakeHub, micro_model: Path) -> None:
    assert fingerprint(URI) == fingerprint(micro_model)
    described = local_description(place_of(URI))
    assert not (described / WEIGHTS).exists()
    hub.answered.clear()
    files = local_model(place_of(URI))
    assert {file.name: sha256_file(file) for file in files.iterdir()} == {
        file.name: sha256_file(file) for file in micro_model.iterdir()
    }
    assert hub.answered["tokenizer.json"] == (micro_model / "tokenizer.json").stat().st_size, "nothing is read ahead"


def test_bytes_that_the_hub_does_not_vouch_for_are_refused(hub: FakeHub, micro_model: Path) -> None:
    size = (micro_model / WEIGHTS).stat().st_size

    def damage(name: str, content: bytes) -> bytes:
        is_piece_of_weights = name == WEIGHTS and len(content) in (65_536, size % 65_536)
        return content[:-1] + bytes([content[-1] ^ 1]) if is_piece_of_weights else content

    hub.damage = damage
    with pytest.raises(StorageError, match=r"model\.safetensors twice arrived with other bytes"):
        local_model(place_of(URI))
