"""Which examples a client leaves out, and what is left to see in the others."""

import math

import pytest
import torch
from torch import Generator, nn
from torch.nn import functional

from fedaudit.defenses.censor import Censor
from fedaudit.training.censorship import (
    Censorship,
    audit_of_gram,
    compare,
    findings,
    gram_at,
    peel,
    rehearsed,
)
from fedaudit.training.local import TrainSettings, client_seed, plan_batches, train_locally

RIDGE = 0.5
SETTINGS = TrainSettings(batch_size=4, local_epochs=2, lr=0.5)


def summed(outputs, labels):
    return functional.cross_entropy(outputs, labels, reduction="sum")


def audit_of(gradients, ridge=RIDGE):
    """The audit of these gradients (n, P) at this ridge."""
    gram = gradients.double() @ gradients.double().T
    return audit_of_gram(gram, ridge / float(gram.diagonal().mean()))


def naive(gradients, rows, ridge):
    """GNQ of the rows among one another: g (S + ridge I)^-1 g with S of the others, P x P."""
    found = []
    for row in rows:
        others = gradients[[r for r in rows if r != row]].double()
        moment = others.T @ others + ridge * torch.eye(gradients.shape[1], dtype=torch.float64)
        g = gradients[row].double()
        found.append(float(g @ torch.linalg.solve(moment, g)))
    return torch.tensor(found, dtype=torch.float64)


def peel_naively(audit_rows, n, removals):
    """The rows left when in every pass the most unique of those left go, one after another."""
    rows = list(range(n))
    for count in removals:
        scores = dict(zip(rows, audit_rows(rows), strict=True))
        for _ in range(count):
            rows.remove(max((r for r in rows), key=lambda r: float(scores[r])))
    return rows


def digits_like(n=12, seed=0):
    """n examples (n, 6) of three classes."""
    generator = Generator().manual_seed(seed)
    return torch.randn(n, 6, generator=generator), torch.randint(3, (n,), generator=generator)


def network(seed=0):
    with torch.random.fork_rng():
        torch.random.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def example_gradients(model, x, y):
    rows = []
    for i in range(len(y)):
        loss = summed(model(x[i : i + 1]), y[i : i + 1])
        rows.append(torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(model.parameters()))]))
    return torch.stack(rows)


# --- peeling ------------------------------------------------------------------------------------------


def test_a_planted_outlier_goes_first_and_duplicates_stay():
    gradients = torch.eye(3)[[0, 0, 0, 1, 0, 0]]
    found = peel(audit_of(gradients), 6, [1])
    assert found.rows.tolist() == [0, 1, 2, 4, 5]
    assert float(found.removed) == pytest.approx(1 / RIDGE)
    assert found.before.tolist() == pytest.approx([1 / (RIDGE + 4)] * 5)
    assert found.after.tolist() == pytest.approx([1 / (RIDGE + 4)] * 5)  # an orthogonal one protects nobody


def test_removing_one_of_two_equal_examples_exposes_the_other():
    gradients = torch.tensor([[3.0, 0.0], [3.0, 0.0], [0.0, 0.1], [0.0, 0.1], [0.0, 0.1]])
    found = peel(audit_of(gradients), 5, [1])
    assert found.rows.tolist() in ([0, 2, 3, 4], [1, 2, 3, 4])  # rounding decides between equals
    assert float(found.before[0]) == pytest.approx(9 / (RIDGE + 9))
    assert float(found.after[0]) == pytest.approx(9 / RIDGE) == pytest.approx(float(found.after.max()))
    assert float(found.after[0]) > 10 * float(found.removed)  # the next layer is worse than the first


def test_an_audit_between_passes_finds_whom_the_first_pass_exposed():
    gradients = torch.diag(torch.tensor([2.0, 1.0, 0.5**0.5, 0.1])).double()
    gradients[1] = torch.tensor([1.0, 0, 0, 0])  # 0 and 1 lie on one axis: 4/2 and 1/5 at ridge 1
    audit = audit_of(gradients, ridge=1.0)
    assert peel(audit, 4, [2]).rows.tolist() == [1, 3]
    assert peel(audit, 4, [1, 1]).rows.tolist() == [2, 3]


@pytest.mark.parametrize("removals", [[], [3], [1, 2], [1, 1, 1, 1]])
def test_peeling_is_the_naive_loop_of_leave_one_out_audits(removals):
    gradients = torch.randn(9, 5, generator=Generator().manual_seed(1))
    found = peel(audit_of(gradients), 9, removals)
    rows = peel_naively(lambda rows: naive(gradients, rows, RIDGE), 9, removals)
    assert found.rows.tolist() == rows
    torch.testing.assert_close(found.after, naive(gradients, rows, RIDGE))
    torch.testing.assert_close(found.before, naive(gradients, list(range(9)), RIDGE)[rows])
    assert len(found.removed) == sum(removals)


@pytest.mark.parametrize("seed", range(5))
def test_at_one_ridge_nobody_becomes_less_unique_when_others_go(seed):
    gradients = torch.randn(10, 30, generator=Generator().manual_seed(seed))
    found = peel(audit_of(gradients), 10, [2, 2])
    assert bool((found.after >= found.before * (1 - 1e-12)).all())
    assert float(found.after.max()) > float(found.before.max())


def test_comparing_rows_chosen_before_gives_the_numbers_of_choosing_them():
    audit = audit_of(torch.randn(7, 4, generator=Generator().manual_seed(2)))
    chosen = peel(audit, 7, [2])
    again = compare(audit, 7, chosen.rows)
    for name in ("rows", "before", "after", "removed"):
        assert torch.equal(getattr(chosen, name), getattr(again, name))


def test_zero_gradients_are_not_unique_and_the_first_go_first():
    found = peel(audit_of_gram(torch.zeros(4, 4), 0.01), 4, [1])
    assert found.rows.tolist() == [1, 2, 3] and not bool(found.after.any())


def test_nobody_is_left_alone_with_nothing():
    with pytest.raises(ValueError, match="one example stays at least, got 3 of 3 to remove"):
        peel(lambda rows: torch.zeros(len(rows)), 3, [1, 2])


def test_what_a_client_says_holds_mean_and_maximum_of_those_that_stay():
    found = peel(audit_of(torch.diag(torch.tensor([3.0, 2.0, 1.0]))), 3, [1])
    said = findings(found)
    assert {name: row.value for name, row in said.items()} == pytest.approx(
        {
            "censored-examples": 1,
            "uniqueness-before": 2.5 / RIDGE,
            "uniqueness-before-max": 4 / RIDGE,
            "uniqueness-after": 2.5 / RIDGE,
            "uniqueness-after-max": 4 / RIDGE,
        }
    )
    assert said["uniqueness-after"].extra["removed-min"] == pytest.approx(9 / RIDGE)
    assert said["uniqueness-after"].extra["left"] == 2


# --- audits of a model --------------------------------------------------------------------------------


def test_an_audit_runs_without_dropout_and_puts_the_mode_back():
    x, y = digits_like()
    dropping = nn.Sequential(nn.Dropout(0.5), network()).train()
    torch.testing.assert_close(gram_at(dropping, summed, x, y), gram_at(network(), summed, x, y))
    assert dropping.training and dropping[0].training


def test_a_round_keeps_whom_naive_audits_at_its_weights_keep():
    x, y = digits_like()
    censorship = Censorship(Censor(0.25, onion=2), network, summed, SETTINGS, seed=0)
    for seed in (3, 4):
        model = network(seed)
        gradients = example_gradients(model, x, y)
        ridge = 0.01 * float(gradients.square().sum(1).mean())
        kept = peel_naively(lambda rows, g=gradients, r=ridge: naive(g, rows, r), 12, (1, 2))
        assert censorship.rows(7, x, y, model.state_dict()).tolist() == kept
        seen = censorship.peeled(7, x, y, model.state_dict())
        torch.testing.assert_close(seen.after, naive(gradients, kept, ridge), rtol=1e-4, atol=0)


def test_an_example_of_noise_among_copies_is_left_out_at_any_weights():
    x, y = digits_like(1)
    x, y = x.repeat(10, 1), y.repeat(10)
    x[6] = 4 * torch.randn(6, generator=Generator().manual_seed(9))
    censorship = Censorship(Censor(0.1), network, summed, SETTINGS, seed=0)
    for seed in range(5):
        kept = censorship.rows(0, x, y, network(seed).state_dict())
        assert kept.tolist() == [0, 1, 2, 3, 4, 5, 7, 8, 9]


def test_a_rehearsal_sums_audits_of_the_rows_left_before_and_after_every_round():
    x, y = digits_like()
    audit = rehearsed(network, summed, x, y, SETTINGS, rounds=2, ridge_share=0.01, seed=5)
    ridges = []
    for rows in (torch.arange(12), torch.tensor([0, 2, 3, 5, 7, 8, 11])):
        model, expected = network(), torch.zeros(len(rows), dtype=torch.float64)
        for number in range(3):
            gradients = example_gradients(model, x[rows], y[rows])
            if len(ridges) == number:
                ridges.append(0.01 * float(gradients.square().sum(1).mean()))
            expected += naive(gradients, list(range(len(rows))), ridges[number])
            batches = plan_batches(len(rows), SETTINGS, poisson=False, seed=client_seed(5, 0, number))
            train_locally(model, x[rows], y[rows], batches, SETTINGS)
        torch.testing.assert_close(audit(rows), expected, rtol=1e-3, atol=0)


def test_a_permanent_choice_is_the_same_at_all_weights_and_in_another_process():
    x, y = digits_like()
    defense = Censor(0.3, onion=2, permanent=True, rehearsal=2)
    first, second = (Censorship(defense, network, summed, SETTINGS, seed=3) for _ in range(2))
    kept = first.rows(0, x, y, network(1).state_dict())
    assert len(kept) == 8 and torch.equal(kept, first.rows(0, x, y, network(2).state_dict()))
    assert torch.equal(kept, second.rows(0, x, y, network(2).state_dict()))
    audit = rehearsed(network, summed, x, y, SETTINGS, rounds=2, ridge_share=0.01, seed=client_seed(3, 0, 0))
    assert torch.equal(kept, peel(audit, 12, (2, 2)).rows)
    seen = first.peeled(0, x, y, network(2).state_dict())  # numbers are those of the round's weights
    gradients = example_gradients(network(2), x, y)
    ridge = 0.01 * float(gradients.square().sum(1).mean())
    torch.testing.assert_close(seen.after, naive(gradients, kept.tolist(), ridge), rtol=1e-4, atol=0)


def test_a_choice_is_remembered_for_its_weights_and_forgotten_in_time():
    x, y = digits_like()
    built = []

    def build():
        built.append(1)
        return network()

    censorship = Censorship(Censor(0.1), build, summed, SETTINGS, seed=0, remembered=2)
    states = [network(seed).state_dict() for seed in range(3)]
    for state in (states[0], states[0], dict(states[0]), states[1]):
        censorship.rows(0, x, y, state)
    assert len(built) == 2
    censorship.rows(0, x, y, states[2])
    censorship.rows(0, x, y, states[0])
    assert len(built) == 4


def test_removing_nothing_audits_nothing():
    def build():
        raise AssertionError("no model is needed")

    x, y = digits_like()
    censorship = Censorship(Censor(0.0), build, summed, SETTINGS, seed=0)
    assert censorship.rows(0, x, y, {}).tolist() == list(range(12)) and censorship.left(12) == 12


def test_weights_that_overflowed_are_an_error_and_not_a_choice():
    x, y = digits_like()
    state = {name: torch.full_like(value, math.nan) for name, value in network().state_dict().items()}
    with pytest.raises(ValueError, match="an audit needs finite gradients, got NaN"):
        Censorship(Censor(0.1), network, summed, SETTINGS, seed=0).rows(0, x, y, state)
