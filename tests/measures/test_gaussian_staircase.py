"""The estimators where the truth is known: correlated Gaussians, twenty dimensions, two and four nats.

With the optimal critic every tolerance follows from the estimator's own bias and variance. The whole table
with trained critics, two to ten nats, is `benchmarks/mutual_information.py`.
"""

import math

import pytest
import torch
from torch import Tensor

from fedaudit.measures.club import club, fit_conditional
from fedaudit.measures.critics import fit_critic
from fedaudit.measures.mi_bounds import donsker_varadhan, gaussian_channel, infonce, nwj, smile
from tests.measures.correlated import (
    correlation,
    log_ratio,
    optimal_scores,
    pairs,
    spread_of_joint,
    spread_of_partition,
)

D, K, REPEATS = 20, 128, 150
TRUTHS = pytest.mark.parametrize("truth", [2.0, 4.0])


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def optimal(truth: float) -> Tensor:
    """Scores of the optimal critic (REPEATS, K, K)."""
    return torch.stack([optimal_scores(truth, D, K, seeded(i)) for i in range(REPEATS)])


def error_of_mean(values: Tensor) -> float:
    return float(values.std()) / math.sqrt(len(values))


@TRUTHS
def test_infonce_is_below_the_truth_by_no_more_than_its_bias(truth: float) -> None:
    values = infonce(optimal(truth))
    lowest = truth - math.log(1 + (math.exp(2 * truth) - 1) / K)  # Jensen, E_P[r] = e^{2I}
    error = 4 * error_of_mean(values)
    assert lowest - error < float(values.mean()) < min(truth, math.log(K)) + error
    assert float(values.std()) < 2 * spread_of_joint(truth, D, K)


@TRUTHS
def test_nwj_is_unbiased_with_the_spread_its_partition_has(truth: float) -> None:
    values = nwj(1 + optimal(truth))
    spread = spread_of_joint(truth, D, K) + spread_of_partition(truth, K)
    assert abs(float(values.mean()) - truth) < 4 * spread / math.sqrt(REPEATS)


@TRUTHS
def test_donsker_varadhan_is_above_the_truth_by_at_most_the_variance_of_its_partition(truth: float) -> None:
    values = donsker_varadhan(optimal(truth))
    error = 4 * error_of_mean(values)
    # -E ln Z >= 0 for E Z = 1, and to second order it is half the variance of Z
    assert truth - error < float(values.mean()) < truth + spread_of_partition(truth, K) ** 2 + error


@TRUTHS
def test_smile_is_biased_by_the_mass_its_clip_cuts_off(truth: float) -> None:
    x, y = torch.randn(2, 300_000, D, generator=seeded(1000), dtype=torch.float64)
    clipped = log_ratio(x, y, truth).clamp(-5, 5).exp()  # of independent draws: E_Q
    expected = truth - math.log(float(clipped.mean()))
    values = smile(optimal(truth), clip=5.0)
    # ln Z spreads by the clipped ratios' own deviation, at most (e^5 - e^-5)/2; both means are sampled
    partition = float(clipped.std()) * math.sqrt(2 / (K * (K - 1)))
    reference = error_of_mean(clipped) / float(clipped.mean())
    curvature = (partition / float(clipped.mean())) ** 2
    assert abs(float(values.mean()) - expected) < 4 * (error_of_mean(values) + reference) + curvature
    assert float(values.mean()) > truth - 4 * error_of_mean(values)  # cutting off mass raises it


@TRUTHS
def test_club_with_the_true_conditional_exceeds_the_truth_by_the_reverse_divergence(truth: float) -> None:
    rho = correlation(truth, D)
    expected = D * rho**2 / (1 - rho**2)
    values = []
    for i in range(REPEATS):
        x, y = pairs(truth, D, K, seeded(i))
        values.append(club(rho * x, torch.full_like(x, math.log(1 - rho**2)), y))
    found = torch.stack(values)
    assert abs(float(found.mean()) - expected) < 4 * error_of_mean(found)
    assert expected > truth + 1


@TRUTHS
def test_the_gaussian_channel_is_the_truth_up_to_its_sample_covariance(truth: float) -> None:
    rho, n = correlation(truth, D), 20_000
    x, _ = pairs(truth, D, n, seeded(0))
    value = gaussian_channel(rho * x, 1, math.sqrt(1 - rho**2))
    # each eigenvalue enters as ln(1 + l s/(1-s)) / 2, slope at most rho^2/2 in ln l, which spreads sqrt(2/n);
    # the sample covariance's second-order bias is of order D^2/n
    assert abs(value - truth) < 4 * 0.5 * rho**2 * math.sqrt(2 * D / n) + D**2 / n


def test_a_trained_critic_finds_most_of_two_nats_and_no_more() -> None:
    x, y = (part.float() for part in pairs(2.0, D, 12_000, seeded(7)))
    settings = {"steps": 250, "batch": 64, "lr": 2e-3}
    scores = fit_critic(x, y**3, estimator="infonce", generator=seeded(8), **settings)
    values = infonce(scores.double())
    # what the optimal critic has on pairs of the same size, and what no critic exceeds
    best = infonce(torch.stack([optimal_scores(2.0, D, 64, seeded(i)) for i in range(60)]))
    assert float(values.mean()) < float(best.mean()) + 4 * (error_of_mean(values) + error_of_mean(best))
    assert float(values.mean()) > 0.5 * float(best.mean())


def test_a_fitted_conditional_is_above_two_nats_on_pairs_it_was_not_fitted_to() -> None:
    x, y = (part.float() for part in pairs(2.0, D, 22_000, seeded(9)))
    settings = {"steps": 400, "batch": 128, "hidden": 64, "lr": 3e-3}
    conditional = fit_conditional(x[:20_000], y[:20_000], generator=seeded(10), **settings)
    with torch.no_grad():
        value = float(club(*conditional(x[20_000:]), y[20_000:]))
    rho = correlation(2.0, D)
    true_conditional = D * rho**2 / (1 - rho**2)
    assert 2.0 < value < true_conditional + 0.5
