"""Nats that a protected gradient gives about its batch: planted cases whose answer is known."""

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedaudit.measures.batch_pools import split_examples
from fedaudit.measures.draws import generator_for
from fedaudit.measures.mutual_information import MINIMUM_EXAMPLES, MutualInformation
from fedaudit.needs import Needs
from fedaudit.registry import MEASURES
from fedaudit.spec import parse_spec
from fedaudit.types import ClientUpdate, Estimate, LocalEvidence, RoundContext, Skip, StepRelease

FAST = {"steps": 40, "pairs": 32, "permutations": 199}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def build_linear() -> nn.Module:
    return nn.Linear(12, 3)


def loss(outputs: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(outputs, labels, reduction="sum")


def sum_of_outputs(outputs: Tensor, labels: Tensor) -> Tensor:
    """Its gradient for a weight row is the input itself: the gradient IS the batch's sum."""
    return outputs.sum()


WEIGHTS = {
    "weight": 0.3 * torch.randn(3, 12, generator=seeded(0)),
    "bias": torch.zeros(3),
}


def update(client: int, weights: dict[str, Tensor] | None = None) -> ClientUpdate:
    return ClientUpdate(client, 1, WEIGHTS if weights is None else weights, {}, 60)


def examples(client: int, n: int = 60) -> tuple[Tensor, Tensor]:
    generator = seeded(100 + client)
    return torch.randn(n, 12, generator=generator), torch.randint(3, (n,), generator=generator)


def oracle(
    noise: float | Sequence[float] = 0.0,
    *,
    sizes: Sequence[int] | None = None,
    clip_norm: float | None = 1.0,
    seed: int = 0,
    batch: int | None = 4,
    used_loss=loss,
) -> RoundContext:
    def evidence(u: ClientUpdate) -> LocalEvidence:
        x, y = examples(u.client_id, 60 if sizes is None else sizes[u.client_id])
        std = noise if isinstance(noise, (int, float)) else noise[u.client_id]
        return LocalEvidence(x, y, StepRelease(clip_norm, float(std), 4 / 60))

    return RoundContext(
        round=1,
        build_model=build_linear,
        loss=used_loss,
        batch_size=batch,
        num_classes=3,
        evidence=evidence,
        observer="oracle",
        seed=seed,
    )


def measured(ctx: RoundContext, clients: int = 3, **options: int | float | bool) -> list[Estimate]:
    results = MutualInformation(**{**FAST, **options})([update(i) for i in range(clients)], ctx)
    assert all(isinstance(result, Estimate) for result in results)
    return [result for result in results if isinstance(result, Estimate)]


def test_a_bare_gradient_identifies_its_batch_up_to_the_ceiling() -> None:
    for estimate in measured(oracle(0.0)):
        assert estimate.extra["ceiling"] == pytest.approx(math.log(64))
        assert math.log(64) - 0.01 < estimate.value <= math.log(64) + 1e-9
        assert estimate.extra["top-1"] == 1.0
        assert estimate.extra["p-value"] == 1 / 200
        assert estimate.unit == "nats"
        assert estimate.kind == "estimate"


def test_gradients_unlike_those_the_critic_was_fitted_to_still_identify_their_batch() -> None:
    def evidence(u: ClientUpdate) -> LocalEvidence:
        x, y = examples(u.client_id)
        sizes = torch.exp(2.5 * torch.randn(len(x), 1, generator=seeded(200 + u.client_id)))
        return LocalEvidence(x * sizes, y, StepRelease(None, 0.0, 4 / 60))

    for estimate in measured(RoundContext(**{**vars(oracle(0.0)), "evidence": evidence}), clients=5):
        assert math.log(64) - 0.01 < estimate.value <= math.log(64) + 1e-9


def test_donsker_varadhan_stays_within_what_its_reference_batches_can_resolve() -> None:
    for noise in (0.0, 1e-3, 0.5):
        for estimate in measured(oracle(noise)):
            value = float(estimate.extra["donsker-varadhan"])
            assert abs(value) <= 2 * math.log(512)
            assert value > estimate.value - 0.3  # what InfoNCE finds it finds, up to its own spread


def test_a_critic_that_must_learn_the_gradient_finds_the_planted_batch_sum() -> None:
    ctx = oracle(0.1, clip_norm=None, used_loss=sum_of_outputs)
    for estimate in measured(ctx, informed=False, steps=200, pairs=64, lr=1e-2):
        assert estimate.value > 0.75 * math.log(64)
        assert estimate.extra["p-value"] == 1 / 200


def test_huge_noise_leaves_nothing_to_find() -> None:
    estimates = measured(oracle(100.0), clients=10)
    p = torch.tensor([float(e.extra["p-value"]) for e in estimates])
    assert int((p <= 0.05).sum()) <= 3  # P[Bin(10, 0.05) > 3] = 0.001
    for estimate in estimates:
        assert abs(estimate.value) < 0.1
        assert estimate.low is not None
        assert estimate.high is not None
        assert estimate.low - 0.05 < 0 < estimate.high + 0.05
        assert float(estimate.extra["gaussian-channel"]) < 0.01


FAINT = 1e-7


class FaintPixels(nn.Module):
    """Sees pixels too faint to count as varying: an example's gradient is unrelated to what a critic sees."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        return x[:, 6:] @ self.weight / FAINT


def p_values_without_a_relation(rounds: int, clients: int, **options: float | bool) -> list[float]:
    """p-values of clients whose examples' gradients are independent of their other pixels and labels."""

    def evidence(u: ClientUpdate) -> LocalEvidence:
        x, y = torch.randn(30, 12, generator=seeded(u.client_id)), torch.arange(30) % 3
        x[:, 6:] *= FAINT
        return LocalEvidence(x, y, StepRelease(None, 0.3, 4 / 30))

    measure = MutualInformation(steps=20, pairs=16, candidates=64, permutations=99, hidden=8, **options)
    found = []
    for number in range(rounds):
        ctx = RoundContext(**{**vars(oracle(used_loss=sum_of_outputs)), "evidence": evidence, "seed": number})
        ctx = RoundContext(**{**vars(ctx), "build_model": FaintPixels})
        names = range(number * clients, (number + 1) * clients)
        results = measure([update(name, {"weight": torch.zeros(6)}) for name in names], ctx)
        found += [float(result.extra["p-value"]) for result in results if isinstance(result, Estimate)]
    assert len(found) == rounds * clients
    return found


def alarms_at_five_percent(p_values: list[float]) -> float:
    return sum(p <= 0.05 for p in p_values) / len(p_values)


def test_gradients_unrelated_to_what_the_critic_sees_raise_few_alarms() -> None:
    rate = alarms_at_five_percent(p_values_without_a_relation(3, 20, informed=False))
    assert rate <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 60)


@pytest.mark.slow
def test_two_hundred_unrelated_clients_raise_between_two_and_eight_percent_false_alarms() -> None:
    assert 0.02 <= alarms_at_five_percent(p_values_without_a_relation(20, 10, informed=False)) <= 0.08


def test_more_noise_gives_less_information_for_every_client() -> None:
    by_noise = [[e.value for e in measured(oracle(noise))] for noise in (0.05, 0.5, 2.0)]
    for little, some, much in zip(*by_noise, strict=True):
        assert little > some + 0.3
        assert some > much + 0.3


def test_the_value_is_near_the_known_likelihood_and_below_the_gaussian_channel() -> None:
    for estimate in measured(oracle(0.5)):
        likelihood = float(estimate.extra["known-likelihood"])
        assert estimate.value > likelihood - 0.15
        assert estimate.high is not None
        assert estimate.low is not None
        # terms of the value spread as the interval does: half its width is about two standard errors
        assert estimate.value - (estimate.high - estimate.low) < float(estimate.extra["gaussian-channel"])


def test_no_example_serves_two_purposes() -> None:
    for n in (MINIMUM_EXAMPLES, 61, 400):
        parts = split_examples(n, 256, seeded(n))
        joined = torch.cat(parts)
        assert len(joined.unique()) == len(joined) == min(n, 256)
        assert min(len(part) for part in parts) >= 4


def test_the_critic_and_its_scales_do_not_see_held_out_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    import fedaudit.measures.mutual_information as module

    seen: list[Tensor] = []
    original = module.train_critic

    def spying(train, validation, **options):  # type: ignore[no-untyped-def]
        seen.append(torch.cat([pool.features for pool in train + validation]))
        return original(train, validation, **options)

    monkeypatch.setattr(module, "train_critic", spying)
    held_out = split_examples(60, 256, generator_for(oracle(), "mutual-information", "split", 0))[2]

    def changed(u: ClientUpdate) -> LocalEvidence:
        x, y = examples(u.client_id)
        x = x.clone()
        x[held_out] = 7.0 * torch.rand(len(held_out), 12, generator=seeded(5))
        return LocalEvidence(x, y, StepRelease(1.0, 0.5, 4 / 60))

    ctx = oracle(0.5)
    measured(ctx, clients=1)
    measured(RoundContext(**{**vars(ctx), "evidence": changed}), clients=1)
    torch.testing.assert_close(seen[0], seen[1])


def test_the_same_seed_gives_the_same_numbers_and_another_seed_others() -> None:
    first, again, other = (measured(oracle(0.5, seed=seed)) for seed in (0, 0, 1))
    assert first == again
    assert [e.value for e in first] != [e.value for e in other]


def test_measuring_leaves_the_global_random_state_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    measured(oracle(0.5), clients=1)
    assert torch.equal(before, torch.get_rng_state())


def test_another_clients_noise_hardly_moves_a_clients_value() -> None:
    alike = measured(oracle([0.5, 0.5, 0.5]))[0]
    mixed = measured(oracle([0.5, 20.0, 20.0]))[0]
    assert mixed.extra["known-likelihood"] == pytest.approx(alike.extra["known-likelihood"], abs=1e-6)
    assert mixed.value == pytest.approx(alike.value, abs=0.15)


def test_updates_from_other_weights_are_measured_at_their_own_weights() -> None:
    other = {name: 2 * value for name, value in WEIGHTS.items()}
    measure = MutualInformation(**FAST)
    mixed = measure([update(0), update(1, other), update(2)], oracle(0.5))
    assert mixed[1] == measure([update(1, other)], oracle(0.5))[0]
    equal_copy = {name: value.clone() for name, value in WEIGHTS.items()}
    assert measure([update(0), update(2, equal_copy)], oracle(0.5)) == [mixed[0], mixed[2]]


def test_a_client_with_too_few_examples_is_skipped_and_the_others_are_measured() -> None:
    results = MutualInformation(**FAST)([update(0), update(1)], oracle(0.5, sizes=[60, 10]))
    assert isinstance(results[0], Estimate)
    assert isinstance(results[1], Skip)
    assert "at least 24 examples to split, got 10" in results[1].reason


def test_only_small_clients_are_an_error_that_names_the_number() -> None:
    with pytest.raises(ValueError, match="at least 24 examples to split, got 9"):
        MutualInformation(**FAST)([update(0)], oracle(0.5, sizes=[9]))


def test_the_smallest_client_is_measured_with_the_batches_it_can_form() -> None:
    small = measured(oracle(0.5, sizes=[MINIMUM_EXAMPLES], batch=32), clients=1)[0]
    assert small.extra["examples-held-out"] == 9
    assert small.extra["batch"] == 4  # half the held-out examples
    single = measured(oracle(0.5, sizes=[MINIMUM_EXAMPLES], batch=1), clients=1)[0]
    assert single.extra["ceiling"] == pytest.approx(math.log(9))


def test_the_batch_size_follows_the_sample_rate_where_it_is_not_agreed() -> None:
    assert measured(oracle(0.5, batch=None), clients=1)[0].extra["batch"] == 4


def server(stds: Sequence[float]) -> RoundContext:
    def no_evidence(u: ClientUpdate) -> LocalEvidence:
        raise AssertionError("a server has no client's examples")

    return RoundContext(
        round=1,
        build_model=build_linear,
        loss=loss,
        lr=0.1,
        local_steps=1,
        batch_size=4,
        num_classes=3,
        reference=examples(50, 80),
        release=lambda u: StepRelease(1.0, stds[u.client_id], 0.1),
        evidence=no_evidence,
        observer="server",
    )


def test_a_server_measures_its_reference_once_per_distinct_release() -> None:
    first, second, third = measured(server([0.3, 2.0, 0.3]))
    assert first == third
    assert first.value > second.value + 0.5
    assert first.extra["examples-of"] == "reference"


@pytest.mark.parametrize("observer", ["client", "oracle", "server"])
def test_each_observer_states_what_it_needs(observer: str) -> None:
    measure = MutualInformation()
    needs = measure.needs(observer)  # type: ignore[arg-type]
    expected = Needs.EVIDENCE | Needs.MODEL
    if observer == "server":
        expected = Needs.REFERENCE | Needs.MODEL | Needs.RELEASE | Needs.TRAINING
    assert needs == expected
    assert observer in measure.observers


def test_options_are_written_in_the_spec_and_checked() -> None:
    built = MEASURES.build(parse_spec("mutual-information(candidates=16, dims=8)"))
    assert built == MutualInformation(candidates=16, dims=8)
    with pytest.raises(ValueError, match="candidates must be at least 2, got 1"):
        MutualInformation(candidates=1)
    with pytest.raises(ValueError, match="lr must be positive"):
        MutualInformation(lr=0.0)
