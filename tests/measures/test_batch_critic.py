"""The critic of batches: invariances, drawing of batches, the likelihood it starts from, learning."""

import math

import pytest
import torch

from fedaudit.measures.batch_critic import (
    BatchCritic,
    Pool,
    _Channel,
    _Stack,
    best_temperature,
    evaluate_critic,
    train_critic,
)
from fedaudit.measures.mi_bounds import infonce


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def linear_pool(n: int, batch: int, noise: float, seed: int, D: int = 4) -> Pool:
    """Coordinates are a fixed rotation of the features: what an uninformed critic has to find out."""
    rotation = torch.linalg.qr(torch.randn(D, D, generator=seeded(99))).Q
    features = torch.randn(n, D, generator=seeded(seed))
    return Pool(features, features @ rotation, torch.ones(D), noise, batch)


def unrelated_pool(n: int, batch: int, noise: float, seed: int, D: int = 4) -> Pool:
    generator = seeded(seed)
    features, coordinates = torch.randn(2, n, D, generator=generator)
    return Pool(features, coordinates, torch.ones(D), noise, batch)


def test_scores_do_not_depend_on_the_order_of_the_examples() -> None:
    pool = linear_pool(12, 4, 0.5, 0)
    critic = BatchCritic(4, 4, 8, False, seeded(1))
    members = pool.draw(6, seeded(2))
    observed = pool.observe(members, seeded(3))
    order = torch.randperm(12, generator=seeded(4))
    channel = _Channel.of(pool)[0]
    torch.testing.assert_close(
        critic(pool.features[order], members[:, order], observed, channel),
        critic(pool.features, members, observed, channel),
    )


def told_pool(n: int, noise: float, seed: int, spread: float = 1.0) -> Pool:
    """Features are the coordinates themselves, some of them `spread` times as large as the rest."""
    pool = linear_pool(n, 5, noise, seed)
    coordinates = pool.coordinates.double() * torch.where(torch.arange(n) < n // 4, spread, 1.0)[:, None]
    variance = torch.tensor([1.0, 0.5, 0.1, 1e-6], dtype=torch.float64)
    return Pool(coordinates / variance.sqrt(), coordinates, variance, noise, 5)


@pytest.mark.parametrize("noise", [0.01, 3.0])
def test_an_untrained_informed_critic_is_the_gaussian_likelihood(noise: float) -> None:
    pool = told_pool(20, noise, 5)
    critic = BatchCritic(4, 4, 8, True, seeded(6)).double()
    scores, members, observed = evaluate_critic(critic, pool, 16, seeded(7))
    likelihood = -torch.cdist(observed, members @ pool.coordinates).square() / (2 * noise**2)
    torch.testing.assert_close(scores.log_softmax(-1), likelihood.log_softmax(-1), atol=1e-3, rtol=1e-3)


def test_a_noiseless_sum_names_its_batch_also_where_few_examples_are_ten_thousand_times_as_large() -> None:
    pool = told_pool(20, 0.0, 8, spread=1e4)
    critic = BatchCritic(4, 4, 8, True, seeded(9)).double()
    scores, _, _ = evaluate_critic(critic, pool, 64, seeded(10))
    assert float(infonce(scores)) > math.log(64) - 1e-6


def test_padded_draws_hold_each_pools_own_examples_only() -> None:
    pools = [linear_pool(6, 2, 0.1, 8), linear_pool(11, 5, 0.1, 9), linear_pool(8, 7, 0.1, 10)]
    members = _Stack(pools).draw(torch.arange(3), 40, seeded(11))
    for drawn, pool in zip(members, pools, strict=True):
        assert drawn.sum(-1).unique().tolist() == [float(pool.batch)]
        assert float(drawn[:, len(pool.features) :].sum()) == 0.0
        assert bool((drawn[:, : len(pool.features)].sum(0) > 0).all())


@pytest.mark.parametrize(("n", "batch", "expected"), [(4, 2, 6), (5, 1, 5), (30, 8, 50)])
def test_distinct_draws_never_coincide_and_stop_at_the_number_of_subsets(
    n: int, batch: int, expected: int
) -> None:
    members = linear_pool(n, batch, 0.1, 12).draw_distinct(50, seeded(13))
    assert members.shape == (expected, n)
    assert len(members.unique(dim=0)) == expected
    assert members.sum(-1).unique().tolist() == [float(batch)]


def test_an_observation_is_the_sum_of_the_batch_plus_noise_of_the_stated_spread() -> None:
    pool = linear_pool(10, 3, 1.7, 14)
    members = pool.draw(4000, seeded(15))
    noise = pool.observe(members, seeded(16)) - members @ pool.coordinates
    assert abs(float(noise.std()) - 1.7) < 4 * 1.7 / math.sqrt(2 * noise.numel())


def trained_value(train: list[Pool], held: list[Pool], evaluated: Pool, steps: int) -> float:
    critic, _ = train_critic(
        train, held, pairs=32, steps=steps, hidden=32, informed=False, lr=1e-2, generator=seeded(17)
    )
    factor = best_temperature(critic, held[0], 32, seeded(18))
    scores, _, _ = evaluate_critic(critic, evaluated, 32, seeded(19))
    return float(infonce(factor * scores))


def test_training_learns_an_unknown_linear_map_from_examples_to_gradients() -> None:
    train, held = [linear_pool(60, 3, 0.3, 20)], [linear_pool(20, 3, 0.3, 21)]
    evaluated = linear_pool(60, 3, 0.3, 22)
    untrained = trained_value(train, held, evaluated, 0)
    trained = trained_value(train, held, evaluated, 200)
    assert untrained < 0.5
    assert trained > 2.0
    assert trained <= math.log(32)


def test_training_on_unrelated_features_finds_about_nothing() -> None:
    train, held = [unrelated_pool(60, 3, 0.3, 23)], [unrelated_pool(20, 3, 0.3, 24)]
    assert trained_value(train, held, unrelated_pool(60, 3, 0.3, 25), 100) < 0.2
