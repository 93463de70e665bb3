"""`nexus-ray drift`: student against base on the calibration text, and refusals to compare what differs otherwise."""

import shutil

import pytest
from rich.console import Console

from nexus_ray.checkpoints.fingerprint import fingerprint
from nexus_ray.checkpoints.overlay import load_overlay, save_overlay
from nexus_ray.errors import ArtefactError
from nexus_ray.evaluation.calibration_drift import drift_table, measure_drift
from nexus_ray.layout import RunLayout
from nexus_ray.router.artefact import RouterStatistics
from nexus_ray.router.calibration import choose_calibration
from nexus_ray.router.collect import collect
from nexus_ray.router.comparison import compare_routers
from nexus_ray.storage import read_json, sha256_file


@pytest.fixture
def observed(micro_config, tmp_path, in_process):
    """A function (**overrides) -> (config, layout) of a run whose base has been observed."""

    def make(**overrides):
        config = micro_config(tmp_path / "run", **overrides)
        layout = RunLayout(config.run.directory)
        collect(config, layout)
        return config, layout

    return make


def test_the_result_is_the_comparison_of_both_statistics_and_is_kept(observed, micro_overlay):
    config, layout = observed()
    base = sha256_file(layout.router_stats)
    result = measure_drift(config, layout, micro_overlay)
    assert read_json(layout.router_drift, what="drift", hint="") == result
    assert sha256_file(layout.router_stats) == base
    pair = [RouterStatistics.load(path).sources for path in (layout.router_stats, layout.student_router_stats)]
    for name in ("play", "prose"):
        expected = compare_routers(pair[0][name], pair[1][name])
        assert result[name]["usage_distance"] == [layer.usage_distance for layer in expected]
        assert max(result[name]["usage_distance"]) > 0


def test_the_trained_overlay_is_the_default(observed, micro_overlay):
    config, layout = observed()
    with pytest.raises(ArtefactError, match="no overlay") as caught:
        measure_drift(config, layout)
    assert "nexus-ray train" in str(caught.value.hint)
    shutil.copytree(micro_overlay, layout.overlay)
    assert set(measure_drift(config, layout)) == {"play", "prose"}


def test_probabilities_that_were_exported_of_the_base_stay(observed, micro_overlay):
    config, layout = observed(**{"collect.export_probabilities": 100})
    before = sha256_file(layout.router_probabilities)
    measure_drift(config, layout, micro_overlay)
    assert sha256_file(layout.router_probabilities) == before


@pytest.mark.parametrize(
    ("override", "what"),
    [({"model.dtype": "bfloat16"}, "way of computing"), ({"model.experts": "grouped_mm"}, "way of computing")],
)
def test_a_student_computed_in_another_way_is_not_compared(override, what, observed, micro_config, micro_overlay):
    config, layout = observed()
    with pytest.raises(ArtefactError, match=what):
        measure_drift(micro_config(config.run.directory, **override), layout, micro_overlay)


def test_text_chosen_again_since_is_not_compared(observed, micro_config, micro_overlay):
    config, layout = observed()
    choose_calibration(micro_config(config.run.directory, **{"run.seed": 7}), layout.calibration)
    with pytest.raises(ArtefactError, match="another calibration text"):
        measure_drift(config, layout, micro_overlay)


def test_another_seed_in_the_configuration_changes_no_text(observed, micro_config, micro_overlay):
    config, layout = observed()
    before = sha256_file(layout.calibration)
    measure_drift(micro_config(config.run.directory, **{"run.seed": 7}), layout, micro_overlay)
    assert sha256_file(layout.calibration) == before


def test_an_overlay_that_diverged_is_named_not_the_base(observed, micro_overlay, tmp_path, micro_model):
    config, layout = observed(**{"model.dtype": "float32"})
    description, tensors = load_overlay(micro_overlay, fingerprint(micro_model))
    broken = {name: tensor * 1e38 if "down_proj" in name else tensor for name, tensor in tensors.items()}
    save_overlay(tmp_path / "diverged", description, broken)
    with pytest.raises(ArtefactError, match=r"the overlay diverged: .* of layer \d "):
        measure_drift(config, layout, tmp_path / "diverged")


def test_the_table_has_a_row_a_source_and_survives_an_empty_half(observed, micro_overlay):
    config, layout = observed()
    result = measure_drift(config, layout, micro_overlay)
    result["prose"]["halves_distance"] = [None, None]
    console = Console(width=120, record=True)
    console.print(drift_table(result))
    text = console.export_text()
    assert "play" in text
    assert "prose" in text
