"""What the chaos benchmark kills and when, and that it sees a difference of one byte."""

import random

import pytest

from nexus_ray.layout import RunLayout
from nexus_ray.storage import write_text


@pytest.fixture(scope="module")
def kills(script):
    """The module that draws and does them."""
    return script("_chaos")


COUNTS = {"node": 1, "process": 2, "driver": 0}


def test_each_stage_gets_its_kills_at_moments_that_the_seed_decides(kills):
    drawn = kills.draw_kills(["collect", "precompute", "train"], COUNTS, random.Random(0))
    assert [kill.stage for kill in drawn] == ["collect"] * 3 + ["precompute"] * 3 + ["train"] * 3
    for stage in ("collect", "precompute", "train"):
        mine = [kill for kill in drawn if kill.stage == stage]
        assert sorted(kill.kind for kill in mine) == ["node", "process", "process"]
        assert [kill.share for kill in mine] == sorted(kill.share for kill in mine)
        assert all(0 <= kill.share < 1 for kill in mine)
    assert drawn == kills.draw_kills(["collect", "precompute", "train"], COUNTS, random.Random(0))
    assert drawn != kills.draw_kills(["collect", "precompute", "train"], COUNTS, random.Random(1))


def test_a_stage_and_its_progress_are_read_from_the_run_directory(kills, tmp_path):
    layout = RunLayout(tmp_path)
    assert kills.stage_now(layout) is None
    write_text(layout.stages / "collect.json", "{}")
    write_text(layout.stages / "precompute.started.json", "{}")
    for number in range(3):
        write_text(layout.targets / f"{number}.parquet", "")
    assert kills.stage_now(layout) == "precompute"
    assert kills.work_done(layout, "precompute") == 3
    assert kills.work_done(layout, "train") == 0


class Victims:
    """Nodes that can be killed once."""

    def __init__(self):
        self.killed = 0
        self.added = 0

    def kill_one(self, choose):
        self.killed += 1
        return "node"

    def add(self):
        self.added += 1


def test_a_killed_node_is_replaced_and_kills_of_stages_that_are_over_are_left_out(kills, tmp_path):
    layout, nodes = RunLayout(tmp_path), Victims()
    write_text(layout.stages / "precompute.started.json", "{}")
    planned = [kills.Kill("collect", "node", 0.1, 0), kills.Kill("precompute", "node", 0.0, 0)]
    killer = kills.Killer(nodes, layout, planned, {"precompute": 5}, random.Random(0), (0.0, 0.0))
    killer.start()
    killer.join(30)
    killer.end()
    assert [kill["stage"] for kill in killer.done] == ["precompute"]
    assert (nodes.killed, nodes.added) == (1, 1)


def test_one_byte_makes_a_difference(script, tmp_path):
    chaos = script("chaos")
    layouts = [RunLayout(tmp_path / name) for name in ("one", "two")]
    for layout in layouts:
        for name in ("router_stats.safetensors", "router_stats.json", "calibration.safetensors", "calibration.json"):
            write_text(layout.directory / name, name)
        write_text(layout.selection, "[1, 2]")
        write_text(layout.targets / "a.parquet", "targets")
        write_text(layout.overlay / "overlay.safetensors", "overlay")
        write_text(layout.report, f'{{"evaluation": [1], "run": "{layout.directory}"}}')
    one, two = (chaos.digests(layout, evaluated=True) for layout in layouts)
    assert one == two
    write_text(layouts[1].targets / "a.parquet", "Targets")
    changed = chaos.digests(layouts[1], evaluated=True)
    assert {name for name in one if one[name] != changed[name]} == {"targets"}
