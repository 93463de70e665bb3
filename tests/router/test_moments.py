"""Router moments against numpy's two-pass formulas on the whole data."""

import errno
from functools import reduce
from pathlib import Path

import numpy as np
import pytest
import torch

from nexus_ray.errors import ArtefactError, DataError, StorageError
from nexus_ray.modeling.packed_experts import ExpertNorms
from nexus_ray.router.accumulate import comoments, moments_of_logits
from nexus_ray.router.moments import RouterMoments, pack_symmetric, unpack_symmetric

LAYERS, EXPERTS, TOP_K, LENGTH = 3, 8, 2, 16


def make_logits(sequences: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(sequences, LENGTH, LAYERS, EXPERTS, generator=generator) * 2


def make_valid(sequences: int, seed: int = 0) -> np.ndarray:
    lengths = np.random.default_rng(seed).integers(1, LENGTH + 1, sequences)
    return np.arange(LENGTH) < lengths[:, None]


def make_norms(sequences: int, seed: int = 0) -> list[ExpertNorms]:
    """Random contributions of the experts that `make_logits` selects."""
    generator = torch.Generator().manual_seed(seed + 100)
    selected = make_logits(sequences, seed).flatten(0, 1).topk(TOP_K, dim=-1).indices
    contributions = torch.rand(sequences * LENGTH, LAYERS, TOP_K, generator=generator)
    return [ExpertNorms(selected[:, layer], contributions[:, layer]) for layer in range(LAYERS)]


def moments_of(logits: torch.Tensor, valid: np.ndarray, half: np.ndarray) -> RouterMoments:
    return moments_of_logits(logits, valid, half, TOP_K)


def softmax(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def test_moments_equal_two_pass_formulas_in_each_half():
    logits, valid, half = make_logits(10), make_valid(10), np.arange(10) % 2
    moments = moments_of(logits, valid, half)
    for part in (0, 1):
        rows = logits.double().numpy()[half == part][valid[half == part]]
        assert moments.count[part] == len(rows)
        for layer in range(LAYERS):
            probabilities = softmax(rows[:, layer])
            np.testing.assert_allclose(moments.mean[part, layer], probabilities.mean(0), rtol=1e-6)
            covariance = np.cov(probabilities, rowvar=False)
            np.testing.assert_allclose(
                moments.covariance()[part, layer], covariance, atol=1e-7 * covariance.max(), rtol=1e-6
            )


def test_selection_counts_and_gate_mass_follow_the_router_token_by_token():
    logits, valid = make_logits(4), make_valid(4)
    moments = moments_of(logits, valid, np.zeros(4, int))
    selected = np.zeros((LAYERS, EXPERTS), int)
    together = np.zeros((LAYERS, EXPERTS, EXPERTS), int)
    mass = np.zeros((LAYERS, EXPERTS))
    for token in logits.double().numpy()[valid]:
        for layer, row in enumerate(token):
            best = np.argsort(-row)[:TOP_K]
            selected[layer, best] += 1
            together[layer][np.ix_(best, best)] += 1
            mass[layer, best] += softmax(row[best])
    np.testing.assert_array_equal(moments.selected[0], selected)
    np.testing.assert_array_equal(moments.co_selection()[0], together)
    np.testing.assert_allclose(moments.gate_mass[0], mass, rtol=1e-6)
    assert not moments.selected[1].any()
    np.testing.assert_allclose(moments.usage()[0], selected / selected.sum(axis=1, keepdims=True), rtol=1e-15)


def reap_by_hand(sequences: list[int], norms: list[ExpertNorms], valid: np.ndarray) -> np.ndarray:
    """[layers, experts] sum and [layers, experts] count, token by token."""
    sums = np.zeros((2, LAYERS, EXPERTS))
    for sequence in sequences:
        for position in np.flatnonzero(valid[sequence]):
            token = sequence * LENGTH + int(position)
            for layer, record in enumerate(norms):
                for expert, value in zip(record.indices[token], record.contributions[token], strict=True):
                    sums[:, layer, int(expert)] += (float(value), 1)
    return sums


def test_reap_is_the_mean_contribution_to_the_tokens_an_expert_got_in_each_half():
    logits, valid, half, norms = make_logits(6), make_valid(6), np.arange(6) % 2, make_norms(6)
    moments = moments_of_logits(logits, valid, half, TOP_K, norms)
    assert moments.has_reap
    for part in (0, 1):
        total, count = reap_by_hand([i for i in range(6) if half[i] == part], norms, valid)
        np.testing.assert_allclose(moments.reap[part], total, rtol=1e-6)
        np.testing.assert_allclose(moments.saliency()[part], total / np.maximum(count, 1), rtol=1e-6)


def test_reap_of_merged_batches_is_that_of_all_tokens():
    logits, valid, norms = make_logits(6), make_valid(6), make_norms(6)
    tokens = torch.arange(6 * LENGTH).view(6, LENGTH)
    parts = []
    for chunk in ([0, 1, 2], [3], [4, 5]):
        rows = tokens[chunk].flatten()
        mine = [ExpertNorms(record.indices[rows], record.contributions[rows]) for record in norms]
        parts.append(moments_of_logits(logits[chunk], valid[chunk], np.array(chunk) % 2, TOP_K, mine))
    merged = reduce(RouterMoments.merge, parts, RouterMoments.empty(LAYERS, EXPERTS)).both_halves()
    np.testing.assert_allclose(merged.reap[0], reap_by_hand(list(range(6)), norms, valid)[0], rtol=1e-6)


def test_without_recorded_outputs_there_is_no_saliency_even_after_merging():
    logits, valid, half = make_logits(4), make_valid(4), np.arange(4) % 2
    without = moments_of(logits, valid, half)
    merged = moments_of_logits(logits, valid, half, TOP_K, make_norms(4)).merge(without)
    for moments in (without, merged):
        assert not moments.has_reap
        with pytest.raises(ArtefactError, match="no expert output norms") as caught:
            moments.saliency()
        assert "model.experts=packed" in caught.value.hint


def test_padding_has_no_part_in_reap_and_a_broken_output_is_an_error():
    logits, valid, norms = make_logits(4), make_valid(4), make_norms(4)
    padding = torch.from_numpy(~valid).flatten()
    for record in norms:
        record.contributions[padding] = torch.nan
    assert moments_of_logits(logits, valid, np.zeros(4, int), TOP_K, norms).has_reap
    norms[1].contributions[~padding] = torch.inf
    with pytest.raises(DataError, match="outputs of layer 1 are NaN or infinite in sequence 0, token 0"):
        moments_of_logits(logits, valid, np.zeros(4, int), TOP_K, norms)


@pytest.mark.parametrize("seed", range(20))
def test_merging_any_split_equals_the_whole(seed):
    rng = np.random.default_rng(seed)
    sequences = int(rng.integers(2, 25))
    logits, valid = make_logits(sequences, seed), make_valid(sequences, seed)
    half = rng.integers(0, 2, sequences)
    cuts = np.sort(rng.integers(0, sequences + 1, int(rng.integers(1, 6))))
    chunks = np.split(np.arange(sequences), cuts)  # some of them empty
    parts = [moments_of(logits[chunk], valid[chunk], half[chunk]) for chunk in chunks]
    merged = reduce(RouterMoments.merge, parts, RouterMoments.empty(LAYERS, EXPERTS))
    for part in (0, 1):
        rows = softmax(logits.double().numpy()[half == part][valid[half == part]])
        assert merged.count[part] == len(rows)
        if len(rows):
            centred = rows - rows.mean(0)
            m2 = np.einsum("tle,tlf->lef", centred, centred)
            np.testing.assert_allclose(merged.m2[part], pack_symmetric(m2), rtol=1e-6, atol=1e-7 * m2.max())
            np.testing.assert_allclose(merged.mean[part], rows.mean(0), rtol=1e-6)


def test_both_halves_are_the_moments_of_all_tokens():
    logits, valid = make_logits(9), make_valid(9)
    whole = moments_of(logits, valid, np.arange(9) % 2).both_halves()
    probabilities = softmax(logits.double().numpy()[valid])
    assert whole.tokens == len(probabilities)
    for layer in range(LAYERS):
        reference = np.cov(probabilities[:, layer], rowvar=False)
        np.testing.assert_allclose(whole.covariance()[0, layer], reference, rtol=1e-6, atol=1e-7 * reference.max())
        np.testing.assert_array_equal(whole.layer(layer).covariance()[0, 0], whole.covariance()[0, layer])


def test_padding_never_counts_whatever_it_holds():
    logits, valid = make_logits(4), make_valid(4)
    filled = logits.clone()
    filled[torch.from_numpy(~valid)] = float("nan")
    clean = moments_of(logits, valid, np.arange(4) % 2).arrays()
    for name, values in moments_of(filled, valid, np.arange(4) % 2).arrays().items():
        np.testing.assert_array_equal(values, clean[name])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_broken_logit_names_layer_and_sequence(value):
    logits = make_logits(4)
    logits[3, 5, 1, 2] = value
    with pytest.raises(DataError, match="layer 1 are NaN or infinite in sequence 3, token 5"):
        moments_of(logits, np.ones((4, LENGTH), bool), np.zeros(4, int))


@pytest.mark.parametrize(
    ("broken_logits", "broken_outputs", "message"),
    [
        ([(0, 5, 2), (1, 0, 1)], [], "router logits of layer 1 are NaN or infinite in sequence 1, token 0"),
        ([(0, 2, 2)], [(3, 1, 1)], "expert outputs of layer 1 are NaN or infinite in sequence 3, token 1"),
        ([(2, 2, 1)], [(2, 1, 1)], "router logits of layer 1 are NaN or infinite in sequence 2, token 2"),
        ([(2, 2, 0)], [(0, 0, 0), (0, 0, 2)], "router logits of layer 0 are NaN or infinite in sequence 2, token 2"),
    ],
)
def test_the_first_layer_that_breaks_is_named_its_router_before_its_experts(broken_logits, broken_outputs, message):
    logits, norms = make_logits(4), make_norms(4)
    for sequence, token, layer in broken_logits:
        logits[sequence, token, layer, 0] = torch.nan
    for sequence, token, layer in broken_outputs:
        norms[layer].contributions[sequence * LENGTH + token, 1] = torch.inf
    with pytest.raises(DataError, match=message):
        moments_of_logits(logits, np.ones((4, LENGTH), bool), np.zeros(4, int), TOP_K, norms)


def test_covariance_of_a_single_token_is_refused():
    valid = np.zeros((2, LENGTH), bool)
    valid[:, 0] = True
    with pytest.raises(DataError, match="no covariance"):
        moments_of(make_logits(2), valid, np.arange(2)).covariance()


def test_saved_moments_load_bit_for_bit(tmp_path):
    moments = moments_of(make_logits(4), make_valid(4), np.arange(4) % 2)
    moments.save(tmp_path / "part.safetensors")
    for name, values in RouterMoments.load(tmp_path / "part.safetensors").arrays().items():
        np.testing.assert_array_equal(values, moments.arrays()[name])
        assert values.dtype == moments.arrays()[name].dtype


def test_a_damaged_file_is_refused(tmp_path):
    path = tmp_path / "part.safetensors"
    moments_of(make_logits(2), make_valid(2), np.arange(2)).save(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ArtefactError, match="damaged"):
        RouterMoments.load(path)
    with pytest.raises(ArtefactError, match="no router statistics"):
        RouterMoments.load(tmp_path / "missing.safetensors")


@pytest.mark.parametrize("size", [1, 2, 7])
def test_a_packed_matrix_unpacks_to_itself_in_numpys_order(size):
    half = np.random.default_rng(size).normal(size=(2, size, size))
    matrices = half + half.swapaxes(1, 2)
    packed = pack_symmetric(matrices)
    np.testing.assert_array_equal(packed[0], [matrices[0, i, j] for i in range(size) for j in range(i, size)])
    np.testing.assert_array_equal(unpack_symmetric(packed, size), matrices)


def test_many_rows_with_a_large_common_mean_keep_their_small_variance():
    """Centring before the float32 product: without it the variance of 1e-6 around 0.5 would drown."""
    rng = np.random.default_rng(0)
    rows = (0.5 + 1e-3 * rng.normal(size=(20_000, 6))).astype(np.float32)
    mean, m2 = comoments(torch.from_numpy(rows))
    exact = rows.astype(np.float64)
    reference = (exact - exact.mean(0)).T @ (exact - exact.mean(0))
    np.testing.assert_allclose(mean.numpy(), exact.mean(0), rtol=1e-14)
    np.testing.assert_allclose(m2.numpy(), reference, rtol=0, atol=1e-6 * reference.max())


def test_a_full_disk_is_a_storage_error_that_names_the_file(tmp_path, monkeypatch):
    """The safetensors library's own writer raises an error of its own, which would cross Ray as a traceback."""

    def full(*_arguments: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(StorageError, match=r"part\.safetensors"):
        moments_of(make_logits(2), make_valid(2), np.arange(2)).save(tmp_path / "part.safetensors")
    assert list(tmp_path.iterdir()) == [], "nothing half-written is left"
