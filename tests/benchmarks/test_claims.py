"""The scripts whose claims can be checked in seconds are run as they are documented."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def result_of(script: str, *arguments: str) -> dict[str, Any]:
    """The last line that a script prints."""
    command = [sys.executable, str(ROOT / "benchmarks" / script), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_the_plan_is_within_15_percent_of_a_training_worker() -> None:
    result = result_of("plan_accuracy.py", "--shape", "tiny", "--steps", "3")
    assert result["within_15_percent"], result


def test_unpacking_gives_the_bits_of_transformers() -> None:
    assert result_of("dequantize.py", "--experts", "1", "--repeats", "1")["max_abs_difference"] == 0


def test_packed_experts_agree_with_stock_ones_at_true_size() -> None:
    result = result_of("packed_vs_stock.py", "--experts", "4", "--tokens", "8", "--repeats", "1")
    for kind in ("forward", "forward_backward"):
        for name in ("eager", "grouped_mm"):
            assert result["by_tokens"]["8"][kind][name]["cosine_with_packed"] > 0.9999


def test_the_headline_against_peft_takes_its_best_settings_without_our_loss(script: Callable[[str], Any]) -> None:
    def record(seconds: float, peak: float) -> dict[str, float]:
        return {"seconds": seconds, "peak_bytes": peak}

    found = script("training_vs_peft").ratios(
        {
            "shared_expert": record(2, 10),
            "attention-eager-transformers": record(3, 40),
            "experts-grouped_mm-transformers": record(4, 25),
            "attention-eager-fused": record(1, 20),
        }
    )
    assert (found["memory_ratio"], found["throughput_ratio"]) == (10 / 25, 3 / 2)
    assert found["against"]["attention"] == {"memory_ratio": 10 / 40, "throughput_ratio": 3 / 2}
    assert found["against"]["experts"] == {"memory_ratio": 10 / 25, "throughput_ratio": 4 / 2}
    assert found["against"]["with_our_loss"] == {"memory_ratio": 10 / 20, "throughput_ratio": 1 / 2}
