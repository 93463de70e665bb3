"""What a stage's workers need: one section for all stages, and what is different for one of them."""

import pytest
import yaml

from nexus_ray.config import STAGES, Config, flatten, load_config, save_config
from nexus_ray.errors import ConfigError
from nexus_ray.pipeline import Run
from nexus_ray.router import collect as collecting
from nexus_ray.router.calibration import choose_calibration
from nexus_ray.targets.writing.job import job_of_run
from nexus_ray.targets.writing.shard_keys import plan_work

OWN = {
    "resources.workers": 2,
    "resources.memory_gib_per_worker": 3,
    "resources.stages.train": {"workers": 8, "gpus_per_worker": 1, "accelerator_type": "L40S"},
    "resources.stages.evaluate": {"memory_gib_per_worker": None, "custom_per_worker": {"spot": 0.5}},
}


def test_a_stage_takes_from_the_section_what_is_not_said_of_it(micro_config, tmp_path):
    resources = micro_config(tmp_path / "run", **OWN).resources
    train, evaluate, collect = resources.of("train"), resources.of("evaluate"), resources.of("collect")
    assert (train.workers, train.gpus_per_worker, train.accelerator_type) == (8, 1, "L40S")
    assert (train.memory_gib_per_worker, train.cpus_per_worker) == (3, 1)
    assert (evaluate.workers, evaluate.memory_gib_per_worker, evaluate.custom_per_worker) == (2, None, {"spot": 0.5})
    assert collect == resources.model_copy(update={"stages": {}})


def test_the_device_of_a_stage_follows_its_own_gpus(micro_config, tmp_path):
    config = micro_config(tmp_path / "run", **OWN)
    assert {stage: config.for_stage(stage).compute_device for stage in ("collect", "train")} == {
        "collect": "cpu",
        "train": "cuda",
    }


def test_a_saved_configuration_says_no_more_of_a_stage_than_was_given(micro_config, tmp_path):
    config = micro_config(tmp_path / "run", **OWN)
    save_config(config, tmp_path / "saved.yaml")
    assert yaml.safe_load((tmp_path / "saved.yaml").read_text())["resources"]["stages"]["evaluate"] == {
        "memory_gib_per_worker": None,
        "custom_per_worker": {"spot": 0.5},
    }
    read = load_config(tmp_path / "saved.yaml")
    assert read == config
    assert read.resources.of("evaluate") == config.resources.of("evaluate")
    assert Config.model_validate(config.model_dump(mode="json")).resources.of("train") == config.resources.of("train")
    assert flatten(config)["resources.stages.train.workers"] == 8


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"resources.stages.trian": {"workers": 3}}, "resources.stages.trian"),
        ({"resources.stages.train.worker": 3}, "did you mean 'workers'"),
        ({"resources.stages.train.min_workers": 3}, r"stages.train: min_workers \(3\) is more than workers \(2\)"),
        ({"resources.min_workers": 2, "resources.stages.serve.workers": 1}, "stages.serve: min_workers"),
        ({"resources.gpus_per_worker": 1.5}, "gpus_per_worker: must be a whole number, or a part of one"),
        ({"resources.custom_per_worker": {"GPU": 1}}, "custom_per_worker.GPU has a field of its own: gpus_per_worker"),
        ({"resources.placement": "NEAR"}, "Input should be 'PACK' or 'SPREAD'"),
    ],
)
def test_what_cannot_be_is_refused_by_name(settings, said, micro_config, tmp_path):
    with pytest.raises(ConfigError, match=said):
        micro_config(tmp_path / "run", **settings)


@pytest.mark.parametrize("stage", ["collect", "precompute"])
def test_the_gpus_of_one_stage_make_no_other_stale(stage, micro_config, tmp_path):
    plain = Run(micro_config(tmp_path / "run"))
    other = Run(micro_config(tmp_path / "run", **{f"resources.stages.{stage}.gpus_per_worker": 1}))
    changed = {name for name in ("collect", "precompute") if plain.recipe(name) != other.recipe(name)}
    assert changed == {stage}


def test_the_threads_of_one_stage_are_in_its_own_recipes_only(micro_config, tmp_path, in_process):
    """Torch's threads decide the last bits of a pass, so parts made with other threads are not taken up."""

    def recipes(**settings):
        config = micro_config(tmp_path / "run", **settings)
        calibration = choose_calibration(config, tmp_path / "calibration.safetensors")
        seen = config.for_stage("collect")
        description = collecting.describe_statistics(config, calibration, None)
        units = collecting.plan_units(seen, calibration)
        shards = [work.name for work in plan_work(job_of_run(config), config.resources.of("precompute"))]
        return collecting._recipe(seen, description, units), shards

    plain = recipes()
    collect_own = recipes(**{"resources.stages.collect.cpus_per_worker": 2})
    precompute_own = recipes(**{"resources.stages.precompute.cpus_per_worker": 2})
    assert collect_own[0] != plain[0]
    assert collect_own[1] == plain[1]
    assert precompute_own[0] == plain[0]
    assert precompute_own[1] != plain[1]
    assert recipes(**{f"resources.stages.{stage}.workers": 5 for stage in ("collect", "precompute")}) == plain


def test_a_stage_told_nothing_has_the_recipes_of_before(micro_config, tmp_path):
    plain, same = (
        Run(micro_config(tmp_path / "run")),
        Run(micro_config(tmp_path / "run", **{"resources.use_head": True})),
    )
    assert [plain.recipe(stage) for stage in STAGES] == [same.recipe(stage) for stage in STAGES]
