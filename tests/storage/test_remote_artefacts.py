"""Every kind of artefact at a URI: what the stages write there, and what the commands that look read from there."""

from __future__ import annotations

import json

import pytest
import torch
from evaluation.synthetic import training_records
from targets.precompute_here import contents, precompute_here, run_workers_here

from nexus_ray.checkpoints.overlay import OverlayConfig, load_overlay, load_overlay_config, overlay_specs, save_overlay
from nexus_ray.cli import run_command
from nexus_ray.config import ServeSection
from nexus_ray.errors import ArtefactError
from nexus_ray.generation.serving import overlays_of, student_name
from nexus_ray.parts import Parts
from nexus_ray.planning.plan import make_plan
from nexus_ray.planning.tables import show_plan
from nexus_ray.router.files import read_arrays, write_arrays
from nexus_ray.storage import exists, read_bytes, remove, size_of, write_json, write_text
from nexus_ray.targets.reading.reader import TargetSet
from nexus_ray.targets.writing import precompute as writing

BASE = "b" * 64
CONFIG = OverlayConfig(
    base_fingerprint=BASE,
    model_type="gpt_oss",
    layers=2,
    hidden_size=8,
    width=6,
    token_gate=False,
    scale=0.5,
    learn_scale=True,
    initialisation="random",
    dtype="float32",
)


def tensors(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {spec.name: torch.randn(spec.shape, generator=generator) for spec in overlay_specs(CONFIG)}


class TestOverlays:
    def test_one_is_read_as_it_was_written_and_replaced_whole(self, remote):
        for seed in (1, 2):
            save_overlay(remote, CONFIG, tensors(seed))
            description, found = load_overlay(remote, BASE)
            assert description == CONFIG == load_overlay_config(remote)
            assert all(torch.equal(found[name], tensor) for name, tensor in tensors(seed).items())

    def test_a_missing_one_and_one_of_another_base_are_named(self, remote):
        with pytest.raises(ArtefactError, match=rf"no overlay at {remote}/overlay_config\.json"):
            load_overlay(remote, BASE)
        save_overlay(remote, CONFIG, tensors(1))
        with pytest.raises(ArtefactError, match=rf"the overlay {remote} was made for the base bbbb"):
            load_overlay(remote, "c" * 64)

    def test_the_run_of_a_uri_and_further_overlays_are_served(self, remote, micro_config):
        config = micro_config(remote / "shakespeare", **{"serve.overlays": {"other": str(remote / "other")}})
        assert isinstance(config.serve, ServeSection)
        assert student_name(config) == "shakespeare"
        save_overlay(remote / "shakespeare" / "overlay", CONFIG, tensors(1))
        with pytest.raises(ArtefactError, match=rf"no trained overlay at {remote}/other, for model 'other'"):
            overlays_of(config)
        save_overlay(remote / "other", CONFIG, tensors(2))
        assert {name: str(place) for name, place in overlays_of(config).items()} == {
            "shakespeare": f"{remote}/shakespeare/overlay",
            "other": f"{remote}/other",
        }


class TestTargets:
    @pytest.fixture
    def make(self, micro_config, monkeypatch):
        rounds = run_workers_here(monkeypatch)

        def make(directory, run, **settings):
            rounds.clear()
            precompute_here(micro_config(run, **{"train.sources.prose.output_kl": 1.0} | settings), directory)
            return sum(map(len, rounds))

        return make

    def test_a_set_has_the_bytes_of_a_local_one_and_is_read_and_verified(self, make, remote, tmp_path):
        make(tmp_path / "targets", tmp_path)
        make(remote, tmp_path)
        local = contents(tmp_path / "targets")
        assert {name: read_bytes(remote / name) for name in local} == local
        here, there = TargetSet.open(tmp_path / "targets"), TargetSet.open(remote)
        there.verify()
        rows = here.sequences("prose")[:3]
        assert torch.equal(here.read(rows).input_ids, there.read(rows).input_ids)

    def test_a_call_that_was_interrupted_continues_although_listings_lag(
        self, make, remote, tmp_path, object_store, monkeypatch
    ):
        calls, add = iter(range(100)), writing.ShardStore.add

        def interrupted(store, file):
            if next(calls) == 3:
                raise KeyboardInterrupt
            add(store, file)

        with object_store.empty_listings():
            with monkeypatch.context() as patch:
                patch.setattr(writing.ShardStore, "add", interrupted)
                with pytest.raises(KeyboardInterrupt):
                    make(remote, tmp_path)
            assert not exists(remote / "manifest.json")
            total = make(tmp_path / "targets", tmp_path)
            assert make(remote, tmp_path) == total - 3
            TargetSet.open(remote).verify()
            assert make(remote, tmp_path) == 0, "all shards are known by their names"

    def test_a_listing_of_the_past_does_not_make_a_set_look_damaged(self, make, remote, tmp_path, object_store):
        make(remote, tmp_path)
        name = TargetSet.open(remote).manifest.files[0].name
        whole = read_bytes(remote / name)
        write_text(remote / name, "short")
        with pytest.raises(ArtefactError, match="has 5 bytes"):
            TargetSet.open(remote)
        with object_store.stale_listings():
            with pytest.raises(ArtefactError, match="has 5 bytes"):
                TargetSet.open(remote)
            remote.fs.pipe_file((remote / name).path, whole)
            TargetSet.open(remote).verify()


class TestParts:
    def test_parts_of_a_recipe_are_kept_and_those_of_another_are_not(self, remote, object_store):
        parts = Parts(remote, ".json", "unit-a")
        parts.begin("a")
        work = [type("Work", (), {"index": number})() for number in range(3)]
        write_json(parts.path(work[1]), {})
        with object_store.empty_listings():
            parts.begin("a")
            assert parts.missing(work) == [work[0], work[2]]
            other = Parts(remote, ".json", "unit-b")
            other.begin("b")
            assert other.missing(work) == work, "what a listing hides is not taken for another recipe's"
        other.discard()
        assert size_of(remote / "recipe.json") is None

    def test_arrays_come_back(self, remote):
        arrays = {"a": torch.arange(6).reshape(2, 3).numpy()}
        write_arrays(remote / "a.safetensors", arrays)
        assert read_arrays(remote / "a.safetensors")["a"].tolist() == [[0, 1, 2], [3, 4, 5]]
        remove(remote / "a.safetensors")
        with pytest.raises(ArtefactError, match=rf"no router statistics at {remote}/a\.safetensors"):
            read_arrays(remote / "a.safetensors")


class TestCommands:
    def test_plot_reads_runs_and_writes_its_figure_at_uris(self, remote, tmp_path, capsys):
        lines = "".join(json.dumps(record) + "\n" for record in training_records())
        write_text(remote / "one" / "metrics.jsonl", lines)
        (tmp_path / "two").mkdir()
        write_text(tmp_path / "two" / "metrics.jsonl", lines)
        figure = tmp_path / "both.png"
        assert run_command(["plot", f"{remote}/one", str(tmp_path / "two"), "-o", str(figure)]) == 0
        assert figure.read_bytes().startswith(b"\x89PNG")
        assert run_command(["plot", f"{remote}/one", "-o", f"{remote}/one/plots/training.svg"]) == 0
        assert b"<svg" in read_bytes(remote / "one" / "plots" / "training.svg")
        assert run_command(["plot", f"{remote}/none"]) == 1
        assert f"{remote}/none has no metrics.jsonl" in capsys.readouterr().err.replace("\n", "")

    def test_plan_knows_no_limit_of_an_object_store(self, remote, micro_config):
        plan = make_plan(micro_config(remote))
        assert plan.machine.free_disk is None
        assert plan.storage_fits
        json.dumps(plan.as_dict())
        show_plan(plan)

    def test_a_uri_that_nothing_opens_is_bad_usage(self, capsys):
        assert run_command(["plot", "abfs://box/run"]) == 2
        assert "nexus-ray[azure]" in capsys.readouterr().err

    def test_targets_that_are_not_there_are_named(self, remote, capsys):
        assert run_command(["targets", "inspect", f"{remote}/targets"]) == 1
        assert "no target manifest" in capsys.readouterr().err
