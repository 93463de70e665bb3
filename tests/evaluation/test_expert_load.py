"""Loads of experts against counts made by hand."""

from __future__ import annotations

import numpy as np
import pytest

from nexus_ray.evaluation.expert_load import compare_loads


def test_two_layers_by_hand():
    base = np.asarray([[50, 30, 20, 0], [25, 25, 25, 25]])
    student = np.asarray([[40, 30, 20, 10], [25, 25, 25, 25]])
    found = compare_loads(base, student)
    assert found["total_variation"] == pytest.approx([0.1, 0.0])
    assert found["largest_ratio"] == pytest.approx([0.41 / 0.01, 1.0])
    assert found["expert"][0] == 3
    assert found["base_peak"] == pytest.approx([2.0, 1.0])
    assert found["student_peak"] == pytest.approx([1.6, 1.0])


def test_a_fall_counts_as_much_as_a_rise():
    base, student = np.asarray([[100, 100, 200]]), np.asarray([[100, 50, 250]])
    assert compare_loads(base, student)["expert"] == [1]
    assert compare_loads(base, student)["largest_ratio"] == pytest.approx([0.76 / 0.385])
    assert compare_loads(student, base)["largest_ratio"] == pytest.approx([0.76 / 0.385])


def test_more_of_the_same_text_changes_nothing():
    base, student = np.asarray([[50, 30, 20, 0]]), np.asarray([[40, 30, 20, 10]])
    assert compare_loads(7 * base, 7 * student) == compare_loads(base, student)


def test_an_expert_that_hardly_any_token_goes_to_does_not_decide_what_changed_most():
    base, student = np.asarray([[500_000, 300_000, 0]]), np.asarray([[400_000, 400_000, 49]])
    assert compare_loads(base, student)["expert"] == [1]


def test_an_expert_that_fell_out_of_use_has_a_finite_factor():
    found = compare_loads(np.asarray([[1000, 500]]), np.asarray([[1500, 0]]))
    assert found["expert"] == [1]
    assert found["largest_ratio"] == pytest.approx([(2 / 3 + 0.01) / 0.01])


def test_the_report_has_the_loads_of_the_selections_that_the_routers_made(scored, trained):
    import torch

    from nexus_ray.data.packing import pack_shard
    from nexus_ray.data.sources import list_shards
    from nexus_ray.layout import RunLayout
    from nexus_ray.modeling.loading import load_student

    found = scored().sources["play"]["router_load"]
    config = trained()
    student = load_student(config.model, RunLayout(config.run.directory).overlay)
    counts = torch.zeros(2, 2, 8)
    for shard in list_shards(config.data, "heldout", ("play",)):
        for sequence in pack_shard(shard, student.tokenizer, config.data.sequence_length):
            ids = torch.from_numpy(sequence.input_ids[: sequence.num_tokens]).long()[None]
            with torch.no_grad():
                logits = student.forward(ids, torch.ones_like(ids, dtype=torch.bool))[1]
                with student.base():
                    base_logits = student.forward(ids, torch.ones_like(ids, dtype=torch.bool))[1]
            for model, values in enumerate((base_logits, logits)):
                for layer in range(2):
                    chosen = values[0, :, layer].topk(2).indices.flatten()
                    counts[model, layer] += torch.bincount(chosen, minlength=8)
    shares = counts / counts.sum(-1, keepdim=True)
    assert found["total_variation"] == pytest.approx(((shares[0] - shares[1]).abs().sum(-1) / 2).tolist(), abs=1e-3)
    assert found["student_peak"] == pytest.approx((8 * shares[1].amax(-1)).tolist(), abs=1e-2)
