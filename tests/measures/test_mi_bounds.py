"""Estimators on correlated Gaussians with the optimal critic, where everything has a closed form."""

import math

import pytest
import torch
from torch import Tensor

from fedaudit.measures.mi_bounds import (
    bootstrap_interval,
    donsker_varadhan,
    gaussian_channel,
    infonce,
    nwj,
    pair_terms,
    permutation_null,
    permutation_p_value,
    smile,
    top1_accuracy,
)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian_scores(information: float, D: int, K: int, generator: torch.Generator) -> Tensor:
    """ln p(y|x)/p(y) of every pair of K draws with correlation rho per coordinate, I = -D/2 ln(1-rho^2)."""
    rho = math.sqrt(1 - math.exp(-2 * information / D))
    x = torch.randn(K, D, generator=generator, dtype=torch.float64)
    e = torch.randn(K, D, generator=generator, dtype=torch.float64)
    y = rho * x + math.sqrt(1 - rho**2) * e
    square = (y[:, None] - rho * x[None]).square() / (1 - rho**2) - y[:, None].square()
    return (-0.5 * square - 0.5 * math.log(1 - rho**2)).sum(-1)


@pytest.mark.parametrize("information", [0.5, 1.0, 2.0])
def test_infonce_with_the_optimal_critic_lies_between_its_jensen_bound_and_the_information(
    information: float,
) -> None:
    # E[InfoNCE] = I - E ln((r_ii + sum_j r_ij)/K) >= I - ln(1 + (e^{2I} - 1)/K), as E_P[r] = e^{2I} here
    K = 128
    values = torch.stack([infonce(gaussian_scores(information, 20, K, seeded(i))) for i in range(60)])
    error = 4 * float(values.std()) / math.sqrt(len(values))
    lowest = information - math.log(1 + (math.exp(2 * information) - 1) / K)
    assert lowest - error <= float(values.mean()) <= information + error


@pytest.mark.parametrize("information", [0.5, 1.0])
def test_donsker_varadhan_with_the_optimal_critic_is_the_information_within_its_spread(
    information: float,
) -> None:
    D, K, repeats = 20, 256, 16
    values = [donsker_varadhan(gaussian_scores(information, D, K, seeded(i))) for i in range(repeats)]
    mean = float(torch.stack(values).mean())
    partition = (math.exp(2 * information) - 1) / K  # Var_Q[r] / K: as if only K pairs were independent
    joint = D * (1 - math.exp(-2 * information / D)) / K  # Var_P[f] / K
    assert abs(mean - information) < 4 * math.sqrt((partition + joint) / repeats)


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3, 1e6])
def test_infonce_never_exceeds_the_logarithm_of_the_number_of_candidates(size: float) -> None:
    scores = size * torch.randn(50, 16, 16, generator=seeded(0), dtype=torch.float64)
    scores = scores + size * torch.eye(16)
    assert float(infonce(scores).max()) <= math.log(16) + 1e-12


def test_infonce_saturates_when_the_information_is_above_its_ceiling() -> None:
    value = float(infonce(gaussian_scores(20.0, 20, 32, seeded(0))))
    assert math.log(32) - 0.05 < value <= math.log(32)


def test_independent_pairs_give_about_zero() -> None:
    generator = seeded(1)
    x, y = torch.randn(2, 200, 64, 3, generator=generator, dtype=torch.float64)
    scores = 0.1 * y @ x.transpose(-1, -2)
    for estimator in (infonce, donsker_varadhan):
        values = estimator(scores)
        error = 4 * float(values.std()) / math.sqrt(len(values))
        bias = 3 * 0.1**2  # ln E e^f - E f is half the scores' variance, 3 * 0.01
        assert -bias - error < float(values.mean()) < bias + error


def test_a_term_of_the_row_alone_changes_donsker_varadhan_but_not_infonce() -> None:
    scores = gaussian_scores(1.0, 20, 32, seeded(2))
    shifted = scores + torch.linspace(-3, 3, 32, dtype=torch.float64)[:, None]
    torch.testing.assert_close(infonce(shifted), infonce(scores))
    assert abs(float(donsker_varadhan(shifted) - donsker_varadhan(scores))) > 0.1


def test_donsker_varadhan_equals_the_sum_over_mismatched_pairs_written_out() -> None:
    scores = torch.randn(5, 5, generator=seeded(3), dtype=torch.float64)
    joint = sum(float(scores[i, i]) for i in range(5)) / 5
    product = sum(math.exp(float(scores[i, j])) for i in range(5) for j in range(5) if i != j) / 20
    assert float(donsker_varadhan(scores)) == pytest.approx(joint - math.log(product), rel=1e-12)


def test_a_shuffled_value_is_infonce_of_the_matrix_with_shuffled_columns() -> None:
    scores = torch.randn(6, 6, generator=seeded(4), dtype=torch.float64)
    null = permutation_null(scores, 20, seeded(5))
    orders = torch.rand(20, 6, generator=seeded(5)).argsort(-1)
    expected = torch.stack([infonce(scores[:, order]) for order in orders])
    torch.testing.assert_close(null, expected)


def test_the_p_value_is_uniform_for_independent_pairs() -> None:
    generator, repeats = seeded(6), 400
    x, y = torch.randn(2, repeats, 16, 4, generator=generator, dtype=torch.float64)
    p = torch.tensor([permutation_p_value(b @ a.T, 99, generator)[0] for a, b in zip(x, y, strict=True)])
    for level in (0.05, 0.25, 0.5):
        spread = math.sqrt(level * (1 - level) / repeats)
        assert abs(float((p <= level).double().mean()) - level) < 4 * spread


def test_dependence_gives_the_smallest_p_value_and_a_null_below_the_value() -> None:
    scores = gaussian_scores(2.0, 20, 64, seeded(7))
    p_value, null_mean = permutation_p_value(scores, 199, seeded(8))
    assert p_value == 1 / 200
    assert null_mean < 0 < float(infonce(scores))


def test_constant_scores_have_a_p_value_of_one() -> None:
    assert permutation_p_value(torch.full((8, 8), 0.3), 99, seeded(9))[0] == 1.0


def test_the_bootstrap_interval_covers_the_expectation_about_as_often_as_it_says() -> None:
    repeats, K = 300, 64
    scores = torch.randn(repeats, K, K, generator=seeded(10), dtype=torch.float64) + 2 * torch.eye(K)
    many = torch.randn(20000, K, generator=seeded(11), dtype=torch.float64)
    many[:, 0] += 2
    truth = float(math.log(K) + (many[:, 0] - many.logsumexp(-1)).mean())
    ends = [bootstrap_interval(s, seeded(i), replicates=300) for i, s in enumerate(scores)]
    covered = sum(low <= truth <= high for low, high in ends) / repeats
    assert abs(covered - 0.95) < 0.01 + 4 * math.sqrt(0.95 * 0.05 / repeats)


def test_ties_are_not_counted_as_identified() -> None:
    scores = torch.eye(4)
    assert float(top1_accuracy(scores)) == 1.0
    scores[0, 1] = 1.0
    assert float(top1_accuracy(scores)) == 0.75
    assert float(top1_accuracy(torch.zeros(4, 4))) == 0.0


def test_the_gaussian_channel_of_gaussian_rows_is_their_information() -> None:
    std = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    rows = std * torch.randn(20000, 3, generator=seeded(12), dtype=torch.float64)
    expected = 0.5 * float((1 + 4 * std.square() / 1.5**2).log().sum())
    # d/d(ln variance) of each term is below 1/2 and ln of a sample variance has spread sqrt(2/n)
    assert gaussian_channel(rows, 4, 1.5) == pytest.approx(expected, abs=4 * 3 * 0.5 * math.sqrt(2 / 20000))


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"must be \(\.\.\., K, K\) with K >= 2, got \(3, 4\)"):
        infonce(torch.zeros(3, 4))
    with pytest.raises(ValueError, match="K >= 2"):
        pair_terms(torch.zeros(1, 1))
    with pytest.raises(ValueError, match="permutations must be at least 1, got 0"):
        permutation_null(torch.zeros(3, 3), 0, seeded(0))
    with pytest.raises(ValueError, match="one at a time"):
        permutation_p_value(torch.zeros(2, 3, 3), 9, seeded(0))
    with pytest.raises(ValueError, match=r"level must lie inside \(0, 1\)"):
        bootstrap_interval(torch.zeros(3, 3), seeded(0), level=1.0)
    with pytest.raises(ValueError, match="noise_std > 0"):
        gaussian_channel(torch.zeros(3, 2), 1, 0.0)


def test_nwj_equals_the_sum_over_mismatched_pairs_written_out() -> None:
    scores = torch.randn(5, 5, generator=seeded(13), dtype=torch.float64)
    joint = sum(float(scores[i, i]) for i in range(5)) / 5
    product = sum(math.exp(float(scores[i, j]) - 1) for i in range(5) for j in range(5) if i != j) / 20
    assert float(nwj(scores)) == pytest.approx(joint - product, rel=1e-12)
    # the other common way to write it, with scores lowered by one
    lowered = scores - 1
    off = lowered.exp().sum() - lowered.diagonal().exp().sum()
    assert float(1 + lowered.diagonal().mean() - off / 20) == pytest.approx(float(nwj(scores)), rel=1e-12)


def test_nwj_never_exceeds_donsker_varadhan_of_the_same_scores() -> None:
    scores = 2 * torch.randn(30, 8, 8, generator=seeded(14), dtype=torch.float64)
    assert bool((nwj(scores) <= donsker_varadhan(scores) + 1e-12).all())  # e^{z-1} >= z


def test_smile_equals_its_definition_and_clips_the_partition_alone() -> None:
    scores = 5 * torch.randn(5, 5, generator=seeded(15), dtype=torch.float64)
    joint = sum(float(scores[i, i]) for i in range(5)) / 5
    clipped = [max(-2.0, min(2.0, float(scores[i, j]))) for i in range(5) for j in range(5) if i != j]
    expected = joint - math.log(sum(map(math.exp, clipped)) / 20)
    assert float(smile(scores, 2.0)) == pytest.approx(expected, rel=1e-12)


def test_smile_without_a_clip_is_donsker_varadhan() -> None:
    scores = 5 * torch.randn(3, 6, 6, generator=seeded(16), dtype=torch.float64)
    torch.testing.assert_close(smile(scores, math.inf), donsker_varadhan(scores))


def test_a_clip_that_is_not_positive_is_refused() -> None:
    with pytest.raises(ValueError, match=r"clip must be positive, got -1\.0: use e\.g\. 5"):
        smile(torch.zeros(3, 3), clip=-1.0)
