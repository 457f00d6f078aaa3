"""Identifiability: the nearest neighbour of what an attack recovered, and how often chance finds it."""

import math

import pytest
import torch
from torch import Tensor, nn

from fedaudit.attacks.identifiability import chance_level, head_features, nearest_is_own
from fedaudit.models.build import build_model


def points(count: int, seed: int, features: int = 24) -> Tensor:
    return torch.randn(count, features, generator=torch.Generator().manual_seed(seed))


def test_noise_points_to_the_true_example_as_often_as_chance() -> None:
    K, trials = 20, 400
    hits = 0
    for seed in range(trials):
        pool = points(K, seed)
        guess = points(1, 10_000 + seed)
        own = torch.randint(K, (1,), generator=torch.Generator().manual_seed(seed))
        hits += int(nearest_is_own(guess, own, pool))
    chance = chance_level(1, K)
    assert hits / trials == pytest.approx(chance, abs=4 * math.sqrt(chance * (1 - chance) / trials))


def test_a_noisy_copy_is_identified_and_a_copy_of_another_is_not() -> None:
    pool = points(50, 0)
    copies = pool[:3] + 0.1 * points(3, 1)
    assert nearest_is_own(copies, torch.tensor([0, 1, 2]), pool).tolist() == [True, True, True]
    assert nearest_is_own(copies, torch.tensor([1, 2, 0]), pool).tolist() == [False, False, False]


def test_it_agrees_with_the_distances_written_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedaudit.attacks.identifiability.BLOCK", 7 * 24)  # blocks of 7 candidates
    pool, guess = points(30, 0), points(30, 1)
    own = torch.randperm(30, generator=torch.Generator().manual_seed(2))
    nearest = torch.cdist(guess.double(), pool.double()).argmin(1)
    assert nearest_is_own(guess, nearest, pool).all()
    assert torch.equal(nearest_is_own(guess, own, pool), nearest == own)


def test_a_duplicate_of_the_true_example_does_not_hide_it() -> None:
    pool = torch.cat([points(4, 0), points(4, 0)])
    assert nearest_is_own(pool[:4], torch.arange(4), pool).all()


def test_features_are_the_input_of_the_last_linear_layer() -> None:
    model = build_model("mlp(hidden=6)", (1, 8, 8), 3, seed=0)
    x = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    expected = linear[0](x.flatten(1)).relu()
    torch.testing.assert_close(head_features(model, x), expected.detach())
    assert not any(module._forward_pre_hooks for module in linear)
    with pytest.raises(ValueError, match="got a model without"):
        head_features(nn.Sequential(nn.Flatten(), nn.ReLU()), x)


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(ValueError, match="one position each in a pool"):
        nearest_is_own(points(2, 0), torch.tensor([0]), points(3, 1))
    with pytest.raises(ValueError, match="a pool holds the batch, got 4 examples in a pool of 3"):
        chance_level(4, 3)
