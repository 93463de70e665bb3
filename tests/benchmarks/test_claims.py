"""The scripts whose claims can be checked in seconds are run as they are documented."""

from __future__ import annotations

import json
import subprocess
import sys
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
