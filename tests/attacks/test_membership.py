"""The matched filter on sums whose members are known, against the Gaussian closed form."""

import math

import pytest
import torch
from scipy.stats import norm

from fedaudit.attacks.membership import matched_filter, membership_advantage


def test_the_score_is_the_length_along_the_candidate() -> None:
    gradients = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    observed = torch.tensor([[3.0, 4.0], [4.0, -3.0], [0.0, 5.0]])
    naive = [[sum(a * b for a, b in zip(o, g, strict=True)) / 5 for g in [[3, 4]]] for o in observed.tolist()]
    found = matched_filter(gradients, observed)
    assert found[:, :1].tolist() == pytest.approx(torch.tensor(naive))
    assert found[:, 1].tolist() == [0.0, 0.0, 0.0]


def test_advantage_in_gaussian_noise_is_the_closed_form() -> None:
    """d' = |g| / s between two unit normals: AUC = Phi(d' / sqrt 2)."""
    generator = torch.Generator().manual_seed(0)
    R, P, noise = 4000, 20, 1.5
    gradient = torch.randn(1, P, generator=generator)
    inside = (torch.arange(R) % 2 == 0)[:, None]
    observed = inside * gradient + noise * torch.randn(R, P, generator=generator)
    expected = 2 * norm.cdf(float(gradient.norm()) / noise / math.sqrt(2)) - 1
    found = float(membership_advantage(matched_filter(gradient, observed), inside)[0])
    assert found == pytest.approx(expected, abs=4 * 2 / math.sqrt(3 * R))  # sd of 2 AUC - 1 is below this / 4


def test_a_candidate_that_is_not_in_the_sum_gives_no_advantage() -> None:
    generator = torch.Generator().manual_seed(1)
    observed = torch.randn(1000, 10, generator=generator)
    inside = (torch.arange(1000) % 2 == 0)[:, None].expand(-1, 3)
    found = membership_advantage(matched_filter(torch.eye(10)[:3], observed), inside)
    assert found.abs().max() < 4 * 2 / math.sqrt(3 * 1000)


def test_ties_count_half() -> None:
    scores = torch.tensor([[1.0], [1.0], [1.0], [2.0]])
    inside = torch.tensor([[True], [False], [False], [True]])
    assert membership_advantage(scores, inside).tolist() == [0.5]  # (0 + 0 + 1 + 1) / 4


def test_a_candidate_that_is_always_in_is_refused() -> None:
    with pytest.raises(ValueError, match="in some repetitions and out of others"):
        membership_advantage(torch.zeros(3, 1), torch.ones(3, 1, dtype=torch.bool))
