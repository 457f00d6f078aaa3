"""Two decoders whose strength is chosen on validation examples: ridge regression and logistic regression."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, softplus

RIDGES = tuple(10.0 ** (step / 2) for step in range(-16, 9))
"""Ridges tried, as shares of the largest squared singular value of the training features."""
PENALTIES = tuple(10.0**step for step in range(2, -7, -1))
"""L2 penalties tried, per example, on weights of features scaled to a mean squared norm of 1."""
_NEWTON_STEPS = 50


@dataclass(frozen=True, eq=False)
class RidgeDecoder:
    """x_hat = offset + (features - centre) weights.

    Attributes:
        centre: mean training features (d,).
        weights: (d, D).
        offset: mean training target (D,).
        ridge: the chosen one, in the features' squared unit.
        share: the same as a share of the largest squared singular value.
        score: Gaussian information on the validation rows, in nats.
    """

    centre: Tensor
    weights: Tensor
    offset: Tensor
    ridge: float
    share: float
    score: float

    def __call__(self, features: Tensor) -> Tensor:
        """Predictions (n, D) for features (n, d)."""
        return self.offset + (features - self.centre) @ self.weights


def fit_ridge(
    training: tuple[Tensor, Tensor], validation: tuple[Tensor, Tensor], shares: Sequence[float] = RIDGES
) -> RidgeDecoder:
    """Ridge regression of targets on features, fitted on training rows, its ridge chosen on validation rows.

    weights = (F^T F + ridge I)^-1 F^T X for centred F and X, by one SVD for all ridges; the ridge is the one
    with the most Gaussian information (`gaussian_information`) on the validation rows, not refitted on them.

    Args:
        training: features (n, d) and targets (n, D), float64.
        validation: the same for other examples.
        shares: ridges to try, as shares of the largest squared singular value.

    Raises:
        ValueError: if the features are not finite.

    >>> features = torch.arange(8.0).double()[:, None]
    >>> decode = fit_ridge((features, 2 * features), (features + 8, 2 * features + 16))
    >>> decode(torch.tensor([[20.0]]).double())
    tensor([[40.0000]], dtype=torch.float64)
    """
    features, targets = training
    if not bool(features.isfinite().all()):
        raise ValueError("features must be finite, got NaN or infinity: check the gradients")
    centre, offset = features.mean(0), targets.mean(0)
    left, singular, right = torch.linalg.svd(features - centre, full_matrices=False)
    moments = left.T @ (targets - offset)
    projected = (validation[0] - centre) @ right.T
    top = float(singular[:1].square().sum())
    best, chosen = -math.inf, max(shares)
    for share in sorted(shares, reverse=True):
        shrunk = _shrink(singular, share * top)
        predicted = offset + (projected * shrunk) @ moments
        value = float(gaussian_information(validation[1], predicted, offset).sum())
        if value > best:
            best, chosen = value, share
    weights = right.T @ (_shrink(singular, chosen * top)[:, None] * moments)
    return RidgeDecoder(centre, weights, offset, chosen * top, chosen, best)


def _shrink(singular: Tensor, ridge: float) -> Tensor:
    """s / (s^2 + ridge); 0 where there is nothing."""
    return torch.where(singular > 0, singular / (singular.square() + ridge).clamp_min(1e-300), 0.0)


def gaussian_information(targets: Tensor, predicted: Tensor, prior_mean: Tensor) -> Tensor:
    """Usable information (D,) in nats about each target: 1/2 ln(Var / MSE) on these rows.

    Var is the mean squared distance to `prior_mean`, what the decoder predicts without features, so a decoder
    that ignores them gets exactly 0. Negative where it is misled.

    >>> truth = torch.tensor([[0.0], [2.0]])
    >>> gaussian_information(truth, torch.tensor([[0.5], [1.5]]), torch.tensor([1.0]))
    tensor([0.6931])
    """
    without = (targets - prior_mean).square().mean(0)
    return log_ratio(without, (targets - predicted).square().mean(0))


def log_ratio(without: Tensor, error: Tensor) -> Tensor:
    """1/2 ln(without / error) of squared errors; very much, but finite, for a target that is met exactly."""
    floor = torch.finfo(without.dtype).tiny
    return (without.clamp_min(floor) / error.clamp_min(floor)).log() / 2


@dataclass(frozen=True, eq=False)
class LogisticProbe:
    """P(z = 1 | features) = sigmoid(features weights / scale + intercept).

    Attributes:
        centre: mean training features (d,).
        scale: root mean square norm of the centred training features.
        weights: (d,).
        intercept: number.
        penalty: the chosen L2 penalty, per example.
        score: minus the mean cross-entropy on the validation rows, in nats.
    """

    centre: Tensor
    scale: float
    weights: Tensor
    intercept: float
    penalty: float
    score: float

    def __call__(self, features: Tensor) -> Tensor:
        """Log odds (n,) for features (n, d)."""
        return (features - self.centre) / self.scale @ self.weights + self.intercept


def fit_logistic(
    training: tuple[Tensor, Tensor], validation: tuple[Tensor, Tensor], penalties: Sequence[float] = PENALTIES
) -> LogisticProbe:
    """Logistic regression fitted on training rows, its L2 penalty chosen on validation rows.

    Minimises mean cross-entropy + penalty / 2 |weights|^2 (the intercept is free) by Newton's method from the
    strongest penalty to the weakest, each started from the one before; validation cross-entropy chooses.

    Args:
        training: features (n, d) float64 and booleans (n,), of which some are true and some false.
        validation: the same for other examples.
        penalties: penalties to try.

    Raises:
        ValueError: if the training rows all agree, or the features are not finite.
    """
    features, labels = training
    z = labels.double()
    if not bool(features.isfinite().all()):
        raise ValueError("features must be finite, got NaN or infinity: check the gradients")
    share = float(z.mean())
    if not 0 < share < 1:
        raise ValueError(f"a probe needs examples with and without the attribute, got a share of {share:g}")
    centre = features.mean(0)
    scale = float((features - centre).square().sum(1).mean().sqrt()) or 1.0
    scaled = (features - centre) / scale
    design = torch.cat([scaled, scaled.new_ones(len(scaled), 1)], 1)
    coefficients = design.new_zeros(design.shape[1])
    coefficients[-1] = torch.tensor(share / (1 - share)).log()
    found: list[LogisticProbe] = []
    for penalty in sorted(penalties, reverse=True):
        coefficients = _newton(design, z, penalty, coefficients)
        weights, intercept = coefficients[:-1], float(coefficients[-1])
        odds = (validation[0] - centre) / scale @ weights + intercept
        score = -float(binary_cross_entropy_with_logits(odds, validation[1].double()))
        found.append(LogisticProbe(centre, scale, weights, intercept, penalty, score))
    return max(found, key=lambda probe: probe.score)


def _newton(design: Tensor, z: Tensor, penalty: float, start: Tensor) -> Tensor:
    """Minimiser of the penalised mean cross-entropy; step halving keeps every step downhill."""
    weighting = torch.full_like(start, penalty)
    weighting[-1] = 0.0

    def objective(at: Tensor) -> Tensor:
        odds = design @ at
        return (softplus(odds) - z * odds).mean() + (weighting * at.square()).sum() / 2

    at, value = start, objective(start)
    for _ in range(_NEWTON_STEPS):
        share = torch.sigmoid(design @ at)
        gradient = design.T @ (share - z) / len(z) + weighting * at
        curvature = (design.T * (share * (1 - share))) @ design / len(z) + torch.diag(weighting + 1e-12)
        step = torch.linalg.solve(curvature, gradient)
        decrement = float(gradient @ step)
        if decrement < 1e-10:
            break
        length = 1.0
        while length > 1e-6:
            tried = objective(at - length * step)
            if float(tried) <= float(value) - 1e-4 * length * decrement:
                break
            length /= 2
        else:
            break
        at, value = at - length * step, tried
    return at
