"""Batches are distinct, and everything is in units of the pairs the critic is fitted to."""

import math

import torch
from torch import nn

from fedaudit.measures.local_release import LocalTraining
from fedaudit.measures.token_pairs import TokenPairs, draw_batches, one_party, standardised
from fedaudit.measures.watched_gradients import LayerVectors, watched_layers
from fedaudit.types import StepRelease


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_batches_are_distinct_and_as_many_as_there_are() -> None:
    for n, size, count, expected in ((9, 4, 30, 30), (5, 4, 30, 5), (6, 1, 4, 4)):
        drawn = draw_batches(n, size, count, seeded(0))
        rows = {tuple(sorted(row)) for row in drawn.tolist()}
        assert len(rows) == len(drawn) == expected == min(count, math.comb(n, size))
        assert all(len(set(row)) == size for row in drawn.tolist())
    often = draw_batches(10, 3, 100, seeded(1)).flatten().bincount(minlength=10)
    assert int(often.min()) > 0


def pairs(seed: int, scale: float = 1.0) -> TokenPairs:
    draws = seeded(seed)
    features = torch.randn(12, 3, generator=draws) * torch.tensor([1.0, 50.0, 0.0]) + 7
    spread = scale * torch.tensor([1.0] * 4 + [100.0] * 4 + [0.0])
    gradients = torch.randn(20, 9, generator=draws) * spread + 5
    members, sizes = draw_batches(12, 2, 20, draws), torch.full((20,), 2)
    return TokenPairs(features, members, sizes, gradients, torch.zeros(20, dtype=torch.int64))


def test_every_layer_and_feature_counts_alike_in_units_of_the_first_part() -> None:
    train, held = standardised([pairs(0), pairs(1, scale=2.0)], [4, 4, 1])
    torch.testing.assert_close(train.gradients.mean(0), torch.zeros(9), rtol=0, atol=1e-5)
    for layer in torch.split(train.gradients, [4, 4, 1], dim=1)[:2]:
        torch.testing.assert_close(layer.square().mean(), torch.tensor(1.0))
        assert not torch.allclose(layer.square().mean(0), torch.ones(4), atol=1e-3)  # one scale per layer
    assert not train.gradients[:, 8].any() and not held.gradients[:, 8].any()
    torch.testing.assert_close(train.features.std(0, correction=0), torch.tensor([1.0, 1.0, 0.0]))
    assert 1.5 < float(held.gradients[:, :8].square().mean().sqrt()) < 2.5
    changed = TokenPairs(**{**vars(pairs(1)), "gradients": 1e6 * pairs(1).gradients})
    again, _ = standardised([pairs(0), changed], [4, 4, 1])
    assert torch.equal(again.gradients, train.gradients) and torch.equal(again.features, train.features)


def test_a_pair_is_a_batch_with_the_gradient_of_that_batch() -> None:
    model = nn.Sequential(nn.Linear(4, 2))
    x, y = torch.randn(6, 4, generator=seeded(2)), torch.zeros(6, dtype=torch.long)
    members = draw_batches(6, 3, 5, seeded(3))
    vectors = LayerVectors(watched_layers(model), model.state_dict(), 0, seeded(4))
    training = LocalTraining(1, 3, 1.0, StepRelease(None, 0.0, 1.0))
    found = one_party(
        model,
        model.state_dict(),
        lambda outputs, labels: outputs.sum(),
        x,
        y,
        members,
        training,
        vectors,
        ("0", True),
        seeded(5),
    )
    assert torch.equal(found.features, x) and torch.equal(found.members, members)
    for row, batch in zip(found.gradients, members, strict=True):
        torch.testing.assert_close(row, torch.cat([x[batch].mean(0).repeat(2), torch.ones(2)]))
