"""What makes a finished stage stale: every input that decides its result, and nothing else."""

import json
import shutil
from pathlib import Path

import pytest

from nexus_ray.config import STAGES, Config
from nexus_ray.pipeline import Run, run_single_stage
from nexus_ray.stages import BY_NAME, Stage
from nexus_ray.storage import write_text


def recipes(config: Config) -> dict[str, str]:
    run = Run(config)
    return {stage: run.recipe(stage) for stage in STAGES}


def changed(before: Config, after: Config) -> set[str]:
    """The first stages that a change makes stale: those whose own predecessors stay as they are."""
    old, new = recipes(before), recipes(after)
    stale = {stage for stage in STAGES if old[stage] != new[stage]}
    return {stage for stage in stale if not stale & set(BY_NAME[stage].after)}


@pytest.fixture
def own_model(micro_model, tmp_path):
    """A copy of the micro model that a test may change."""
    return Path(shutil.copytree(micro_model, tmp_path / "model"))


@pytest.mark.parametrize(
    ("override", "stale"),
    [
        ({"data.sources.prose.role": "domain"}, {"select"}),
        ({"select.top_k": 3}, {"select"}),
        ({"collect.tokens": 512}, {"collect"}),
        ({"collect.sampling": "random"}, {"collect"}),
        ({"run.seed": 5}, {"collect"}),
        ({"resources.gpus_per_worker": 1}, {"collect", "precompute"}),
        ({"model.dtype": "bfloat16"}, {"collect", "precompute"}),
        ({"model.dtype": "float32"}, set()),  # what auto is on a CPU
        ({"model.attention": "document"}, {"collect", "precompute"}),
        ({"data.sources.play.predict": "assistant"}, {"precompute"}),
        ({"model.attention": "sequence", "data.sources.play.predict": "all"}, set()),
        ({"data.strict": True}, set()),
        ({"resources.workers": 4}, set()),
        ({"train.steps": 7}, {"train"}),
        ({"train.on_nan": "skip", "train.micro_batch_sequences": 1, "train.gradient_checkpointing": True}, set()),
        ({"train.checkpoint_every": 1, "train.keep_checkpoints": 9, "train.samples.prompts": ["To be"]}, set()),
        ({"train.trackers.wandb.mode": "offline", "train.warnings.overlap": 0.5}, set()),
        ({"train.early_stop.patience": 3}, {"train"}),
        ({"train.averaging.every": 3}, {"train"}),
    ],
)
def test_a_setting_makes_stale_what_depends_on_it(override, stale, micro_config, tmp_path):
    assert changed(micro_config(tmp_path / "run"), micro_config(tmp_path / "run", **override)) == stale


def test_a_moved_model_changes_nothing(micro_config, own_model, tmp_path):
    before = micro_config(tmp_path / "run")
    assert changed(before, micro_config(tmp_path / "run", **{"model.path": str(own_model)})) == set()


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja"])
def test_another_tokenizer_or_template_makes_everything_that_reads_text_stale(name, micro_config, own_model, tmp_path):
    config = micro_config(tmp_path / "run", **{"model.path": str(own_model)})
    before = recipes(config)
    path = own_model / name
    if name == "tokenizer.json":
        rules = json.loads(path.read_text())
        rules["model"]["merges"] = rules["model"]["merges"][:-1]
        write_text(path, json.dumps(rules))
    else:
        write_text(path, path.read_text() + " ")
    after = recipes(config)
    assert [stage for stage in STAGES if before[stage] == after[stage]] == []


def test_text_outside_the_mixture_does_not_make_statistics_stale(micro_config, micro_texts, tmp_path):
    prose = Path(shutil.copy(micro_texts / "prose.train.jsonl", tmp_path / "prose.jsonl"))
    overrides = {"data.sources.prose.train": str(prose), "collect.mixture": {"play": 1.0}}
    config = micro_config(tmp_path / "run", **overrides)
    before = recipes(config)
    write_text(prose, prose.read_text() + '{"text": "more"}\n')
    after = recipes(config)
    assert before["collect"] == after["collect"]
    assert before["precompute"] != after["precompute"]


def test_a_stage_that_failed_after_touching_its_outputs_is_not_complete(micro_config, tmp_path, monkeypatch):
    """Its old record would fit outputs of another recipe that happen to have the same sizes."""
    config = micro_config(tmp_path / "run")
    outputs = BY_NAME["collect"].outputs(Run(config).layout)

    def make(text: str, *, fail: bool = False):
        def work(run: Run, recipe: str) -> None:
            for path in outputs:
                write_text(path, text)
            if fail:
                raise KeyboardInterrupt

        old = BY_NAME["collect"]
        return Stage(old.name, work, old.after, old.sections, old.outputs, old.state)

    monkeypatch.setitem(BY_NAME, "collect", make("first"))
    run_single_stage(config, "collect")
    assert Run(config).is_complete("collect")
    monkeypatch.setitem(BY_NAME, "collect", make("other", fail=True))
    with pytest.raises(KeyboardInterrupt):
        run_single_stage(micro_config(tmp_path / "run", **{"run.seed": 5}), "collect")
    assert not Run(config).is_complete("collect")
