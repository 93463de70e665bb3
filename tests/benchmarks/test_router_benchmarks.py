"""benchmarks/router_moments.py and collect_overhead.py: fair to what they compare with, clear about what they need."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sklearn.decomposition import IncrementalPCA

ROOT = Path(__file__).parents[2]


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / script), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, check=False, text=True)


def test_moments_of_few_rows_agree_with_the_reference_and_with_every_streaming_batch() -> None:
    done = run("router_moments.py", "--rows", "5000", "--experts", "16", "--threads", "1")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["max_relative_eigenvalue_error"] < 1e-5
    assert result["collect_max_relative_eigenvalue_error"] < 1e-5
    assert result["incremental_pca_max_relative_eigenvalue_error"] < 1e-3


@pytest.mark.parametrize("rows", [1000, 1003, 1019, 1021])
def test_incremental_pca_sees_every_row_as_its_own_fit_does(script, rows) -> None:
    values = np.random.default_rng(0).normal(size=(rows, 24)).astype(np.float32)
    found = script("router_moments").incremental_pca(values, 100)
    own = IncrementalPCA(20, batch_size=100).fit(values)
    assert found.n_samples_seen_ == rows
    np.testing.assert_allclose(found.explained_variance_, own.explained_variance_, rtol=1e-6)


def test_batch_sizes_are_compared_on_the_same_number_of_rows(script, monkeypatch) -> None:
    benchmark = script("router_moments")
    seen = {}

    def incremental_pca(rows, batch):
        seen[batch] = len(rows)

    seconds = {2048: 3.0, 8192: 1.0, 32_768: 2.0}

    def timed(work):
        work()
        return None, seconds[max(seen, key=list(seen).index)]

    monkeypatch.setattr(benchmark, "incremental_pca", incremental_pca)
    monkeypatch.setattr(benchmark, "timed", timed)
    assert benchmark.best_batch(np.zeros((70_000, 2), np.float32)) == 8192
    assert set(seen.values()) == {65_536}
    assert all(65_536 % batch == 0 for batch in seen)


def test_fewer_rows_than_components_are_refused() -> None:
    done = run("router_moments.py", "--rows", "20", "--experts", "128")
    assert done.returncode == 2
    assert "--rows 20 is too few for 20 components" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_least_number_of_rows_works() -> None:
    done = run("router_moments.py", "--rows", "21", "--experts", "128", "--threads", "1")
    assert done.returncode == 0, done.stderr


def test_rounds_that_only_warm_up_are_refused() -> None:
    done = run("collect_overhead.py", "--rounds", "3")
    assert done.returncode == 2
    assert "--rounds 3: the first 3 only warm up" in done.stderr
    assert "Traceback" not in done.stderr


def test_too_little_text_to_compare_on_is_refused(script, micro_config, tmp_path, in_process) -> None:
    from nexus_ray.errors import ConfigError
    from nexus_ray.layout import RunLayout
    from nexus_ray.router.calibration import choose_calibration

    benchmark = script("collect_overhead")
    for tokens, fits in ((64, False), (4096, True)):
        config = micro_config(tmp_path / str(tokens), **{"collect.tokens": tokens})
        calibration = choose_calibration(config, RunLayout(config.run.directory).calibration)
        if fits:
            benchmark.check_text(config, calibration)
        else:
            with pytest.raises(ConfigError, match="--tokens 64 gives 2 unit"):
                benchmark.check_text(config, calibration)
