"""The decoders, against normal equations, stationarity and scikit-learn."""

import math

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from fedaudit.maths.linear_probes import fit_logistic, fit_ridge, gaussian_information


def gaussian(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


F, X = gaussian(30, 4, seed=0), gaussian(30, 3, seed=1)
F_VAL, X_VAL = gaussian(20, 4, seed=2), gaussian(20, 3, seed=3)
Z = gaussian(60, seed=5) + gaussian(60, 3, seed=4)[:, 0] > 0.3
F_Z = gaussian(60, 3, seed=4) * torch.tensor([1.0, 0.1, 5.0]).double() + 7.0


def test_ridge_solves_the_penalised_normal_equations() -> None:
    decode = fit_ridge((F, X), (F_VAL, X_VAL), [0.3])
    centred, targets = F - F.mean(0), X - X.mean(0)
    ridge = 0.3 * float(torch.linalg.svdvals(centred)[0]) ** 2
    expected = torch.linalg.solve(centred.T @ centred + ridge * torch.eye(4).double(), centred.T @ targets)
    torch.testing.assert_close(decode.weights, expected)
    torch.testing.assert_close(decode(F_VAL), X.mean(0) + (F_VAL - F.mean(0)) @ expected)
    assert decode.ridge == pytest.approx(ridge)


def test_ridge_is_chosen_on_validation_rows() -> None:
    useful = X @ gaussian(3, 4, seed=7)  # a noiseless linear relation wants no ridge
    assert fit_ridge((useful, X), (X_VAL @ gaussian(3, 4, seed=7), X_VAL)).share < 1e-6
    misleading = fit_ridge((useful, X), (-X_VAL @ gaussian(3, 4, seed=7), X_VAL))
    assert misleading.share == pytest.approx(1e4)
    assert misleading.score < 0


def test_collinear_and_constant_features_are_decoded_all_the_same() -> None:
    doubled = torch.cat([X, X, torch.ones(30, 1).double()], 1)
    decode = fit_ridge((doubled, X), (doubled, X))
    torch.testing.assert_close(decode(doubled), X, atol=1e-6, rtol=1e-6)
    nothing = fit_ridge((torch.zeros(30, 2).double(), X), (torch.zeros(20, 2).double(), X_VAL))
    torch.testing.assert_close(nothing(torch.ones(2, 2).double()), X.mean(0).expand(2, 3))
    none = fit_ridge((torch.zeros(30, 0).double(), X), (torch.zeros(20, 0).double(), X_VAL))
    torch.testing.assert_close(none(torch.zeros(2, 0).double()), X.mean(0).expand(2, 3))


def test_ignoring_features_is_worth_nothing_and_an_exact_decoder_finitely_much() -> None:
    prior = X.mean(0)
    assert gaussian_information(X_VAL, prior.expand_as(X_VAL), prior).tolist() == [0.0] * 3
    assert bool(gaussian_information(X_VAL, X_VAL, prior).isfinite().all())
    worse = gaussian_information(X_VAL, prior + 3 * (prior - X_VAL), prior)
    torch.testing.assert_close(worse, torch.full((3,), -math.log(4)).double())


def test_the_probe_minimises_the_penalised_cross_entropy() -> None:
    for penalty in (1.0, 1e-3):
        probe = fit_logistic((F_Z, Z), (F_Z, Z), [penalty])
        scaled = (F_Z - probe.centre) / probe.scale
        residual = torch.sigmoid(probe(F_Z)) - Z.double()
        gradient = scaled.T @ residual / 60 + penalty * probe.weights
        assert float(gradient.abs().max()) < 1e-6
        assert abs(float(residual.mean())) < 1e-6  # the intercept is not penalised
        peer = LogisticRegression(C=1 / (60 * penalty), tol=1e-10, max_iter=1000).fit(scaled, Z)
        torch.testing.assert_close(probe.weights, torch.from_numpy(peer.coef_[0]), rtol=1e-3, atol=1e-4)
        assert probe.intercept == pytest.approx(peer.intercept_[0], rel=1e-3, abs=1e-4)


def test_the_penalty_is_chosen_on_validation_rows() -> None:
    assert fit_logistic((F_Z, Z), (F_Z, Z)).penalty < 1e-3
    assert fit_logistic((F_Z, Z), (F_Z, ~Z)).penalty > 1


def test_a_separable_attribute_is_fitted_to_the_end() -> None:
    z = F_Z[:, 2] > 7
    probe = fit_logistic((F_Z, z), (F_Z, z))
    assert -0.01 < probe.score <= 0
    assert bool(((probe(F_Z) > 0) == z).all())


def test_a_probe_does_not_depend_on_the_scale_or_offset_of_features() -> None:
    probe, scaled = fit_logistic((F_Z, Z), (F_Z, Z)), fit_logistic((1e-6 * F_Z + 3, Z), (1e-6 * F_Z + 3, Z))
    torch.testing.assert_close(probe(F_Z), scaled(1e-6 * F_Z + 3), rtol=1e-4, atol=1e-5)


def test_what_cannot_be_fitted_is_refused() -> None:
    with pytest.raises(ValueError, match="with and without the attribute, got a share of 1"):
        fit_logistic((F_Z, torch.ones(60)), (F_Z, Z))
    for fit, target in ((fit_ridge, X), (fit_logistic, Z[:30])):
        with pytest.raises(ValueError, match="features must be finite"):
            fit((F / 0, target), (F, target))  # type: ignore[operator]
