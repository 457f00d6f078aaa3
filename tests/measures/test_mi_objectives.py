"""Objectives that critics are trained by: their values, their gradients, their state."""

import math

import pytest
import torch
from torch import Tensor

from fedaudit.measures.mi_bounds import donsker_varadhan, smile
from fedaudit.measures.mi_objectives import PartitionAverage, js_objective, mine_objective, smile_objective
from tests.measures.correlated import optimal_scores


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def scores_of(seed: int, K: int = 6) -> Tensor:
    return torch.randn(K, K, generator=seeded(seed), dtype=torch.float64).requires_grad_()


def gradient(objective: Tensor, scores: Tensor) -> Tensor:
    return torch.autograd.grad(objective, scores)[0]


def test_js_is_the_sum_over_pairs_written_out() -> None:
    scores = scores_of(0).detach()
    joint = sum(-math.log1p(math.exp(-float(scores[i, i]))) for i in range(6)) / 6
    product = (
        sum(math.log1p(math.exp(float(scores[i, j]))) for i in range(6) for j in range(6) if i != j) / 30
    )
    assert float(js_objective(scores)) == pytest.approx(joint - product, rel=1e-12)


def test_js_is_largest_at_the_log_density_ratio() -> None:
    scores = torch.stack([optimal_scores(1.0, 4, 64, seeded(i)) for i in range(80)])
    at_ratio = js_objective(scores)
    for other in (scores + 0.7, scores - 0.7, 1.5 * scores, 0.6 * scores):
        gain = at_ratio - js_objective(other)
        assert float(gain.mean()) > 4 * float(gain.std()) / math.sqrt(len(gain))


def test_js_of_a_useless_critic_is_minus_two_ln_two() -> None:
    assert float(js_objective(torch.zeros(5, 5))) == pytest.approx(-2 * math.log(2))


def test_js_takes_large_scores_without_overflow() -> None:
    scores = 1e4 * torch.eye(4) - 5e3
    assert float(js_objective(scores)) == pytest.approx(0.0, abs=1e-6)


def test_smile_trains_with_the_gradient_of_js_and_shows_its_own_value() -> None:
    scores = (4 * scores_of(1)).detach().requires_grad_()
    objective = smile_objective(scores, clip=2.0)
    assert float(objective.detach()) == pytest.approx(float(smile(scores.detach(), 2.0)), rel=1e-12)
    torch.testing.assert_close(gradient(objective, scores), gradient(js_objective(scores), scores))
    assert not torch.allclose(gradient(smile(scores, 2.0), scores), gradient(js_objective(scores), scores))


def test_the_first_step_of_mine_is_plain_donsker_varadhan() -> None:
    scores = scores_of(2)
    objective = mine_objective(scores, PartitionAverage())
    assert float(objective.detach()) == pytest.approx(float(donsker_varadhan(scores.detach())), rel=1e-12)
    torch.testing.assert_close(gradient(objective, scores), gradient(donsker_varadhan(scores), scores))


def test_later_steps_of_mine_divide_by_the_moving_average() -> None:
    average, K, running = PartitionAverage(momentum=0.9), 6, None
    for seed in range(5):
        scores = (3 * scores_of(seed)).detach().requires_grad_()
        objective = mine_objective(scores, average)
        f = scores.tolist()
        mean = sum(math.exp(f[i][j]) for i in range(K) for j in range(K) if i != j) / (K * (K - 1))
        running = mean if running is None else 0.9 * running + 0.1 * mean
        expected = torch.tensor(
            [
                [1 / K if i == j else -math.exp(f[i][j]) / (K * (K - 1)) / running for j in range(K)]
                for i in range(K)
            ],
            dtype=torch.float64,
        )
        torch.testing.assert_close(gradient(objective, scores), expected)
        assert float(objective.detach()) == pytest.approx(float(donsker_varadhan(scores.detach())), rel=1e-12)


def test_without_momentum_mine_keeps_the_plain_gradient() -> None:
    average = PartitionAverage(momentum=0.0)
    mine_objective(scores_of(3) + 5, average)
    scores = scores_of(4)
    torch.testing.assert_close(
        gradient(mine_objective(scores, average), scores), gradient(donsker_varadhan(scores), scores)
    )


def test_the_average_survives_scores_whose_exponentials_do_not() -> None:
    average = PartitionAverage()
    for level in (-900.0, 900.0):
        scores = (scores_of(5) + level).detach().requires_grad_()
        assert bool(torch.isfinite(gradient(mine_objective(scores, average), scores)).all())
    assert average.log_value is not None
    assert float(average.log_value) == pytest.approx(900 + math.log(0.1), abs=2)


def test_the_penalty_on_drift_pulls_the_log_partition_to_zero() -> None:
    scores = (scores_of(8) + 3).detach().requires_grad_()
    off = scores.detach().exp().masked_fill(torch.eye(6, dtype=torch.bool), 0)
    partition = math.log(float(off.sum()) / 30)
    plain = mine_objective(scores, PartitionAverage())
    held = mine_objective(scores, PartitionAverage(), drift=0.1)
    assert float((plain - held).detach()) == pytest.approx(0.1 * partition**2, rel=1e-10)
    pull = gradient(held, scores) - gradient(plain, scores)
    torch.testing.assert_close(pull, -0.2 * partition * off / off.sum())


def test_two_critics_do_not_share_an_average() -> None:
    first, second = PartitionAverage(), PartitionAverage()
    mine_objective(scores_of(6) + 10, first)
    assert second.log_value is None


def test_the_moving_average_brings_the_gradient_of_small_batches_nearer_to_the_true_one() -> None:
    # scores c * ln r are best at c = 1, where the true gradient E_P[ln r] - E_Q[r ln r] is zero
    average, plain, corrected = PartitionAverage(momentum=0.99), [], []
    for seed in range(1500):
        ratio = optimal_scores(1.0, 20, 4, seeded(seed))
        factor = torch.ones((), dtype=torch.float64, requires_grad=True)
        plain.append(gradient(donsker_varadhan(factor * ratio), factor))
        corrected.append(gradient(mine_objective(factor * ratio, average), factor))
    means = [float(torch.stack(kind).mean()) for kind in (plain, corrected)]
    errors = [float(torch.stack(kind).std()) / math.sqrt(1500) for kind in (plain, corrected)]
    assert means[0] > 4 * errors[0]  # the plain gradient pushes scores up past their best
    assert abs(means[1]) + 4 * errors[1] < means[0]


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"momentum must lie in \[0, 1\), got 1.0"):
        PartitionAverage(momentum=1.0)
    with pytest.raises(ValueError, match="one at a time"):
        mine_objective(torch.zeros(2, 3, 3), PartitionAverage())
    with pytest.raises(ValueError, match="K >= 2"):
        js_objective(torch.zeros(3, 4))
    with pytest.raises(ValueError, match="clip must be positive, got 0"):
        smile_objective(torch.zeros(3, 3), clip=0.0)
