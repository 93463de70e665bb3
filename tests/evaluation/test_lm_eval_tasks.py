"""Tasks of lm-eval with base and student: its own figures, and refusals before any work."""

from __future__ import annotations

import importlib.util
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from evaluation.local_tasks import write_choice_task, write_rolling_task

from nexus_ray.data.packing import separator_id
from nexus_ray.errors import ConfigError, DataError
from nexus_ray.evaluation.lm_eval_tasks import TaskRunner, check_tasks, compare_results
from nexus_ray.evaluation.sections.tasks import difference_interval, outcome, task_summary, tasks
from nexus_ray.evaluation.wording import Outcome
from nexus_ray.layout import RunLayout
from nexus_ray.modeling.loading import LoadedModel, load_student
from nexus_ray.pipeline import Run, run_pipeline

WORDS = ["thou", "art", "the", "king", "and", "thy", "servant", "speak", "good", "sir", "silent", "night", "sorrow"]
QUESTIONS = [
    (f"{first} {second}", [f" {word}" for word in WORDS], (3 * i + 5 * j) % 13)
    for i, first in enumerate(WORDS)
    for j, second in enumerate(WORDS[:9])
]
TEXTS = ["thou art the king " * 30, "speak, good sir", "naïve café 🙂 " * 20]


@pytest.fixture
def installed() -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'nexus-ray[eval]'")


@pytest.fixture
def with_tasks(trained, tmp_path, monkeypatch):
    """A function (**settings of evaluate.lm_eval) -> config of a run with two local tasks."""
    directory = tmp_path / "tasks"
    directory.mkdir()
    write_choice_task(directory, "choose_a_word", QUESTIONS)
    write_rolling_task(directory, "read_a_text", TEXTS)

    def make(**settings: object):
        section = {"tasks": ["choose_a_word", "read_a_text"], "include_path": str(directory)} | settings
        return trained(**{"evaluate.lm_eval": section, "data.sequence_length": 32})

    return make


@pytest.fixture
def local_cache(installed, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def figures(config, task: str) -> dict[str, Any]:
    """{metric: figure} of one task."""
    runner = TaskRunner(config, RunLayout(config.run.directory).overlay)
    results = json.loads(runner({"task": task})["results"])
    assert list(results) == [task]
    return {figure["metric"]: figure | {"documents": results[task]["documents"]} for figure in results[task]["figures"]}


def answers(student: LoadedModel) -> list[bool]:
    """Whether each question is answered rightly: the choice with the largest likelihood, computed here."""
    right = []
    for question, choices, answer in QUESTIONS:
        context = len(student.tokenizer.encode(question))
        rows = [student.tokenizer.encode(question + choice) for choice in choices]
        longest = max(map(len, rows))
        padded = torch.tensor([ids + [0] * (longest - len(ids)) for ids in rows])  # at the end: nothing attends to it
        with torch.no_grad():
            log_p = student.model(input_ids=padded).logits.log_softmax(-1)
        scores = [sum(log_p[row, i - 1, ids[i]] for i in range(context, len(ids))) for row, ids in enumerate(rows)]
        right.append(int(torch.stack(scores).argmax()) == answer)
    return right


@pytest.mark.usefixtures("local_cache")
def test_a_task_with_choices_has_the_accuracy_of_both_models_and_their_paired_difference(with_tasks):
    config = with_tasks()
    found = figures(config, "choose_a_word")["acc"]
    loaded = load_student(config.model, RunLayout(config.run.directory).overlay)
    with loaded.base():
        base = np.asarray(answers(loaded), float)
    student = np.asarray(answers(loaded), float)
    assert found["documents"] == len(QUESTIONS)
    assert (found["base"], found["student"]) == pytest.approx((base.mean(), student.mean()))
    assert found["base_stderr"] == pytest.approx(base.std(ddof=1) / math.sqrt(len(base)))
    assert found["difference"] == pytest.approx((student - base).mean())
    assert found["difference_stderr"] == pytest.approx((student - base).std(ddof=1) / math.sqrt(len(base)))
    assert found["higher_is_better"] is True
    assert (student != base).any()


@pytest.mark.usefixtures("local_cache")
def test_a_rolling_task_agrees_with_the_evaluations_own_rolling_windows(with_tasks, scored, heldout, monkeypatch):
    from lm_eval.models.huggingface import HFLM

    prefix = property(lambda lm: separator_id(lm.tokenizer))  # lm-eval's own is the tokenizer's bos
    monkeypatch.setattr(HFLM, "prefix_token_id", prefix)
    theirs = figures(with_tasks(max_length=32), "read_a_text")
    settings = heldout([{"text": text} for text in TEXTS])
    ours = scored(**settings, **{"evaluate.windows": "rolling", "data.sequence_length": 32}).sources["play"]
    for name in ("word_perplexity", "byte_perplexity", "bits_per_byte"):
        for model in ("base", "student"):
            assert math.log(theirs[name][model]) == pytest.approx(math.log(ours[model][name]), rel=1e-5)
        assert theirs[name]["base"] != pytest.approx(theirs[name]["student"], rel=1e-3)
        assert theirs[name]["higher_is_better"] is False
        assert theirs[name]["difference_stderr"] is None


@pytest.mark.usefixtures("local_cache")
def test_a_limit_is_of_documents(with_tasks):
    assert figures(with_tasks(limit=7), "choose_a_word")["acc"]["documents"] == 7


@pytest.mark.usefixtures("local_cache")
def test_a_task_whose_data_is_missing_is_named(with_tasks, tmp_path):
    (tmp_path / "tasks" / "choose_a_word.jsonl").unlink()
    config = with_tasks()
    runner = TaskRunner(config, RunLayout(config.run.directory).overlay)
    with pytest.raises(DataError, match=r"cannot load the task 'choose_a_word': .*choose_a_word\.jsonl"):
        runner({"task": "choose_a_word"})


@pytest.mark.usefixtures("local_cache")
def test_lm_evals_wrapper_leaves_the_model_as_it_is(with_tasks):
    config = with_tasks(limit=2)
    ids = torch.arange(40)[None]
    fresh = load_student(config.model, RunLayout(config.run.directory).overlay)
    runner = TaskRunner(config, RunLayout(config.run.directory).overlay)
    runner({"task": "choose_a_word"})
    with torch.no_grad():
        assert torch.equal(fresh.model(input_ids=ids).logits, runner._student.model(input_ids=ids).logits)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("local_cache", "ray_session")
def test_the_stage_runs_tasks_on_ray_and_reports_them(with_tasks):
    from nexus_ray.evaluation.report import evaluate_and_report

    config = with_tasks(limit=5)
    report = evaluate_and_report(config, RunLayout(config.run.directory))
    assert list(report["tasks"]["tasks"]) == ["choose_a_word", "read_a_text"]
    text = (config.run.directory / "report.md").read_text()
    assert "## Tasks of lm-eval" in text
    assert "| choose_a_word | 5 | acc, higher is better |" in text


def test_a_missing_package_is_named_before_anything_starts(with_tasks, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "lm_eval" else find(name, *rest)
    )
    config = with_tasks()
    with pytest.raises(ConfigError, match="lm-eval is not installed") as caught:
        run_pipeline(config)
    assert "pip install 'nexus-ray[eval]'" in str(caught.value.hint)
    assert not (config.run.directory / "router_stats.safetensors").exists()


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tasks": ["chose_a_word"]}, r"no task 'chose_a_word'; did you mean 'choose_a_word'\?"),
        ({"include_path": "/nowhere/tasks"}, "/nowhere/tasks is not a directory"),
    ],
)
def test_tasks_that_are_not_there_are_refused_before_anything_starts(settings, message, with_tasks):
    with pytest.raises(ConfigError, match=message):
        run_pipeline(with_tasks(**settings))


def test_no_tasks_need_no_package(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: pytest.fail("looked for a package"))
    check_tasks(None)


def test_other_task_files_make_the_evaluation_stale(with_tasks, tmp_path):
    before = Run(with_tasks()).recipe("evaluate")
    assert Run(with_tasks()).recipe("evaluate") == before
    write_choice_task(tmp_path / "tasks", "choose_a_word", QUESTIONS[:9])
    assert Run(with_tasks()).recipe("evaluate") != before


def results(values: list[float], metric: str = "acc", higher: bool | None = True, total: float | None = None) -> Any:
    """What `simple_evaluate` returns for a task with one metric."""
    samples = [{"doc_id": doc, "filter": "none", metric: value} for doc, value in enumerate(values)]
    mean = float(np.mean(values)) if total is None else total
    task = {f"{metric},none": mean, f"{metric}_stderr,none": "N/A", "alias": "quiz", "sample_len": len(values)}
    return {
        "results": {"quiz": task},
        "samples": {"quiz": samples[::-1]},
        "higher_is_better": {"quiz": {metric: higher}},
        "n-samples": {"quiz": {"original": 99, "effective": len(values)}},
    }


def judged(base: Any, student: Any, confidence: float = 0.95) -> tuple[dict[str, Any], Outcome | None]:
    [figure] = compare_results(base, student)["quiz"]["figures"]
    return figure, outcome(figure, confidence)


def test_improvement_and_damage_follow_the_direction_of_the_figure():
    low, high = [0.0, 0.1, 0.0, 0.2] * 10, [1.0, 0.9, 1.0, 1.0] * 10
    assert judged(results(low), results(high))[1] is Outcome.BETTER
    assert judged(results(high), results(low))[1] is Outcome.WORSE
    assert judged(results(low, higher=False), results(high, higher=False))[1] is Outcome.WORSE
    assert judged(results(high, higher=False), results(low, higher=False))[1] is Outcome.BETTER
    assert judged(results(low), results(low))[1] is Outcome.EQUAL
    assert judged(results([0, 1, 0, 1.0]), results([1, 0, 0, 1.0]))[1] is Outcome.UNCLEAR
    assert judged(results(low, higher=None), results(high, higher=None))[1] is None


def test_a_figure_that_is_no_mean_over_questions_is_not_judged():
    figure, found = judged(results([1.0, 2.0], total=7.0), results([2.0, 3.0], total=8.0))
    assert figure["difference"] == 1.0
    assert figure["difference_stderr"] is None
    assert found is None


def test_the_interval_is_the_normal_one():
    figure, _ = judged(results([0.0, 0.0, 1.0, 1.0]), results([1.0, 0.0, 1.0, 1.0]))
    error = np.std([1, 0, 0, 0], ddof=1) / 2
    assert difference_interval(figure, 0.95) == pytest.approx((0.25 - 1.959964 * error, 0.25 + 1.959964 * error))


def test_the_report_names_what_became_worse():
    worse = compare_results(results([1.0] * 9 + [0.9]), results([0.0] * 9 + [0.1]))
    report = {"run": {"confidence": 0.9}, "tasks": {"lm_eval": "0.4.13", "tasks": worse}}
    assert task_summary(report) == ["Tasks of lm-eval, student against base: worse: quiz (acc)."]
    _, rows, note = tasks(report)
    assert "| quiz | 10 | acc, higher is better | 0.99 | 0.01 | -0.98 |" in rows
    assert "one time in 10" in note
    assert tasks({"run": {"confidence": 0.9}, "tasks": None}) == []
