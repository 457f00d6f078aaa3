"""Algorithm 1 and its statistic against loops over pairs and examples, and what training finds."""

import math

import pytest
import torch
from torch import Tensor

from fedaudit.measures.mi_bounds import infonce, permutation_p_value
from fedaudit.measures.token_critic import (
    TokenCritic,
    algorithm_one,
    batch_values,
    paper_difference,
    train_and_validate,
)
from fedaudit.measures.token_pairs import TokenPairs, draw_batches, join_pairs, mismatched


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


SIZES = [3, 1, 2, 3]
WEIGHTS = torch.tensor([[1 / 3] * 3, [1.0, 0, 0], [0.5, 0.5, 0], [1 / 3] * 3])


def scores(seed: int) -> Tensor:
    return torch.randn(4, 3, generator=seeded(seed), dtype=torch.float64)


def value_by_loops(matched: Tensor, shuffled: Tensor, pairs: list[int]) -> float:
    """I(X';G') of Algorithm 1 for the given pairs, written out."""
    positive = negative = 0.0
    for pair in pairs:
        size = SIZES[pair]
        positive += sum(float(matched[pair, i]) for i in range(size)) / size
        negative += sum(math.exp(float(shuffled[pair, i])) for i in range(size)) / size
    return positive / len(pairs) - math.log(negative / len(pairs))


def test_algorithm_one_is_its_sums_written_out() -> None:
    expected = value_by_loops(scores(0), scores(1), [0, 1, 2, 3])
    assert float(algorithm_one(scores(0), scores(1), WEIGHTS)) == pytest.approx(expected, abs=1e-6)
    reordered = algorithm_one(scores(0), scores(1).flip(0), WEIGHTS, WEIGHTS.flip(0))
    assert float(reordered) == pytest.approx(expected, abs=1e-6)


def test_the_papers_difference_is_the_mean_of_differences_of_single_batches() -> None:
    expected = [
        value_by_loops(scores(0), scores(1), [pair]) - value_by_loops(scores(2), scores(3), [pair])
        for pair in range(4)
    ]
    found = paper_difference(scores(0), scores(1), scores(2), scores(3), WEIGHTS)
    assert float(found) == pytest.approx(sum(expected) / 4, abs=1e-6)
    single = batch_values(scores(0), scores(1), WEIGHTS)
    assert float(single[2]) == pytest.approx(value_by_loops(scores(0), scores(1), [2]), abs=1e-6)


def test_a_padded_place_has_no_influence() -> None:
    changed = scores(0)
    changed[1, 2] = 50.0
    for place in range(2):
        arguments = [scores(1), scores(1)]
        arguments[place] = torch.where(WEIGHTS > 0, scores(1), changed)
        assert torch.equal(algorithm_one(*arguments, WEIGHTS), algorithm_one(scores(1), scores(1), WEIGHTS))


def test_a_mismatched_gradient_is_anothers_of_the_same_party() -> None:
    groups = torch.tensor([0, 1, 0, 1, 0, 0, 1, 1])
    partner = mismatched(groups, seeded(0), 3)
    own = torch.arange(8)
    rows = [own, *partner]
    for row in partner:
        assert torch.equal(groups[row], groups)
        assert sorted(row.tolist()) == own.tolist()
    for i, one in enumerate(rows):
        assert not any(bool((one == other).any()) for other in rows[i + 1 :])
    with pytest.raises(ValueError, match=r"3 shuffles .* at least 4 pairs of a party, got 3"):
        mismatched(torch.zeros(3, dtype=torch.int64), seeded(0), 3)


def planted(seed: int, *, dependent: bool = True, batches: int = 24, examples: int = 20) -> TokenPairs:
    """A gradient that is a fixed linear map of its batch's mean features, or has nothing to do with it."""
    generator = seeded(seed)
    features = torch.randn(examples, 6, generator=generator)
    members = draw_batches(examples, 3, batches, generator)
    means = features[members].mean(1)
    if not dependent:
        means = torch.randn(means.shape, generator=generator) / math.sqrt(3)
    mixing = torch.randn(6, 15, generator=seeded(99))
    return TokenPairs(
        features, members, torch.full((batches,), 3), means @ mixing, torch.zeros(batches, dtype=torch.int64)
    )


def critic(extractor="autoencoder", seed: int = 0, lr: float = 3e-3) -> TokenCritic:
    return TokenCritic(6, [10, 5], extractor, seeded(seed), lr=lr, extractor_lr=lr / 10)


@pytest.mark.parametrize("extractor", ["autoencoder", "transformer"])
def test_scores_are_the_networks_for_every_pair_of_a_gradient_and_a_batch(extractor) -> None:
    pairs, found = planted(0, batches=5), critic(extractor)
    network = found.network
    table = found.pair_scores(pairs)
    with torch.no_grad():
        for i in range(5):
            token = network.extractor(pairs.gradients[i : i + 1])
            for j in range(5):
                data = network.of_data(pairs.features[pairs.members[j]])
                beside = network.of_gradient(token).expand(3, -1)
                single = network.head(torch.cat([data, beside], dim=1)).squeeze(1)
                assert float(table[i, j]) == pytest.approx(float(single.mean()), abs=1e-5)
                if j == 2:
                    row = found.scores(pairs, torch.full((5,), i))[j]
                    torch.testing.assert_close(row, single, rtol=1e-4, atol=1e-5)


def test_joined_pairs_keep_their_scores_and_their_parties_apart() -> None:
    short = planted(1, batches=6)
    short = TokenPairs(short.features, short.members[:, :2], short.sizes - 1, short.gradients, short.groups)
    parts, found = [planted(0, batches=5), short], critic()
    joined = join_pairs(parts)
    assert joined.groups.tolist() == [0] * 5 + [1] * 6
    torch.testing.assert_close(joined.weights.sum(1), torch.ones(11))
    for part, rows in zip(parts, (slice(0, 5), slice(5, 11)), strict=True):
        expected = found.pair_scores(part)
        torch.testing.assert_close(found.pair_scores(joined)[rows, rows], expected, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="at least one part, got none"):
        join_pairs([])


def test_the_extractor_learns_at_its_own_rate() -> None:
    found = TokenCritic(6, [10, 5], "autoencoder", seeded(0))
    before = {name: p.clone() for name, p in found.network.named_parameters()}
    found.fit(planted(0), 1, seeded(1))
    for name, after in found.network.named_parameters():
        if after.ndim < 2:
            continue  # the last bias has no gradient: the loss does not change with a constant
        largest = float((after - before[name]).detach().abs().max())  # Adam's first step is its learning rate
        assert largest == pytest.approx(1e-5 if name.startswith("extractor") else 1e-4, rel=0.02)
    assert found.steps == 1 and not found.network.training


@pytest.mark.parametrize(("extractor", "steps"), [("autoencoder", 100), ("transformer", 20)])
def test_a_planted_relation_is_found_on_examples_the_critic_has_not_seen(extractor, steps) -> None:
    train, validation, held = [[planted(10 * seed + purpose) for seed in range(4)] for purpose in range(3)]
    trained = train_and_validate(critic(extractor), train, validation, steps, seeded(3), share=0.2)
    value, difference = trained.critic.paper(join_pairs(train), seeded(4))
    assert value > 0.05 and difference > 0.1
    trained.critic.restore(trained.best)
    assert trained.step > 0
    for pairs in held:
        table = trained.temperature * trained.critic.pair_scores(pairs).double()
        assert float(infonce(table)) > 0.15
        assert permutation_p_value(table, 199, seeded(5))[0] <= 0.05


def test_unrelated_pairs_look_related_on_the_critics_own_batches_only() -> None:
    train = join_pairs([planted(10 * seed, dependent=False, batches=12) for seed in range(2)])
    found, held = critic(lr=1e-3), [planted(1000 + seed, dependent=False) for seed in range(20)]
    for sub_epoch in range(3):
        found.fit(train, 50, seeded(sub_epoch), share=0.3)
    _, in_sample = found.paper(train, seeded(4))
    _, out_of_sample = found.paper(join_pairs(held), seeded(4))
    assert in_sample > 0.3
    assert abs(out_of_sample) < 0.4 * in_sample
    p = [permutation_p_value(found.pair_scores(x).double(), 199, seeded(i))[0] for i, x in enumerate(held)]
    assert sum(value <= 0.05 for value in p) <= 4  # P[Bin(20, 0.05) > 4] = 0.003


def test_a_sub_epoch_goes_on_from_the_last_and_the_same_seeds_give_the_same_critic() -> None:
    def run() -> tuple[float, float]:
        found, draws = critic("transformer"), seeded(7)
        found.fit(planted(0), 2, draws)
        found.fit(planted(1), 2, draws)
        assert found.steps == 4
        return found.paper(planted(2), seeded(8))

    assert run() == run()
    found = critic()
    start = found.state()
    value = found.paper(planted(2), seeded(8))
    found.fit(planted(0), 3, seeded(9))
    assert found.paper(planted(2), seeded(8)) != value
    found.restore(start)
    assert found.paper(planted(2), seeded(8)) == value
