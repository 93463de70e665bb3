"""A place is a local path or a URI; configurations take both and give back the text they were given."""

import pickle
from pathlib import Path

import pytest
from pydantic import BaseModel, ConfigDict, ValidationError

from nexus_ray.storage import PlaceField, is_remote, place_of


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    directory: PlaceField


def test_a_path_without_a_scheme_is_local() -> None:
    assert place_of("runs/demo") == Path("runs/demo")
    assert not is_remote(place_of("runs/demo"))
    assert place_of("file:///tmp/run") == Path("/tmp/run")


def test_a_uri_is_remote_and_no_path_of_the_operating_system() -> None:
    place = place_of("memory://bucket/run")
    assert is_remote(place)
    assert str(place / "selection.json") == "memory://bucket/run/selection.json"
    with pytest.raises(TypeError, match=r"os\.PathLike"):
        open(place)  # noqa: PTH123, SIM115


@pytest.mark.parametrize("text", ["runs/demo", "memory://bucket/run", "s3://bucket/run"])
def test_a_field_is_dumped_as_it_was_written(text: str) -> None:
    section = _Section(directory=text)
    assert section.model_dump(mode="json") == {"directory": text}
    assert str(pickle.loads(pickle.dumps(section)).directory) == text


@pytest.mark.parametrize(
    ("text", "said"),
    [("nowhere://a/b", "nowhere"), ("no-where://a/b", "no-where"), ("abfs://box/run", "nexus-ray\\[azure\\]")],
)
def test_a_uri_that_nothing_opens_says_what_to_install(text: str, said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        _Section(directory=text)
