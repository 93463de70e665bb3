"""The parts of benchmarks/convert_true_shape.py that its claims rest on."""

import os
import sys
from pathlib import Path

import pytest

from nexus_ray.errors import ConfigError, NexusError


@pytest.fixture(scope="module")
def benchmark(script):
    return script("convert_true_shape")


@pytest.fixture
def sparse_file(tmp_path) -> Path:
    """Data, a hole of a megabyte, data, and a hole to the end."""
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.write(b"first" * 2000)
        file.seek(1 << 20)
        file.write(b"second" * 2000)
        file.truncate(4 << 20)
    return path


@pytest.mark.parametrize("place", [3, (1 << 20) + 7, 3 << 20])
def test_the_digest_of_a_sparse_file_sees_any_changed_byte(benchmark, sparse_file, place):
    before = benchmark.digest_filled(sparse_file)
    assert benchmark.digest_filled(sparse_file) == before
    with sparse_file.open("r+b") as file:
        file.seek(place)
        file.write(b"!")
    assert benchmark.digest_filled(sparse_file) != before


def test_the_digest_sees_a_changed_size(benchmark, sparse_file):
    before = benchmark.digest_filled(sparse_file)
    os.truncate(sparse_file, 5 << 20)
    assert benchmark.digest_filled(sparse_file) != before


def test_a_process_is_measured_to_its_peak(benchmark):
    program = "import time; held = bytearray(200 << 20); time.sleep(0.2)"
    measured = benchmark.measure([sys.executable, "-c", program])
    assert 200 << 20 < measured.peak_rss_bytes < 300 << 20  # not what this process holds
    assert 200 << 20 < measured.peak_anonymous_bytes < 300 << 20
    assert 0.2 < measured.seconds < 20


def test_a_command_that_fails_is_an_error(benchmark):
    with pytest.raises(NexusError, match="exit code 3"):
        benchmark.measure([sys.executable, "-c", "raise SystemExit(3)"])


def test_the_selection_holds_what_the_method_reads(benchmark):
    assert benchmark.ranking_of("pca_top24") == ("pca", 24)
    assert benchmark.ranking_of("aligned_top3") == ("pca", 3)
    assert benchmark.ranking_of("reap_top8") == ("reap", 8)
    assert benchmark.ranking_of("top4_average") == ("usage", 4)
    with pytest.raises(ConfigError, match="lstsq is not measured"):
        benchmark.ranking_of("lstsq")
