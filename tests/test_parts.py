"""Parts of an interrupted stage: kept for the same recipe, discarded for another, no leftovers."""

from nexus_ray.data.sources import Shard
from nexus_ray.parts import Parts
from nexus_ray.storage import write_text

SHARDS = [Shard(index, "play", "play.jsonl", index * 10, index * 10 + 10) for index in range(3)]


def begun(directory, recipe="first") -> Parts:
    parts = Parts(directory / "stage.partial", ".json")
    parts.begin(recipe)
    return parts


def test_done_parts_are_not_missing_after_a_restart(tmp_path):
    write_text(begun(tmp_path).path(SHARDS[1]), "{}")
    assert begun(tmp_path).missing(SHARDS) == [SHARDS[0], SHARDS[2]]


def test_another_recipe_starts_over(tmp_path):
    write_text(begun(tmp_path).path(SHARDS[1]), "{}")
    assert begun(tmp_path, "second").missing(SHARDS) == SHARDS


def test_a_directory_without_a_recipe_is_not_trusted(tmp_path):
    parts = Parts(tmp_path / "stage.partial", ".json")
    write_text(parts.path(SHARDS[0]), "{}")
    parts.begin("first")
    assert parts.missing(SHARDS) == SHARDS


def test_what_a_killed_worker_left_is_removed(tmp_path):
    parts = begun(tmp_path)
    leftover = parts.directory / ".shard-00001.json.0123abcd.partial"
    leftover.write_text("half")
    write_text(parts.path(SHARDS[0]), "{}")
    begun(tmp_path)
    assert not leftover.exists()
    assert parts.path(SHARDS[0]).exists()


def test_nothing_is_left_of_parts_that_are_discarded(tmp_path):
    parts = begun(tmp_path)
    write_text(parts.path(SHARDS[0]), "{}")
    parts.discard()
    assert list(tmp_path.iterdir()) == []
    parts.discard()
