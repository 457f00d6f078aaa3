"""Whose examples a round-wise measure sees, at which weights and under which release."""

import pytest
import torch
from torch import Tensor, nn

from fedaudit.measures.round_examples import broadcast_model, round_examples
from fedaudit.types import ClientUpdate, LocalEvidence, RoundContext, StepRelease

OLD, NEW = {"weight": torch.zeros(1, 2)}, {"weight": torch.ones(1, 2)}
RELEASES = [StepRelease(1.0, 2.0, 0.1), StepRelease(1.0, 0.5, 0.3), StepRelease(4.0, 0.5, 0.2)]


def update(client: int, weights: dict[str, Tensor] = NEW) -> ClientUpdate:
    return ClientUpdate(client, 1, weights, {}, 10)


def oracle(sizes: list[int], seed: int = 0, observer: str = "oracle") -> RoundContext:
    """Client c's examples are 100 c, 100 c + 1, ..."""

    def evidence(u: ClientUpdate) -> LocalEvidence:
        x = 100.0 * u.client_id + torch.arange(sizes[u.client_id])[:, None]
        return LocalEvidence(x, x[:, 0].long(), RELEASES[u.client_id % 3])

    return RoundContext(1, evidence=evidence, observer=observer, seed=seed)  # type: ignore[arg-type]


def counts(y: Tensor) -> list[int]:
    return torch.bincount(y // 100).tolist()


def test_clients_give_equally_many_until_they_have_no_more() -> None:
    found = round_examples([update(0), update(1), update(2)], oracle([50, 4, 50]), 30, "probe")
    assert counts(found.y) == [13, 4, 13]
    assert torch.equal(found.x[:, 0].long(), found.y)
    assert len(found.y.unique()) == 30
    assert found.described["examples"] == 30
    assert found.described["clients"] == 3
    assert len(round_examples([update(0), update(1)], oracle([5, 4]), 30, "probe").y) == 9


def test_more_clients_than_examples_leave_some_out() -> None:
    found = round_examples([update(c) for c in range(5)], oracle([9] * 5), 3, "probe")
    assert counts(found.y) == [1, 1, 1]
    assert found.clients == 3


def test_what_a_client_gives_depends_on_its_own_examples_and_the_seed() -> None:
    alone = round_examples([update(0)], oracle([50, 50]), 10, "probe").y
    beside = round_examples([update(0), update(1)], oracle([50, 50]), 20, "probe").y
    assert torch.equal(alone, beside[beside < 100])
    assert not torch.equal(alone, round_examples([update(0)], oracle([50], seed=1), 10, "probe").y)
    assert not torch.equal(alone, round_examples([update(0)], oracle([50]), 10, "another").y)


def test_the_least_protected_release_counts() -> None:
    updates = [update(0), update(1), update(2)]
    found = round_examples(updates, oracle([5, 5, 5]), 10, "probe")
    assert found.release == RELEASES[2]  # as little noise as another, but clipped less
    assert found.releases == 3
    server = RoundContext(
        1,
        reference=(torch.zeros(6, 2), torch.zeros(6)),
        release=lambda u: StepRelease(None if u.client_id else 1.0, 0.0, 0.1),
    )
    found = round_examples(updates, server, 10, "probe")
    assert found.release.clip_norm is None
    assert found.described["clip-norm"] == "none"
    assert found.described["examples-of"] == "reference"


def test_the_weights_most_updates_share_count_and_only_their_clients() -> None:
    found = round_examples([update(0, OLD), update(1), update(2)], oracle([9, 9, 9]), 10, "probe")
    assert found.weights is NEW
    assert counts(found.y) == [0, 5, 5]


def test_a_client_that_measures_itself_draws_apart_from_others() -> None:
    assert round_examples([update(2)], oracle([9] * 3, observer="client"), 10, "probe").key == 2
    assert round_examples([update(2)], oracle([9] * 3), 10, "probe").key == -1


def test_a_context_without_what_the_observer_needs_is_refused() -> None:
    for observer in ("server", "client", "oracle"):
        ctx = RoundContext(1, observer=observer)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=f"probe lacks what observer '{observer}' needs"):
            round_examples([update(0)], ctx, 10, "probe")
    with pytest.raises(ValueError, match="need the model and the loss"):
        broadcast_model(RoundContext(1), NEW)


def test_the_model_is_at_the_broadcast_weights_and_evaluates() -> None:
    ctx = RoundContext(1, build_model=lambda: nn.Linear(2, 1, bias=False), loss=lambda o, y: o.sum())
    torch.manual_seed(0)
    before = torch.get_rng_state()
    model, _ = broadcast_model(ctx, NEW)
    assert torch.equal(before, torch.get_rng_state())
    assert not model.training
    assert model(torch.tensor([[1.0, 2.0]])).item() == 3.0
