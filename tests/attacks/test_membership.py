"""Scores of candidates on sums whose members are known, against naive loops and Gaussian closed forms."""

import math
import statistics

import pytest
import torch
from scipy.stats import norm

from fedaudit.attacks.membership import (
    against_others,
    average_over_rounds,
    cosine,
    gradient_difference,
    length_along,
    matched_filter,
    membership_advantage,
)


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


def test_scores_of_products_are_those_of_the_vectors() -> None:
    generator = torch.Generator().manual_seed(2)
    gradients, observed = torch.randn(7, 9, generator=generator), torch.randn(4, 9, generator=generator)
    gradients[2] = 0
    observed[1] = 0
    products, norms = observed @ gradients.T, gradients.norm(dim=1)
    cosines, differences = cosine(products, norms, observed.norm(dim=1)), gradient_difference(products, norms)
    for r, y in enumerate(observed):
        for i, g in enumerate(gradients):
            dot, length = (
                sum(float(a) * float(b) for a, b in zip(y, g, strict=True)),
                float(y.norm() * g.norm()),
            )
            assert float(cosines[r, i]) == pytest.approx(dot / length if length else 0.0, abs=1e-6)
            assert float(differences[r, i]) == pytest.approx(
                float(y.square().sum() - (y - g).square().sum()), abs=1e-4
            )
    assert torch.equal(matched_filter(gradients, observed), length_along(products, norms))


def test_a_score_against_the_others_is_the_normal_rank_among_their_scores() -> None:
    scores = torch.randn(5, 6, generator=torch.Generator().manual_seed(3)) + 1000  # a large common offset
    found = against_others(scores)
    for r in range(5):
        for i in range(6):
            others = [float(scores[q, i]) for q in range(5) if q != r]
            spread = math.sqrt(statistics.variance(others) + 1e-8)
            expected = norm.cdf((float(scores[r, i]) - statistics.fmean(others)) / spread)
            assert float(found[r, i]) == pytest.approx(expected, abs=1e-9)


def test_others_show_which_candidates_score_high_everywhere() -> None:
    """A candidate's own level hides membership from a common threshold; the others reveal the level."""
    generator = torch.Generator().manual_seed(4)
    R, n = 10, 400
    inside = torch.zeros(R, n, dtype=torch.bool)
    inside[0, : n // 2] = True
    scores = 5 * torch.randn(n, generator=generator) + torch.randn(R, n, generator=generator) + 3.0 * inside
    plain = float(membership_advantage(scores[0][:, None], inside[0][:, None])[0])
    against = float(membership_advantage(against_others(scores)[0][:, None], inside[0][:, None])[0])
    # d' = 3 / sqrt(1 + 25) without and about 3 / sqrt(1 + 1/9) with the others
    assert plain == pytest.approx(2 * norm.cdf(3 / math.sqrt(2 * 26)) - 1, abs=0.15)
    assert against > 0.85


def test_rounds_together_tell_more_than_one() -> None:
    generator = torch.Generator().manual_seed(5)
    inside = torch.arange(600) < 300
    rounds = [(torch.randn(1, 600, generator=generator) + 0.5 * inside) for _ in range(9)]
    average = average_over_rounds(rounds)
    assert torch.allclose(average, sum(rounds).double() / 9)  # type: ignore[union-attr]
    one, nine = (
        float(membership_advantage(each[0][:, None], inside[:, None])[0]) for each in (rounds[0], average)
    )
    expected = [2 * norm.cdf(0.5 * math.sqrt(count) / math.sqrt(2)) - 1 for count in (1, 9)]
    sd = 2 / math.sqrt(3 * 300 * 2)  # at most, of 2 AUC - 1 with 300 on each side
    assert [one, nine] == pytest.approx(expected, abs=4 * sd)


def test_two_updates_have_no_others_to_speak_of() -> None:
    with pytest.raises(ValueError, match="at least two other updates, got 1"):
        against_others(torch.zeros(2, 3))


def test_rounds_of_different_clients_are_not_averaged() -> None:
    with pytest.raises(ValueError, match="the same updates and candidates"):
        average_over_rounds([torch.zeros(2, 3), torch.zeros(3, 3)])
    with pytest.raises(ValueError, match="the same updates and candidates"):
        average_over_rounds([])
