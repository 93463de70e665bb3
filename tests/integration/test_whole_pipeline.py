"""The whole pipeline on a micro model: every artefact, skipping, continuing, and what must not change."""

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nexus_ray.checkpoints.overlay import load_overlay_config
from nexus_ray.config import STAGES, Config
from nexus_ray.errors import ArtefactError, ConfigError, NexusError
from nexus_ray.layout import RunLayout
from nexus_ray.observing.story import read_story
from nexus_ray.pipeline import Run, run_pipeline, run_single_stage
from nexus_ray.run_lock import locked
from nexus_ray.storage import sha256_file
from nexus_ray.training.watching.metrics import read_metrics

pytestmark = pytest.mark.ray
MakeConfig = Callable[..., Config]


def _outputs(config: Config) -> dict[str, str]:
    """Hashes of all that a run has made, its story aside, by path."""
    files = sorted(file for file in config.run.directory.rglob("*") if file.is_file())
    left_out = ("config.yaml", ".lock", "events.jsonl")
    return {
        str(file): sha256_file(file) for file in files if file.name not in left_out and file.parent.name != "events"
    }


def test_report_holds_both_models_on_every_source(finished: Config) -> None:
    report = json.loads(RunLayout(finished.run.directory).report.read_text())
    for source in ("play", "prose"):
        for model in ("base", "student"):
            assert report["evaluation"][source][model]["token_perplexity"] > 1
    layout = RunLayout(finished.run.directory)
    assert "play" in layout.report.with_suffix(".md").read_text()
    assert {file.name for file in layout.plots.glob("*.png")} >= {"training.png", "perplexity.png"}


def test_the_run_tells_what_each_stage_did(finished: Config) -> None:
    told = read_story(finished.run.directory).commands[0]
    assert [(span.stage, span.state) for span in told.stages] == [(name, "done") for name in STAGES]
    assert {span.stage for span in told.stages if span.tokens} == {"collect", "precompute", "train", "evaluate"}
    assert all(span.bytes for span in told.stages)
    assert len(told.stages[4].checkpoints) == finished.train.steps // finished.train.checkpoint_every


def test_training_changed_the_overlay_and_nothing_else(finished: Config) -> None:
    layout = RunLayout(finished.run.directory)
    initial = load_file(layout.initial_overlay / "overlay.safetensors")
    trained = load_file(layout.overlay / "overlay.safetensors")
    assert initial.keys() == trained.keys()
    for name, tensor in trained.items():
        assert torch.equal(tensor, initial[name]) == name.endswith("scale"), name
    assert 1 <= load_overlay_config(layout.overlay).trained_steps <= finished.train.steps


def test_first_step_starts_at_the_base(finished: Config) -> None:
    """top1_zero: the student is the base, so KL to it is zero up to the rounding of stored targets."""
    first = read_metrics(RunLayout(finished.run.directory).metrics)[0]
    assert first["step"] == 0
    assert abs(first["output_kl"]) < 1e-2


def test_second_run_skips_everything(finished: Config, caplog: pytest.LogCaptureFixture) -> None:
    layout = RunLayout(finished.run.directory)
    before = {file: file.stat().st_mtime_ns for file in layout.directory.rglob("*") if file.is_file()}
    run_pipeline(finished)
    after = {file: file.stat().st_mtime_ns for file in before}
    changed = {file.name for file in before if before[file] != after[file]}
    assert changed <= {"config.yaml", ".lock", "events.jsonl"}
    assert read_story(layout.directory).commands[-1].skipped == list(STAGES)


def test_changed_setting_redoes_only_what_depends_on_it(finished: Config) -> None:
    evaluate = finished.evaluate.model_copy(update={"bootstrap_samples": 500})
    run = Run(finished.model_copy(update={"evaluate": evaluate}))
    assert [run.is_complete(name) for name in STAGES] == [True] * 5 + [False]
    convert = finished.convert.model_copy(update={"token_gate": False})
    run = Run(finished.model_copy(update={"convert": convert}))
    assert {name for name in STAGES if run.is_complete(name)} == {"collect", "select", "precompute"}


def test_truncated_artefact_is_not_complete(finished: Config) -> None:
    overlay = RunLayout(finished.run.directory).overlay / "overlay.safetensors"
    whole = overlay.read_bytes()
    overlay.write_bytes(whole[:-10])
    try:
        assert not Run(finished).is_complete("train")
    finally:
        overlay.write_bytes(whole)
    assert Run(finished).is_complete("train")


@pytest.mark.parametrize("force", [False, True])
def test_a_refused_training_costs_nothing_that_stands(finished: Config, force: bool) -> None:
    """More workers than sequences in a step: refused before the finished training's files are touched."""
    before = _outputs(finished)
    train = finished.train.model_copy(update={"steps": 2 * finished.train.steps})
    workers = finished.resources.model_copy(update={"workers": 64})
    with pytest.raises(NexusError, match="workers" if force else r"train\.steps was 6 and is 12"):
        run_single_stage(finished.model_copy(update={"train": train, "resources": workers}), "train", force=force)
    assert before == _outputs(finished)
    assert Run(finished).is_complete("train")


def test_ctrl_c_is_python_s_again_after_a_training(finished: Config) -> None:
    inherited = signal.SIG_IGN  # where a script started the tests in its background
    assert signal.getsignal(signal.SIGINT) in (signal.default_int_handler, inherited)


def test_a_stage_does_not_go_on_from_what_was_made_with_other_settings(finished: Config) -> None:
    before = _outputs(finished)
    targets = finished.targets.model_copy(update={"top_k": finished.targets.top_k + 1})
    changed = finished.model_copy(update={"targets": targets})
    with pytest.raises(ConfigError, match=r"what precompute has made .* targets\.top_k was \d+ and is \d+"):
        run_single_stage(changed, "train", force=True)
    assert before == _outputs(finished)


def test_a_finished_training_is_not_replaced_unasked(finished: Config) -> None:
    """A changed setting of an early stage would cost it: refused, naming the setting, before that stage begins."""
    before = _outputs(finished)
    collect = finished.collect.model_copy(update={"tokens": 2 * finished.collect.tokens})
    changed = finished.model_copy(update={"collect": collect})
    with pytest.raises(ConfigError, match=r"finished training.*collect\.tokens was \d+ and is \d+") as refused:
        run_pipeline(changed)
    assert "--from collect" in str(refused.value)
    assert before == _outputs(finished)


def test_who_asks_for_it_replaces_a_training_and_may_be_interrupted(
    copy_of_finished: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--from convert` stopped in `convert`: `run` alone then goes on, and is not refused what has been asked for."""
    changed = copy_of_finished(**{"convert.token_gate": False})
    layout = RunLayout(changed.run.directory)
    with pytest.raises(ConfigError, match=r"convert\.token_gate was True and is False"):
        run_pipeline(changed, last="train")
    with monkeypatch.context() as patch:
        patch.setattr("nexus_ray.conversion.initialise.convert", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            run_pipeline(changed, first="convert", last="train")
    assert sha256_file(layout.overlay / "overlay.safetensors")  # stands until training begins
    run_pipeline(changed, last="train")
    assert Run(changed).is_complete("train")
    assert not load_overlay_config(layout.overlay).token_gate


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_packages_are_looked_for_before_the_first_stage(
    make_micro_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(_: object) -> None:
        raise ConfigError("the package is not installed", "install it")

    monkeypatch.setattr("nexus_ray.training.watching.trackers.check_trackers", missing)
    config = make_micro_config(tmp_path / "early")
    with pytest.raises(ConfigError, match="not installed"):
        run_pipeline(config)
    assert not list(config.run.directory.glob("router_stats*"))


def test_two_commands_in_one_directory_are_refused(finished: Config) -> None:
    with locked(RunLayout(finished.run.directory)), pytest.raises(NexusError, match="another nexus-ray is working"):
        run_single_stage(finished, "select")


def test_stage_without_its_inputs_says_which_to_run(make_micro_config: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="router statistics"):
        run_single_stage(make_micro_config(tmp_path / "empty"), "select")


@pytest.mark.slow
def test_online_training_one_worker_agrees_with_two(
    finished: Config, make_micro_config: MakeConfig, tmp_path: Path
) -> None:
    losses = {}
    for workers in (1, 2):
        settings = {"train.mode": "online", "train.steps": 4, "convert.learn_scale": True}
        config = make_micro_config(tmp_path / f"w{workers}", **settings, **{"resources.workers": workers})
        run_pipeline(config, last="train")
        records = read_metrics(RunLayout(config.run.directory).metrics)
        losses[workers] = [record["loss"] for record in records if record["event"] == "step"]
    assert losses[1] == pytest.approx(losses[2], rel=1e-5)
    trained = load_file(RunLayout(config.run.directory).overlay / "overlay.safetensors")
    scales = [tensor.item() for name, tensor in trained.items() if name.endswith("scale")]
    assert len(scales) == 2
    assert all(scale != 1.0 for scale in scales)  # learned, and written
    offline = [r["loss"] for r in read_metrics(RunLayout(finished.run.directory).metrics) if r["event"] == "step"]
    assert losses[1][0] == pytest.approx(offline[0], rel=1e-2)


def test_stopped_training_continues_to_the_same_overlay(
    finished: Config, copy_of_finished: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker dies for good after the checkpoint of step 4; the next call ends like the undisturbed run."""
    config = copy_of_finished(**{"resources.max_failures": 0})
    crash = tmp_path / "crash"
    crash.touch()
    monkeypatch.setattr("nexus_ray.training.distil._loop", _crashing_loop(str(crash)))
    with pytest.raises(NexusError, match="training failed"):
        run_single_stage(config, "train", force=True)
    assert not Run(config).is_complete("train")
    crash.unlink()
    monkeypatch.undo()
    run_single_stage(config, "train")
    layout, undisturbed = RunLayout(config.run.directory), RunLayout(finished.run.directory)
    events = [record["event"] for record in read_metrics(layout.metrics)]
    assert "resume" in events
    assert sha256_file(layout.overlay / "overlay.safetensors") == sha256_file(
        undisturbed.overlay / "overlay.safetensors"
    )
    failed, done = read_story(layout.directory).commands[-2:]
    assert [(span.stage, span.state, span.continued) for span in (*failed.stages, *done.stages)] == [
        ("train", "failed", False),
        ("train", "done", True),
    ]
    assert any("the worker dies here" in incident.text for incident in failed.incidents if incident.kind == "worker")
    assert any(incident.text == "training goes on from step 5" for incident in done.incidents)
    assert done.stages[0].tokens > 0


def _crashing_loop(marker: str) -> Callable[[dict], None]:
    def loop(arguments: dict) -> None:
        from nexus_ray.training import distil

        original = distil.DistilTask.accumulate

        def accumulate(self: distil.DistilTask, step: int) -> dict[str, float]:
            if step == 4 and Path(marker).exists():
                raise RuntimeError("the worker dies here")
            return original(self, step)

        distil.DistilTask.accumulate = accumulate
        try:
            distil._loop(arguments)
        finally:
            distil.DistilTask.accumulate = original

    return loop


def test_worker_errors_reach_the_user_whole(copy_of_finished: MakeConfig) -> None:
    config = copy_of_finished(**{"train.optimiser.learning_rate": 1e37, "train.steps": 4})
    with pytest.raises(NexusError, match=r"the loss is .*nothing was updated"):
        run_single_stage(config, "train", force=True)


def test_a_stage_done_again_makes_later_ones_stale(copy_of_finished: MakeConfig) -> None:
    config = copy_of_finished()
    run_single_stage(config, "convert", force=True)
    run = Run(config)
    assert {name for name in STAGES if run.is_complete(name)} == {"collect", "select", "convert", "precompute"}
