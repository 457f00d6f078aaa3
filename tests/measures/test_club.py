"""The upper bound from a conditional: written out, in closed form, and where it stops being a bound."""

import math

import pytest
import torch

from fedaudit.measures.club import GaussianConditional, club, club_sampled, fit_conditional, log_likelihood
from tests.measures.correlated import correlation, pairs


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_log_likelihood_is_that_of_torchs_normal_distribution() -> None:
    mean, log_variance, y = torch.randn(3, 7, 3, generator=seeded(0), dtype=torch.float64)
    expected = torch.distributions.Normal(mean, (0.5 * log_variance).exp()).log_prob(y).sum(-1)
    torch.testing.assert_close(log_likelihood(mean, log_variance, y), expected)


def test_club_is_the_sum_over_pairs_written_out() -> None:
    K = 5
    mean, log_variance, y = torch.randn(3, K, 2, generator=seeded(1), dtype=torch.float64)

    def likelihood(i: int, j: int) -> float:
        return float(log_likelihood(mean[i], log_variance[i], y[j]))

    own = sum(likelihood(i, i) for i in range(K)) / K
    other = sum(likelihood(i, j) for i in range(K) for j in range(K) if i != j) / (K * (K - 1))
    assert float(club(mean, log_variance, y)) == pytest.approx(own - other, rel=1e-10)


def test_the_sampled_version_never_pairs_a_row_with_itself_and_agrees_on_average() -> None:
    mean, log_variance, y = torch.randn(3, 6, 2, generator=seeded(2), dtype=torch.float64)
    draws = torch.stack([club_sampled(mean, log_variance, y, seeded(i)) for i in range(4000)])
    error = 4 * float(draws.std()) / math.sqrt(len(draws))
    assert abs(float(draws.mean() - club(mean, log_variance, y))) < error
    # with two rows there is one other row to choose: both versions are the same number
    two = (mean[:2], log_variance[:2], y[:2])
    torch.testing.assert_close(club_sampled(*two, seeded(3)), club(*two))


def test_a_poor_conditional_can_lie_below_the_information() -> None:
    x, y = pairs(4.0, 20, 500, seeded(4))
    rho = correlation(4.0, 20)
    true = club(rho * x, torch.full_like(x, math.log(1 - rho**2)), y)
    wide = club(rho * x, torch.zeros_like(x) + 2.0, y)
    assert float(wide) < 4.0 < float(true)
    assert float(club(-rho * x, torch.zeros_like(x), y)) < 0


def test_fitting_recovers_mean_and_variance_of_the_conditional() -> None:
    x = torch.randn(4000, 2, generator=seeded(5))
    y = torch.stack([2 * x[:, 0], -x[:, 1]], 1) + 0.1 * torch.randn(4000, 2, generator=seeded(6))
    seen: list[float] = []
    conditional = fit_conditional(
        x,
        y,
        steps=400,
        batch=128,
        generator=seeded(7),
        hidden=32,
        lr=5e-3,
        watch=lambda step, value: seen.append(value),
    )
    with torch.no_grad():
        mean, log_variance = conditional(x)
    best = -2 * (0.5 + 0.5 * math.log(2 * math.pi) + math.log(0.1))  # minus the entropy of the noise
    assert len(seen) == 400
    assert sum(seen[-20:]) / 20 > best - 0.5 > seen[0]
    assert float((mean - torch.stack([2 * x[:, 0], -x[:, 1]], 1)).square().mean().sqrt()) < 0.1
    assert float(log_variance.mean()) == pytest.approx(math.log(0.01), abs=0.5)


@pytest.mark.parametrize("bounded", [False, True])
def test_variances_are_confined_only_on_request(bounded: bool) -> None:
    conditional = GaussianConditional(2, 2, 8, seeded(8), bounded)
    _, log_variance = conditional(100 * torch.randn(50, 2, generator=seeded(9)))
    assert (float(log_variance.detach().abs().max()) <= 1.0) == bounded


def test_fitting_leaves_the_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    x = torch.randn(40, 2, generator=seeded(10))
    first, again = (
        fit_conditional(x, x, steps=3, batch=8, generator=seeded(11), hidden=4)(x)[0] for _ in range(2)
    )
    assert torch.equal(first, again)
    assert torch.equal(before, torch.get_rng_state())


def test_shapes_that_do_not_belong_together_are_named() -> None:
    with pytest.raises(
        ValueError, match=r"must all be \(K, D\) with K >= 2, got \(3, 2\), \(3, 2\) and \(3, 1\)"
    ):
        club(torch.zeros(3, 2), torch.zeros(3, 2), torch.zeros(3, 1))
    with pytest.raises(ValueError, match="K >= 2"):
        club_sampled(torch.zeros(1, 2), torch.zeros(1, 2), torch.zeros(1, 2), seeded(0))
    with pytest.raises(ValueError, match="as many rows each, at least one, got 3 and 4"):
        fit_conditional(torch.zeros(3, 2), torch.zeros(4, 2), steps=1, batch=2, generator=seeded(0))
