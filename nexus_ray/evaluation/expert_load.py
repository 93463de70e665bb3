"""How the experts share the work in base and student: shares of selections, layer by layer."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from nexus_ray.router.comparison import total_variation


def compare_loads(base: NDArray[np.integer], student: NDArray[np.integer]) -> dict[str, list[Any]]:
    """Loads of two models on the same tokens.

    Args:
        base: [layers, experts] how often the base selected each expert.
        student: the same of the student.

    Returns:
        By layer: `total_variation`, the share of selections that went to other experts; `largest_ratio`, the largest
        factor by which one expert's selections rose or fell, each count taken one higher so that an expert that one
        model never selects has a finite one; `expert`, which expert that is; `base_peak` and `student_peak`, the
        selections of the busiest expert as a multiple of an even share: 1 where all are equally busy.
    """
    ratios = np.abs(np.log((student + 1) / (base + 1)))
    shares = [counts / counts.sum(axis=1, keepdims=True) for counts in (base, student)]
    peaks = [share.max(axis=1) * base.shape[1] for share in shares]
    return {
        "total_variation": total_variation(*shares).tolist(),
        "largest_ratio": np.exp(ratios.max(axis=1)).tolist(),
        "expert": ratios.argmax(axis=1).tolist(),
        "base_peak": peaks[0].tolist(),
        "student_peak": peaks[1].tolist(),
    }
