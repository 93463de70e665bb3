"""Tasks of lm-eval with base and student, through its Python API, on the model that is already loaded.

lm-eval computes every figure and its standard error; nexus-ray adds the difference of the two models, question by
question. https://github.com/EleutherAI/lm-evaluation-harness
"""

from __future__ import annotations

import difflib
import importlib.metadata
import importlib.util
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nexus_ray.cluster import map_over_pool, set_worker_threads
from nexus_ray.config import Config, LmEvalSection
from nexus_ray.errors import ConfigError, DataError
from nexus_ray.layout import RunLayout
from nexus_ray.modeling.loading import LoadedModel
from nexus_ray.storage import Place

_LONGEST = 4096  # tokens, unless the configuration says otherwise: logits of a batch are held whole by lm-eval
_SAME = 1e-9  # by which a mean over questions and the figure that lm-eval reports may differ and still be one thing

Results = Mapping[str, Any]


def check_tasks(section: LmEvalSection | None) -> None:
    """Refuse tasks that cannot be run, before anything else takes its time.

    Raises:
        ConfigError: lm-eval is not installed, or the directory or a task does not exist.
    """
    if section is None:
        return
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(
            "evaluate.lm_eval is set, but the package lm-eval is not installed",
            "pip install 'nexus-ray[eval]', or leave evaluate.lm_eval out",
        )
    if section.include_path is not None and not section.include_path.is_dir():
        raise ConfigError(
            f"evaluate.lm_eval.include_path: {section.include_path} is not a directory",
            "name the one that holds your task files; relative paths start at the working directory",
        )
    known = _task_manager(section).all_tasks
    for name in section.tasks:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            raise ConfigError(
                f"evaluate.lm_eval.tasks: there is no task {name!r}"
                + "".join(f"; did you mean {like!r}?" for like in close),
                "`lm_eval ls tasks` lists lm-eval's own; evaluate.lm_eval.include_path adds yours",
            )


def run_tasks(config: Config, layout: RunLayout) -> dict[str, Any] | None:
    """Run the configured tasks on Ray, a task a piece of work; None without any.

    Returns:
        {lm_eval, tasks}: its version, and by task what `compare_results` returns.
    """
    section = config.evaluate.lm_eval
    if section is None:
        return None
    worker, items = {"config": config, "overlay": layout.overlay}, [{"task": name} for name in section.tasks]
    rows = map_over_pool(TaskRunner, worker, items, config.resources, "lm-eval tasks")
    found = {row["task"]: json.loads(row["results"]) for row in rows}
    tasks = {name: result for asked in section.tasks for name, result in found[asked].items()}
    return {"lm_eval": importlib.metadata.version("lm-eval"), "tasks": tasks}


class TaskRunner:
    """Actor that loads the student once and runs tasks with it and with its base.

    Args:
        config: the run.
        overlay: directory of the student's overlay.
    """

    def __init__(self, config: Config, overlay: Place) -> None:
        from nexus_ray.modeling.loading import load_student

        set_worker_threads(config.resources)
        assert config.evaluate.lm_eval is not None
        self._section = config.evaluate.lm_eval
        self._seed = config.run.seed
        self._student = load_student(config.model, overlay)
        self._manager = _task_manager(self._section)
        self._lm = _wrapped(self._student, self._section, config.evaluate.batch_sequences)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Run one task with both models.

        Raises:
            DataError: it cannot be loaded.
        """
        self._require_loadable(row["task"])
        with self._student.base():
            base = self._run(row["task"])
        return {"task": row["task"], "results": json.dumps(compare_results(base, self._run(row["task"])))}

    def _require_loadable(self, task: str) -> None:
        try:
            self._manager.load([task])
        except Exception as error:  # datasets, YAML and functions of a task file may raise anything
            raise DataError(
                f"lm-eval cannot load the task {task!r}: {type(error).__name__}: {error}",
                "check its file and its data; data from the Hugging Face hub needs a network, or a copy in its cache",
            ) from error

    def _run(self, task: str) -> Results:
        from lm_eval import simple_evaluate

        found = simple_evaluate(
            model=self._lm,
            tasks=[task],
            num_fewshot=self._section.num_fewshot,
            limit=self._section.limit,
            task_manager=self._manager,
            random_seed=self._seed,
            numpy_random_seed=self._seed,
            torch_random_seed=self._seed,
            fewshot_random_seed=self._seed,
        )
        assert found is not None  # it is None on other ranks than the first only
        return dict(found)


def _task_manager(section: LmEvalSection) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=None if section.include_path is None else str(section.include_path))


def _wrapped(loaded: LoadedModel, section: LmEvalSection, batch_size: int) -> Any:
    """The loaded model as lm-eval knows models; what it computes is whatever the loaded one does at the time."""
    from lm_eval.models.huggingface import HFLM

    length = section.max_length or min(int(loaded.config["max_position_embeddings"]), _LONGEST)
    return HFLM(
        pretrained=loaded.model, tokenizer=loaded.tokenizer, backend="causal", batch_size=batch_size, max_length=length
    )


def compare_results(base: Results, student: Results) -> dict[str, Any]:
    """Two results of `simple_evaluate` on the same tasks, as plain data.

    Returns:
        {task: {documents, figures: [{metric, filter, higher_is_better, base, base_stderr, student, student_stderr,
        difference, difference_stderr}]}}. Standard errors are lm-eval's; that of the difference is of the mean of the
        differences question by question, None where the figure is no mean over questions.
    """
    compared = {}
    for task, values in base["results"].items():
        figures = [_figure(key, task, base, student) for key in values if _is_figure(key, values)]
        if figures:
            compared[task] = {"documents": base["n-samples"].get(task, {}).get("effective"), "figures": figures}
    return compared


def _is_figure(key: str, values: Results) -> bool:
    metric, _, chosen = key.partition(",")
    return bool(chosen) and not metric.endswith("_stderr") and isinstance(values[key], int | float)


def _figure(key: str, task: str, base: Results, student: Results) -> dict[str, Any]:
    metric, _, chosen = key.partition(",")
    values = [float(results["results"][task][key]) for results in (base, student)]
    errors = [_number(results["results"][task].get(f"{metric}_stderr,{chosen}")) for results in (base, student)]
    return {
        "metric": metric,
        "filter": chosen,
        "higher_is_better": base["higher_is_better"].get(task, {}).get(metric),
        "base": _number(values[0]),
        "base_stderr": errors[0],
        "student": _number(values[1]),
        "student_stderr": errors[1],
        "difference": _number(values[1] - values[0]),
        "difference_stderr": _paired_error(key, task, base, student),
    }


def _number(value: Any) -> float | None:
    """A finite number, or None: lm-eval says "N/A" where it has no standard error."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _paired_error(key: str, task: str, base: Results, student: Results) -> float | None:
    """Standard error of the mean of the differences between two models on the same questions."""
    pair = [_by_question(key, task, results) for results in (base, student)]
    if pair[0] is None or pair[1] is None or pair[0].keys() != pair[1].keys() or len(pair[0]) < 2:
        return None
    difference: NDArray[np.float64] = np.asarray([pair[1][doc] - pair[0][doc] for doc in pair[0]])
    return float(difference.std(ddof=1) / math.sqrt(len(difference)))


def _by_question(key: str, task: str, results: Results) -> dict[int, float] | None:
    """A figure's value on each question, where the figure is their mean."""
    metric, _, chosen = key.partition(",")
    samples = [sample for sample in results.get("samples", {}).get(task, ()) if sample.get("filter", chosen) == chosen]
    values = {int(sample["doc_id"]): sample.get(metric) for sample in samples}
    if not values or not all(isinstance(value, int | float) for value in values.values()):
        return None
    found = {doc: float(value) for doc, value in values.items() if value is not None}
    is_mean = abs(np.mean(list(found.values())) - results["results"][task][key]) < _SAME
    return found if is_mean else None
