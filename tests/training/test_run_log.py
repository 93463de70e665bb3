"""The log of a training: every record reaches metrics.jsonl and every tracker, and no tracker can harm training."""

from __future__ import annotations

import importlib.util
import struct
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from tensorboardX.proto.event_pb2 import Event

from nexus_ray.config import TrackersSection, WarningsSection
from nexus_ray.config.training import MlflowSection, WandbSection
from nexus_ray.errors import ConfigError
from nexus_ray.layout import RunLayout
from nexus_ray.storage import read_json
from nexus_ray.training.watching import background, trackers
from nexus_ray.training.watching.background import Background
from nexus_ray.training.watching.log import RunLog, open_log
from nexus_ray.training.watching.metrics import MetricsLog, read_metrics
from nexus_ray.training.watching.tags import numbers_of, texts_of
from nexus_ray.training.watching.trackers import check_trackers
from nexus_ray.training.watching.warnings import Warnings

RECORD = {
    "loss": 2.5,
    "clipped": True,
    "sources": {"my play": {"cross_entropy": 2.0}},
    "router": {"l1": [0.1, None, 0.3]},
}


@pytest.fixture
def layout(tmp_path: Path) -> RunLayout:
    return RunLayout(tmp_path / "run")


def train(layout: RunLayout, first: int, last: int, **options: Any) -> None:
    with open_log(layout, first, **options) as log:
        for step in range(first, last):
            log.write("step", step, loss=float(step), attempt=float(first))


def events_of(path: Path) -> list[Event]:
    """The events of a TensorBoard file, by its format: length, checksum, data, checksum."""
    data, found = path.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        found.append(Event.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    return found


def shown(layout: RunLayout) -> dict[str, dict[int, float]]:
    """Scalars as TensorBoard shows them: a file's purge step hides what earlier files say from there on."""
    values: dict[str, dict[int, float]] = {}
    files = sorted(layout.tensorboard.iterdir(), key=lambda file: file.stat().st_ctime_ns)
    for event in (event for file in files for event in events_of(file)):
        if event.HasField("session_log"):
            values = {tag: {s: v for s, v in row.items() if s < event.step} for tag, row in values.items()}
        for value in event.summary.value:
            if value.HasField("simple_value"):
                values.setdefault(value.tag, {})[event.step] = value.simple_value
    return values


class TestTags:
    def test_numbers_have_one_tag_each_and_lists_by_layer_a_mean(self):
        assert numbers_of({"event": "step", "step": 3, **RECORD}) == {
            "train/loss": 2.5,
            "train/clipped": 1.0,
            "sources/my_play/cross_entropy": 2.0,
            "router/l1/layer_00": 0.1,
            "router/l1/layer_02": 0.3,
            "router/l1/mean": pytest.approx(0.2),
        }

    def test_other_events_stand_in_front(self):
        record = {"event": "validation", "step": 3, "loss": 1.0, "losses": {"a/b:c": 2.0}}
        assert numbers_of(record) == {"validation/loss": 1.0, "validation/losses/a_b_c": 2.0}

    def test_what_is_no_finite_number_is_left_out(self):
        record = {"event": "step", "step": 0, "loss": float("nan"), "norm": float("inf"), "none": None, "layers": []}
        assert numbers_of(record) == {}

    def test_texts_are_kept_apart(self):
        record = {"event": "sample", "step": 0, "prompt": "O", "text": " Romeo", "tokens": 2}
        assert texts_of(record) == {"sample/prompt": "O", "sample/text": " Romeo"}


class TestTensorBoard:
    def test_it_holds_every_number(self, layout: RunLayout):
        with open_log(layout, 0) as log:
            log.write("step", 0, **RECORD)
            log.write("sample", 0, prompt="O", text=" Romeo")
        expected = numbers_of({"event": "step", "step": 0, **RECORD})
        assert {tag: row[0] for tag, row in shown(layout).items()} == pytest.approx(expected)
        tags = {v.tag for file in layout.tensorboard.iterdir() for e in events_of(file) for v in e.summary.value}
        assert any(tag.startswith("sample/text") for tag in tags)

    def test_a_resumed_run_hides_the_steps_it_takes_again(self, layout: RunLayout):
        train(layout, 0, 6)
        train(layout, 3, 5)
        assert shown(layout)["train/loss"] == {step: step for step in range(5)}
        assert list(shown(layout)["train/attempt"].values()) == [0, 0, 0, 3, 3]

    def test_a_new_run_starts_empty(self, layout: RunLayout):
        train(layout, 0, 6)
        train(layout, 0, 2)
        assert shown(layout)["train/loss"] == {0: 0, 1: 1}
        assert len(list(layout.tensorboard.iterdir())) == 1


class TestWarningsInTheLog:
    BOUNDS = WarningsSection(router_kl=0.1)

    def test_a_warning_is_a_record_after_its_cause(self, layout: RunLayout):
        with open_log(layout, 0, warnings=self.BOUNDS) as log:
            log.write("step", 0, router={"kl": [0.5]})
            log.write("step", 1, router={"kl": [0.5]})
        records = read_metrics(layout.metrics)
        assert [record["event"] for record in records] == ["step", "warning", "step"]
        assert records[1]["step"] == 0
        assert "layer 0 (0.5)" in records[1]["message"]

    def test_a_resumed_run_remembers_what_it_has_warned_of(self, layout: RunLayout):
        for first in (0, 1):
            with open_log(layout, first, warnings=self.BOUNDS) as log:
                log.write("step", first, router={"kl": [0.5]})
        assert [record["event"] for record in read_metrics(layout.metrics)] == ["step", "warning", "step"]


class Remembering:
    """A tracker that keeps what it gets."""

    def __init__(self, seen: list[Any], fail_at: int | None = None) -> None:
        self._seen, self._fail_at = seen, fail_at

    def write(self, event: str, step: int, numbers: Mapping[str, float], texts: Mapping[str, str]) -> None:
        if step == self._fail_at:
            raise ConnectionError("no route to host")
        self._seen.append((event, step, dict(numbers)))

    def close(self, *, failed: bool) -> None:
        self._seen.append(("closed", failed))


class TestBackground:
    def test_records_arrive_in_order_before_it_is_closed(self):
        seen: list[Any] = []
        tracker = Background("T", lambda: Remembering(seen))
        for step in range(100):
            tracker.write("step", step, {"a": step}, {})
        tracker.close(failed=True)
        assert seen == [*[("step", step, {"a": step}) for step in range(100)], ("closed", True)]

    def test_a_tracker_that_fails_is_given_up_and_nothing_is_raised(self):
        seen: list[Any] = []
        tracker = Background("T", lambda: Remembering(seen, fail_at=2))
        for step in range(5):
            tracker.write("step", step, {}, {})
        tracker.close(failed=False)
        assert [each[1] for each in seen] == [0, 1]
        assert tracker.lost == "ConnectionError: no route to host"

    @pytest.mark.parametrize("fail_at", [1, 4])
    def test_a_tracker_that_fails_is_told_once_in_the_log(self, layout: RunLayout, fail_at: int):
        """While records are written, or at the end when the last one is what it failed at."""
        metrics, watch = MetricsLog(layout.metrics, 0), Warnings(WarningsSection(), {})
        tracker = Background("T", lambda: Remembering([], fail_at=fail_at))
        with RunLog(metrics, watch, [tracker]) as log:
            for step in range(5):
                log.write("step", step)
                deadline = time.monotonic() + 10
                while step == fail_at < 4 and not tracker.lost and time.monotonic() < deadline:
                    time.sleep(0.001)
        warnings = [record for record in read_metrics(layout.metrics) if record["event"] == "warning"]
        assert [(record["kind"], record["step"]) for record in warnings] == [("tracker/T", min(fail_at + 1, 4))]
        assert warnings[0]["message"] == "T gets no more records: ConnectionError: no route to host"

    def test_a_tracker_that_cannot_be_made_is_told(self):
        def refuse() -> Remembering:
            raise OSError("unauthorised")

        tracker = Background("T", refuse)
        tracker.write("step", 0, {}, {})
        tracker.close(failed=False)
        assert "unauthorised" in str(tracker.lost)

    def test_one_that_hangs_holds_nothing_up(self, monkeypatch):
        monkeypatch.setattr(background, "_WAITING", 3)
        release = threading.Event()

        class Hanging(Remembering):
            def write(self, *_: Any) -> None:
                release.wait(20)

        started = time.monotonic()
        tracker = Background("T", lambda: Hanging([]))
        for step in range(50):
            tracker.write("step", step, {}, {})
        tracker.close(failed=False, seconds=0.05)
        assert time.monotonic() - started < 5
        release.set()
        assert "3 records behind" in str(tracker.lost)


class TestMissingPackages:
    @pytest.mark.parametrize("name", ["mlflow", "wandb"])
    def test_they_are_refused_with_the_way_to_install_them(self, name: str, monkeypatch):
        monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
        section = TrackersSection.model_validate({name: {}})
        with pytest.raises(ConfigError, match=rf"train.trackers.{name}.*\n.*pip install 'nexus-ray\[{name}\]'"):
            check_trackers(section)

    def test_none_is_needed_when_none_is_set(self, monkeypatch):
        monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
        check_trackers(TrackersSection())


class FakeClient:
    """An MLflow server in memory, as far as it is used."""

    tracking_uri = "memory"

    def __init__(self, tracking_uri: str | None = None) -> None:
        self.tracking_uri = tracking_uri or "memory"

    runs: dict[str, dict[str, Any]]

    def get_experiment_by_name(self, name: str) -> Any:
        return None

    def create_experiment(self, name: str) -> str:
        return name

    def create_run(self, experiment: str, run_name: str) -> Any:
        number = f"r{len(self.runs)}"
        self.runs[number] = {
            "experiment": experiment,
            "name": run_name,
            "metrics": [],
            "params": {},
            "status": "RUNNING",
        }
        return SimpleNamespace(info=SimpleNamespace(run_id=number))

    def update_run(self, run: str, status: str) -> None:
        self.runs[run]["status"] = status

    def log_batch(self, run: str, metrics: Any = (), params: Any = ()) -> None:
        assert len(metrics) <= 1000
        assert len(params) <= 100
        self.runs[run]["metrics"] += [(metric.key, metric.value, metric.step) for metric in metrics]
        self.runs[run]["params"] |= {param.key: param.value for param in params}

    def set_terminated(self, run: str, status: str) -> None:
        self.runs[run]["status"] = status


@pytest.fixture
def mlflow_runs(monkeypatch) -> dict[str, dict[str, Any]]:
    """The runs of an MLflow that is not there."""
    runs: dict[str, dict[str, Any]] = {}
    entities, module = ModuleType("mlflow.entities"), ModuleType("mlflow")
    entities.Metric = lambda key, value, timestamp, step: SimpleNamespace(key=key, value=value, step=step)  # type: ignore[attr-defined]
    entities.Param = lambda key, value: SimpleNamespace(key=key, value=value)  # type: ignore[attr-defined]
    monkeypatch.setattr(FakeClient, "runs", runs, raising=False)
    module.MlflowClient = FakeClient  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mlflow", module)
    monkeypatch.setitem(sys.modules, "mlflow.entities", entities)
    return runs


class TestMlflow:
    SECTION = TrackersSection(mlflow=MlflowSection(experiment="plays"))

    def test_it_gets_metrics_parameters_and_the_end(self, layout: RunLayout, mlflow_runs):
        parameters = {f"train.field{number}": number for number in range(150)}
        secret = {"train.trackers.mlflow.tracking_uri": "https://me:password@host"}
        train(layout, 0, 2, trackers=self.SECTION, parameters=parameters | secret)
        (run,) = mlflow_runs.values()
        assert (run["experiment"], run["name"], run["status"]) == ("plays", "run", "FINISHED")
        assert run["params"] == {name: str(value) for name, value in parameters.items()}
        assert ("train/loss", 1.0, 1) in run["metrics"]

    def test_a_resumed_run_continues_the_same_one(self, layout: RunLayout, mlflow_runs):
        train(layout, 0, 4, trackers=self.SECTION)
        train(layout, 2, 6, trackers=self.SECTION)
        (run,) = mlflow_runs.values()
        assert [step for tag, _, step in run["metrics"] if tag == "train/loss"] == [0, 1, 2, 3, 2, 3, 4, 5]

    def test_another_experiment_gets_a_run_of_its_own(self, layout: RunLayout, mlflow_runs):
        train(layout, 0, 1, trackers=self.SECTION)
        train(layout, 1, 2, trackers=TrackersSection(mlflow=MlflowSection(experiment="other")))
        assert [run["experiment"] for run in mlflow_runs.values()] == ["plays", "other"]

    def test_a_failed_training_is_a_failed_run(self, layout: RunLayout, mlflow_runs):
        with pytest.raises(RuntimeError), open_log(layout, 0, trackers=self.SECTION):
            raise RuntimeError
        assert mlflow_runs["r0"]["status"] == "FAILED"

    def test_many_numbers_are_sent_in_several_requests(self, layout: RunLayout, mlflow_runs):
        with open_log(layout, 0, trackers=self.SECTION) as log:
            log.write("step", 0, router={"l1": [float(layer) for layer in range(2500)]})
        assert len(mlflow_runs["r0"]["metrics"]) == 2501

    def test_the_real_one_keeps_a_history(self, layout: RunLayout, tmp_path: Path):
        mlflow = pytest.importorskip("mlflow")
        uri = f"sqlite:///{tmp_path}/mlflow.db"
        section = TrackersSection(mlflow=MlflowSection(tracking_uri=uri))
        train(layout, 0, 3, trackers=section, parameters={"train.steps": 5})
        train(layout, 3, 5, trackers=section)
        client = mlflow.MlflowClient(tracking_uri=uri)
        run = client.get_run(read_json(layout.trackers, what="names", hint="")["mlflow"]["run"])
        assert (run.info.status, run.data.params) == ("FINISHED", {"train.steps": "5"})
        assert [m.step for m in client.get_metric_history(run.info.run_id, "train/loss")] == [0, 1, 2, 3, 4]


class TestWandb:
    SECTION = TrackersSection(wandb=WandbSection(project="plays", mode="offline"))

    @pytest.fixture
    def calls(self, monkeypatch) -> list[tuple[str, Any]]:
        """What a W&B that is not there is asked to do."""
        calls: list[tuple[str, Any]] = []
        run = SimpleNamespace(
            define_metric=lambda name, step_metric: calls.append(("axis", step_metric)),
            log=lambda values: calls.append(("log", values)),
            finish=lambda exit_code: calls.append(("finish", exit_code)),
        )
        module = ModuleType("wandb")
        module.Settings = lambda **options: options  # type: ignore[attr-defined]
        module.init = lambda **options: calls.append(("init", options)) or run  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "wandb", module)
        return calls

    def test_it_gets_numbers_and_texts_on_an_axis_of_steps(self, layout: RunLayout, calls):
        with open_log(layout, 0, trackers=self.SECTION, parameters={"train.steps": 2}) as log:
            log.write("step", 7, loss=1.5)
            log.write("sample", 7, text="Romeo")
        options = calls[0][1]
        assert (options["project"], options["mode"], options["config"]) == ("plays", "offline", {"train.steps": 2})
        assert calls[1:] == [
            ("axis", "global_step"),
            ("log", {"train/loss": 1.5, "global_step": 7}),
            ("log", {"sample/text": "Romeo", "global_step": 7}),
            ("finish", 0),
        ]

    def test_a_resumed_run_continues_the_same_one(self, layout: RunLayout, calls):
        train(layout, 0, 1, trackers=self.SECTION)
        train(layout, 1, 2, trackers=self.SECTION)
        first, second = (options for name, options in calls if name == "init")
        assert first["id"] == second["id"]
        assert second["resume"] == "allow"

    def test_the_real_one_writes_offline(self, layout: RunLayout):
        pytest.importorskip("wandb")
        train(layout, 0, 3, trackers=self.SECTION)
        name = read_json(layout.trackers, what="names", hint="")["wandb"]["run"]
        assert list((layout.directory / "wandb").glob(f"offline-run-*-{name}"))


def test_both_trackers_keep_their_names(layout: RunLayout):
    for name in ("mlflow", "wandb"):
        trackers._remember(layout, name, "place", f"run of {name}")
    assert trackers._known(layout, "mlflow", "place") == "run of mlflow"
    assert trackers._known(layout, "wandb", "place") == "run of wandb"
    assert trackers._known(layout, "wandb", "elsewhere") is None
