"""How the experts share the work in base and student: shares of selections, layer by layer."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from nexus_ray.router.comparison import total_variation

# Added to both loads before they are divided: an expert that hardly any token goes to does not decide what changed
# most, and one that goes out of use has a finite factor.
_FLOOR = 0.01


def compare_loads(base: NDArray[np.integer], student: NDArray[np.integer]) -> dict[str, list[Any]]:
    """Loads of two models on the same tokens.

    Args:
        base: [layers, experts] how often the base selected each expert.
        student: the same of the student.

    Returns:
        By layer: `total_variation`, the share of selections that went to other experts; `largest_ratio`, the largest
        factor by which one expert's load rose or fell, see `_FLOOR`; `expert`, which expert that is; `base_peak` and
        `student_peak`, the load of the busiest expert. A load is a multiple of an even share: 1 where all are equally
        busy.
    """
    shares = [counts / counts.sum(axis=1, keepdims=True) for counts in (base, student)]
    loads = [share * base.shape[1] for share in shares]
    ratios = np.abs(np.log((loads[1] + _FLOOR) / (loads[0] + _FLOOR)))
    return {
        "total_variation": total_variation(*shares).tolist(),
        "largest_ratio": np.exp(ratios.max(axis=1)).tolist(),
        "expert": ratios.argmax(axis=1).tolist(),
        "base_peak": loads[0].max(axis=1).tolist(),
        "student_peak": loads[1].max(axis=1).tolist(),
    }
