"""The null of held-out batches: exact where features say nothing, narrow where only pairs are shuffled."""

import math

import pytest
import torch
from torch import Tensor

from fedaudit.measures.batch_critic import (
    BatchCritic,
    Pool,
    best_temperature,
    evaluate_critic,
    score_batches,
    train_critic,
)
from fedaudit.measures.batch_null import example_permutation_null, exceedance
from fedaudit.measures.mi_bounds import infonce, permutation_p_value


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn_pool(n: int, noise: float, seed: int, related: float) -> Pool:
    """Gradient coordinates that hold a fraction `related` of their variance in common with the features."""
    features, other = torch.randn(2, n, 4, generator=seeded(seed), dtype=torch.float64)
    coordinates = math.sqrt(related) * features + math.sqrt(1 - related) * other
    return Pool(features, coordinates, torch.ones(4, dtype=torch.float64), noise, 3)


def fitted(seed: int, related: float, noise: float = 0.3) -> tuple[BatchCritic, float]:
    train, validation = (drawn_pool(n, noise, 3 * seed + i, related) for i, n in enumerate((30, 12)))
    critic, _ = train_critic(
        [train], [validation], pairs=32, steps=20, hidden=16, informed=False, lr=1e-2, generator=seeded(seed)
    )
    return critic, best_temperature(critic, validation, 32, seeded(seed + 1))


def both_p_values(critic: BatchCritic, temperature: float, held: Pool, seed: int) -> tuple[float, float]:
    """By permuting examples, and by shuffling which batch goes with which observation."""
    scores, members, _ = evaluate_critic(critic, held, 64, seeded(seed))
    value = float(infonce(temperature * scores))
    null = example_permutation_null(critic, held, members, temperature, 99, seeded(seed + 1))
    return exceedance(value, null), permutation_p_value(temperature * scores, 99, seeded(seed + 2))[0]


def test_a_permuted_value_is_the_value_of_a_pool_whose_gradients_were_permuted() -> None:
    held = drawn_pool(9, 0.0, 0, 0.5)
    critic, temperature = fitted(1, 0.5)
    members = held.draw_distinct(16, seeded(2))
    null = example_permutation_null(critic, held, members, temperature, 60, seeded(3))
    generator = seeded(3)
    first = torch.rand(50, 9, generator=generator)  # in blocks of fifty, each followed by its noise
    torch.randn(50, 16, 4, generator=generator)
    for value, keys in zip(null, [*first, *torch.rand(10, 9, generator=generator)], strict=True):
        dealt = Pool(held.features, held.coordinates[keys.argsort()], held.variance, 0.0, 3)
        observed = members @ dealt.coordinates
        expected = infonce(temperature * score_batches(critic, dealt, members, observed))
        torch.testing.assert_close(value, expected)


def test_the_noise_of_a_permuted_value_has_the_releases_spread() -> None:
    held = drawn_pool(10, 2.0, 4, 0.5)
    sums = torch.zeros(500, 8, 4, dtype=torch.float64)
    spread = float(held.noisy(sums, seeded(5)).std())
    assert abs(spread - 2.0) < 4 * 2.0 / math.sqrt(2 * sums.numel())


def test_permuting_examples_alarms_at_its_level_where_shuffling_pairs_alarms_too_often() -> None:
    level, repeats = 0.05, 120
    critic, temperature = fitted(6, 1.0)  # it looks for a relation that the held-out pools lack
    p = torch.tensor(
        [both_p_values(critic, temperature, drawn_pool(30, 0.3, 100 + i, 0.0), i) for i in range(repeats)]
    )
    by_examples, by_pairs = (p <= level).double().mean(0).tolist()
    error = 4 * math.sqrt(level * (1 - level) / repeats)
    assert abs(by_examples - level) < error
    assert by_pairs > level + error / 2 > by_examples


@pytest.mark.slow
@pytest.mark.parametrize("related", [0.0, 1.0], ids=["trained-on-nothing", "trained-on-a-relation"])
def test_two_hundred_critics_raise_between_two_and_eight_percent_false_alarms(related: float) -> None:
    alarms = 0
    for seed in range(200):
        critic, temperature = fitted(seed, related)
        held = drawn_pool(30, 0.3, 3 * seed + 2, 0.0)
        alarms += both_p_values(critic, temperature, held, seed)[0] <= 0.05
    assert 0.02 <= alarms / 200 <= 0.08


def test_a_weak_relation_is_found_as_often_as_by_shuffling_pairs() -> None:
    critic, temperature = fitted(7, 1.0, noise=3.0)
    p = torch.tensor(
        [both_p_values(critic, temperature, drawn_pool(30, 3.0, 300 + i, 1.0), i) for i in range(20)]
    )
    by_examples, by_pairs = (p <= 0.05).double().mean(0).tolist()
    assert by_examples > 0.5
    assert by_examples > by_pairs - 0.25


def test_a_strong_relation_has_the_smallest_p_value() -> None:
    critic, temperature = fitted(8, 1.0)
    assert both_p_values(critic, temperature, drawn_pool(30, 0.3, 400, 1.0), 9)[0] == 0.01


def test_rounding_does_not_break_a_tie() -> None:
    null = torch.tensor([1.0 - 1e-12, 1.0 + 1e-12, 0.5], dtype=torch.float64)
    assert exceedance(1.0, null) == 0.75


def test_identical_gradients_have_a_p_value_of_one() -> None:
    critic, _ = fitted(10, 1.0)
    held = drawn_pool(12, 0.0, 11, 1.0)
    same: Tensor = torch.ones_like(held.coordinates)
    assert both_p_values(critic, 1.0, Pool(held.features, same, held.variance, 0.0, 3), 12)[0] == 1.0


def test_no_permutations_are_refused() -> None:
    critic, _ = fitted(13, 1.0)
    held = drawn_pool(12, 0.1, 14, 1.0)
    with pytest.raises(ValueError, match="permutations must be at least 1, got 0"):
        example_permutation_null(critic, held, held.draw(4, seeded(0)), 1.0, 0, seeded(0))
