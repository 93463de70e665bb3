"""How the parts of a stage's moments become one peak."""

from __future__ import annotations

from nexus_ray.planning.needs import MIB, Part, StageNeeds, phase


def test_a_gpu_peak_is_its_worst_phase() -> None:
    small, large = phase("small", Part("a", 3)), phase("large", Part("a", 3), Part("b", 4, block=4))
    assert StageNeeds("train", 1, "cuda", 1, (small, large)).peak is large


def test_large_blocks_go_back_to_the_system() -> None:
    """One phase's large buffer does not add to another's."""
    first, second = (phase(name, Part(name, 100 * MIB, block=100 * MIB)) for name in ("first", "second"))
    assert StageNeeds("train", 1, "cpu", 1, (first, second)).peak.total == 100 * MIB


def test_small_blocks_stay_with_the_process() -> None:
    """Heap blocks of one phase are still there, with holes, when another needs large ones."""
    heap = phase("heap", Part("activations", 100 * MIB, block=MIB))
    large = phase("large", Part("logits", 200 * MIB, block=200 * MIB))
    peak = StageNeeds("train", 1, "cpu", 1, (heap, large)).peak
    assert peak.name == "large"
    assert 300 * MIB <= peak.total <= 400 * MIB
    assert peak.parts[-1].name == "kept by the allocator"


def test_empty_parts_are_left_out() -> None:
    assert phase("any", Part("a", 0), Part("b", 1)).parts == (Part("b", 1),)
