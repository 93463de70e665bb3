"""The shared expert against other ways to adapt the same frozen base: the same tokens, order, objective, evaluation.

Every method learns Shakespeare by cross-entropy and keeps speeches and code by KL to the base, with the weights of
configs/demo.yaml: the shared expert with nine of its ten initialisations (`reap_topK` needs packed experts, the base is
dequantised here) and in variants, LoRA on attention and on all experts (PEFT), MoE-Sieve (LoRA on the most-routed
quarter of the experts, arXiv:2603.24044), ESFT-style (whole experts with the most gate mass, arXiv:2407.01906) and the
routers alone; at the shared expert's number of trainable parameters and at each method's usual setting. The learning
rate of each method is chosen by the objective on validation sequences of the training text; then come `--seeds` runs on
held-out text. Needs `pip install 'nexus-ray[peft]'`.

The table of docs/comparison.md, in about two hours of two cores:

    python benchmarks/comparison.py --workers 2 --write-docs

and a small version of it in less than ten minutes:

    python benchmarks/comparison.py --quick --workers 2

A finished run is one file in `--directory`; the same command continues what was stopped. Memory and speed are measured
at the end, one method at a time, on an otherwise idle machine. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

import ray
from _common import command_line, print_result
from _comparison.measuring import measure_all
from _comparison.methods import METHODS, QUICK, Method
from _comparison.results import load_results
from _comparison.settings import ROOT, Settings
from _comparison.tables import summary, tables, write_docs
from _comparison.text import prepare_text
from _comparison.training import Run, run_one
from _comparison.tuning import next_runs, tuned_of

from nexus_ray.pipeline import run_pipeline


def outstanding(
    methods: Sequence[Method], results: Mapping[Run, float | None], seeds: int, *, search: bool
) -> list[Run]:
    """Runs without a result that can be started now, those of the first methods first."""
    wanted = [
        run for method in methods for run in next_runs(method, tuned_of(results, method.name), seeds, search=search)
    ]
    return [run for run in wanted if run not in results]


def run_all(methods: Sequence[Method], settings: Settings, workers: int, *, search: bool) -> None:
    """Do every run that has no result yet, `workers` at a time, each in a process with one thread."""
    results = {run: result.get("objective") for run, result in load_results(settings).items()}
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    running: dict[Future[dict[str, Any]], Run] = {}
    try:
        while True:
            todo = outstanding(methods, results, settings.seeds, search=search)
            for run in [run for run in todo if run not in running.values()][: workers - len(running)]:
                running[pool.submit(run_one, run, settings)] = run
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                run = running.pop(future)
                results[run] = future.result().get("objective")
                print(f"{run}: objective {results[run]}", flush=True)
    finally:
        pool.shutdown(cancel_futures=True)


def main() -> None:
    """Do what is left of the comparison and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, help="of the results; default: below build/")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, of one thread each")
    parser.add_argument("--seeds", type=int, help="runs of each method at its learning rate; default: 4, quick: 2")
    parser.add_argument("--quick", action="store_true", help="six methods, fewer steps, seeds and learning rates")
    parser.add_argument("--only", nargs="+", choices=METHODS, help="these methods")
    parser.add_argument("--no-measure", action="store_true", help="leave out memory and speed")
    parser.add_argument("--write-docs", action="store_true", help="put the tables into docs/comparison.md")
    arguments = parser.parse_args()
    with command_line():
        settings = _settings(arguments)
        methods = [METHODS[name] for name in arguments.only or (QUICK if arguments.quick else METHODS)]
        settings.claim()
        run_pipeline(settings.config, last="select")
        ray.shutdown()  # what follows takes hours and needs none of it
        prepare_text(settings)
        run_all(methods, settings, arguments.workers, search=not arguments.quick)
        measured = {} if arguments.no_measure else measure_all(methods, settings)
        results = load_results(settings)
        print(tables(methods, results, measured, settings))
        if arguments.write_docs:
            write_docs(ROOT / "docs" / "comparison.md", tables(methods, results, measured, settings))
        print_result(summary(methods, results, measured, settings))


def _settings(arguments: argparse.Namespace) -> Settings:
    if arguments.quick:
        directory = arguments.directory or ROOT / "build" / "comparison-quick"
        return Settings(directory, steps=16, train_sequences=96, test_sequences=16, seeds=arguments.seeds or 2)
    return Settings(arguments.directory or ROOT / "build" / "comparison", seeds=arguments.seeds or 4)


if __name__ == "__main__":
    main()
