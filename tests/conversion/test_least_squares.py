"""Ridge regression from sums against scikit-learn on the whole data."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score

from nexus_ray.conversion.least_squares import RidgeSums

FEATURES, TARGETS = 9, 4


@pytest.fixture
def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(200, FEATURES, generator=generator) * 3 + 5
    targets = features @ torch.randn(FEATURES, TARGETS, generator=generator) + 2
    return features, targets + torch.randn(200, TARGETS, generator=generator) * 4


@pytest.mark.parametrize("ridge", [1e-3, 0.5])
@pytest.mark.parametrize("pieces", [1, 7])
def test_equals_sklearn_ridge_with_intercept(data, ridge, pieces):
    features, targets = data
    sums = RidgeSums(FEATURES, TARGETS)
    for part in torch.arange(200).chunk(pieces):
        sums.add(features[part], targets[part])
    fit = sums.solve(ridge)
    alpha = ridge * float(features.double().var(dim=0, unbiased=False).mean() * 200)
    reference = Ridge(alpha=alpha).fit(features.double().numpy(), targets.double().numpy())
    np.testing.assert_allclose(fit.weight, reference.coef_, rtol=1e-8)
    np.testing.assert_allclose(fit.bias, reference.intercept_, rtol=1e-8)
    predicted = reference.predict(features.double().numpy())
    assert fit.explained == pytest.approx(r2_score(targets, predicted, multioutput="variance_weighted"), rel=1e-6)


def test_an_exact_linear_map_is_found(data):
    features, _ = data
    weight = torch.randn(TARGETS, FEATURES, generator=torch.Generator().manual_seed(2))
    sums = RidgeSums(FEATURES, TARGETS)
    sums.add(features, features @ weight.T - 3)
    fit = sums.solve(1e-9)
    assert torch.allclose(fit.weight.float(), weight, atol=1e-4)
    assert fit.explained == pytest.approx(1, abs=1e-6)


def test_features_that_never_vary_leave_the_mean(data):
    _, targets = data
    sums = RidgeSums(FEATURES, TARGETS)
    sums.add(torch.zeros(200, FEATURES), targets)
    fit = sums.solve(1e-3)
    assert not fit.weight.any()
    assert torch.allclose(fit.bias, targets.double().mean(dim=0))
    assert fit.explained == pytest.approx(0)


def test_no_rows_is_an_error():
    with pytest.raises(ValueError, match="at least one row"):
        RidgeSums(FEATURES, TARGETS).solve(1e-3)
