"""Memory of conversion: one layer in the making, and for `lstsq` the base over its calibration text."""

from __future__ import annotations

from nexus_ray.planning.needs import MIB, Part, Phase, StageNeeds, phase
from nexus_ray.planning.weights import overlay_width
from nexus_ray.planning.worker import FLOAT32, Worker

# RssAnon of `nexus-ray convert` after its last layer: imports, tables, stacks and arenas of threads.
CONVERT_PROCESS = 285 * MIB
_FITTED_TOKENS = 1024  # that `lstsq` turns into features at once


def convert_needs(worker: Worker) -> StageNeeds:
    """Conversion streams layer by layer in one process on the CPU; `lstsq` also runs the base."""
    if worker.config.convert.initialisation == "lstsq":
        return worker.stage("convert", 1, _least_squares)
    parts = (
        Part("process", CONVERT_PROCESS, "interpreter, torch, threads"),
        Part("one layer", _layer_in_the_making(worker), "matrices in float32; one layer at a time"),
    )
    return StageNeeds("convert", 1, "cpu", 1, (phase("averaging", *parts),))


def _layer_in_the_making(worker: Worker) -> int:
    """Bytes of one layer's float32 matrices, in the worst moment of making it.

    From experts: gate and up, and the down projection as summed, arranged and scaled. While they are aligned: the
    reference, the total and the next one, copies of the gates and ups of two, and three [width, width] similarities.
    Of another width: the expert as it was and as it becomes.
    """
    hidden, inner = worker.sizes.dimensions.hidden_size, worker.sizes.dimensions.intermediate_size
    method, width = worker.config.convert.initialisation, overlay_width(worker.sizes, worker.config)
    resized = (3 + 1) * hidden * width
    if method in ("zero", "random"):
        return resized * FLOAT32
    made = ((3 * 3 + 2 * 2) * hidden + 3 * inner) * inner if method.startswith("aligned_") else 5 * hidden * inner
    return max(made, 3 * hidden * inner + resized if width != inner else 0) * FLOAT32


def _least_squares(worker: Worker) -> list[Phase]:
    """The base, a batch of calibration text, and the normal equations of one layer in float64."""
    sequences, hidden = worker.config.convert.calibration_sequences, worker.sizes.dimensions.hidden_size
    width, tokens = overlay_width(worker.sizes, worker.config), sequences * worker.config.data.sequence_length
    equations = (3 * width * width + 2 * width * hidden) * 8
    features = min(tokens, _FITTED_TOKENS) * (3 * width + hidden) * FLOAT32
    calibration = Part("calibration", equations + features, "features, normal equations, factor")
    layer = Part("one layer", _layer_in_the_making(worker), "matrices in float32; one layer at a time")
    return [phase("fitting", *worker.fixed(), worker.forward(sequences), calibration, layer)]
