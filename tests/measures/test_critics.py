"""Critics of pairs of vectors: orientation, training by every objective, held-out scores."""

import math

import pytest
import torch
from torch import Tensor

from fedaudit.measures.critics import ConcatenatedCritic, SeparableCritic, fit_critic, objective_of
from fedaudit.measures.mi_bounds import donsker_varadhan, infonce, nwj, permutation_p_value, smile
from tests.measures.correlated import optimal_scores, pairs

VALUES = {"infonce": infonce, "nwj": nwj, "mine": donsker_varadhan, "smile": smile, "js": donsker_varadhan}
SMALL = {"steps": 150, "batch": 32, "hidden": 32, "lr": 5e-3}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def float_pairs(information: float, D: int, n: int, seed: int) -> tuple[Tensor, Tensor]:
    x, y = pairs(information, D, n, seeded(seed))
    return x.float(), y.float()


def test_a_separable_score_is_the_inner_product_of_its_two_sides() -> None:
    critic = SeparableCritic(3, 2, seeded(0), hidden=8, embedding=4)
    x, y = torch.randn(5, 3, generator=seeded(1)), torch.randn(5, 2, generator=seeded(2))
    scores = critic(x, y)
    one = critic.y_side(y[1:2]) @ critic.x_side(x[3:4]).T / 2
    torch.testing.assert_close(scores[1, 3], one.squeeze())


def test_a_concatenated_score_belongs_to_its_own_row_and_column() -> None:
    critic = ConcatenatedCritic(3, 2, seeded(3), hidden=8)
    x, y = torch.randn(5, 3, generator=seeded(4)), torch.randn(5, 2, generator=seeded(5))
    scores = critic(x, y)
    torch.testing.assert_close(scores[1, 3], critic.of_pair(torch.cat([x[3], y[1]])).squeeze())


@pytest.mark.parametrize("estimator", VALUES)
def test_every_objective_finds_planted_information_on_held_out_pairs(estimator: str) -> None:
    x, y = float_pairs(1.5, 2, 4000, 6)
    scores = fit_critic(x, y, estimator=estimator, generator=seeded(7), **SMALL)  # type: ignore[arg-type]
    assert scores.shape == (25, 32, 32)
    values = VALUES[estimator](scores.double())
    error = 4 * float(values.std()) / math.sqrt(len(values))
    best = VALUES[estimator](
        torch.stack([optimal_scores(1.5, 2, 32, seeded(i)) for i in range(200)]) + (estimator == "nwj")
    )
    assert float(values.mean()) > 0.6 * float(best.mean()) - error
    assert float(values.mean()) < float(best.mean()) + 0.25 + error  # a trained critic's level is not exact


def test_a_concatenated_critic_finds_a_relation_without_correlation() -> None:
    x = torch.randn(2000, 1, generator=seeded(8))
    y = x.square() + 0.1 * torch.randn(2000, 1, generator=seeded(9))
    scores = fit_critic(x, y, critic="concatenated", generator=seeded(10), **SMALL)
    assert float(infonce(scores).mean()) > 0.4


def test_a_critic_of_independent_pairs_finds_nothing_on_held_out_pairs() -> None:
    x, y = torch.randn(2, 2000, 3, generator=seeded(11))
    scores = fit_critic(x, y, generator=seeded(12), held_out=0.5, **SMALL)
    assert float(infonce(scores).mean()) < 0.05
    p_values = [permutation_p_value(one.double(), 99, seeded(i))[0] for i, one in enumerate(scores)]
    low = sum(p <= 0.05 for p in p_values) / len(p_values)
    assert low <= 0.05 + 4 * math.sqrt(0.05 * 0.95 / len(p_values))


def test_held_out_pairs_have_no_influence_on_the_critic() -> None:
    x, y = float_pairs(1.0, 2, 200, 13)
    options = {"steps": 5, "batch": 20, "hidden": 8, "held_out": 0.2}
    order = torch.randperm(200, generator=seeded(14))
    changed = y.clone()
    changed[order[:20]] += 100.0  # the first held-out batch
    first, other = (fit_critic(x, z, generator=seeded(14), **options) for z in (y, changed))
    torch.testing.assert_close(first[1], other[1])
    assert not torch.allclose(first[0], other[0])


def test_units_of_the_inputs_do_not_matter() -> None:
    x, y = pairs(1.0, 2, 400, seeded(15))
    options = {"steps": 20, "batch": 20, "hidden": 8}
    first = fit_critic(x, y, generator=seeded(16), **options)
    second = fit_critic(1000 * x + 5, 0.001 * y - 3, generator=seeded(16), **options)
    torch.testing.assert_close(first, second)


def test_the_seed_alone_decides_and_the_global_random_state_stays() -> None:
    before = torch.get_rng_state()
    x, y = float_pairs(1.0, 2, 200, 17)
    options = {"steps": 3, "batch": 20, "hidden": 8}
    first, again, other = (fit_critic(x, y, generator=seeded(s), **options) for s in (18, 18, 19))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(before, torch.get_rng_state())


def test_two_mine_objectives_do_not_share_their_average() -> None:
    used, fresh = objective_of("mine"), objective_of("mine")
    used(torch.full((4, 4), 20.0))
    scores = torch.zeros(4, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(fresh(scores), scores)
    assert float(gradient.sum()) == pytest.approx(0.0, abs=1e-6)


def test_what_cannot_be_fitted_is_named() -> None:
    x = torch.zeros(50, 2)
    with pytest.raises(
        ValueError, match="estimator must be one of infonce, nwj, mine, smile, js, got 'club'"
    ):
        fit_critic(x, x, estimator="club", generator=seeded(0))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="critic must be one of separable, concatenated, got 'deep'"):
        fit_critic(x, x, critic="deep", generator=seeded(0))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="leave no batch of 20"):
        fit_critic(x, x, batch=20, generator=seeded(0))
    with pytest.raises(ValueError, match="held_out must lie inside"):
        fit_critic(x, x, batch=20, held_out=1.0, generator=seeded(0))
    with pytest.raises(ValueError, match=r"same n, at least a batch of 2 or more, got shapes \(50, 2\) and"):
        fit_critic(x, x[:40], batch=20, generator=seeded(0))
