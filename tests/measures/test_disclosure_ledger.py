"""Membership bounds added up over releases, against sums written out."""

import json
import math

import pytest
import torch

from fedaudit.measures.disclosure_ledger import DisclosureLedger


def random_releases(seed=0):
    """(client, round, step, ids, gnq) of two clients whose examples come and go."""
    generator = torch.Generator().manual_seed(seed)
    for round_number in (1, 2, 4):
        for client in (9, 2**63 + 5):
            for step in (0, 1):
                ids = torch.randperm(6, generator=generator)[:4].tolist()
                yield client, round_number, step, ids, torch.rand(4, generator=generator) * 0.3


def filled(prior=0.5):
    ledger = DisclosureLedger(prior)
    for client, round_number, step, ids, gnq in random_releases():
        ledger.add(client, round_number, ids, gnq, step=step)
    return ledger


def test_each_example_has_the_sum_of_its_bounds():
    ledger = filled()
    for client in (9, 2**63 + 5):
        for entry in ledger.by_example(client):
            terms = [
                0.5 * math.log(1 + float(value))
                for owner, _, _, ids, gnq in random_releases()
                for example, value in zip(ids, gnq, strict=True)
                if (owner, example) == (client, entry.example)
            ]
            assert entry.nats == pytest.approx(sum(terms), rel=1e-6)
            assert entry.releases == len(terms)
            assert entry.bound_bits == pytest.approx(min(sum(terms) / math.log(2), 1.0), rel=1e-6)


def test_a_client_has_the_mean_and_the_worst_of_its_examples_bounds():
    ledger = filled()
    assert [entry.client_id for entry in ledger.by_client()] == [9, 2**63 + 5]
    for client in ledger.by_client():
        bounds = {
            entry.example: min(entry.nats, math.log(2)) for entry in ledger.by_example(client.client_id)
        }
        assert client.examples == len(bounds) and client.releases == 6
        assert client.mean_nats == pytest.approx(sum(bounds.values()) / len(bounds))
        assert client.worst_nats == max(bounds.values()) == bounds[client.worst_example]
        assert client.worst_bits == pytest.approx(client.worst_nats / math.log(2))
        assert client.mean_bits == pytest.approx(client.mean_nats / math.log(2))


@pytest.mark.parametrize("prior", [0.5, 0.1])
def test_nobody_learns_more_than_there_is_to_know(prior):
    ledger = DisclosureLedger(prior)
    for round_number in range(50):
        ledger.add(1, round_number, [4], torch.tensor([2.0]))
    (entry,) = ledger.by_example(1)
    entropy = -prior * math.log(prior) - (1 - prior) * math.log(1 - prior)
    assert entry.nats == pytest.approx(25 * math.log(3))
    assert entry.bound_nats == pytest.approx(entropy)
    assert ledger.by_client()[0].worst_nats == pytest.approx(entropy)
    assert DisclosureLedger().cap_nats == pytest.approx(math.log(2))


def test_the_sum_bounds_two_looks_through_a_gaussian_channel():
    """I(b; Y_1, Y_2) for Y_j = b a_j + noise is that of one look with a^2 = a_1^2 + a_2^2, by quadrature."""
    from scipy.integrate import quad

    gnqs, p = (0.8, 1.7), 0.5
    a = math.sqrt(sum(gnq / (p * (1 - p)) for gnq in gnqs))

    def integrand(y):
        mixture = sum(w * math.exp(-((y - m) ** 2) / 2) for w, m in ((1 - p, 0), (p, a))) / math.sqrt(
            2 * math.pi
        )
        return -mixture * math.log(mixture) if mixture > 0 else 0.0

    information = quad(integrand, -12, a + 12, limit=400)[0] - math.log(2 * math.pi * math.e) / 2
    ledger = DisclosureLedger(p)
    for round_number, gnq in enumerate(gnqs):
        ledger.add(0, round_number, [0], torch.tensor([gnq]))
    (entry,) = ledger.by_example(0)
    assert 0.5 * entry.bound_nats < information <= entry.bound_nats


def test_a_restored_ledger_goes_on_as_if_never_stopped():
    whole, part = filled(0.3), DisclosureLedger(0.3)
    releases = list(random_releases())
    for client, round_number, step, ids, gnq in releases[:5]:
        part.add(client, round_number, ids, gnq, step=step)
    part = DisclosureLedger.from_lists(json.loads(json.dumps(part.to_lists())))
    with pytest.raises(ValueError, match="a release counts once, got client 9, round 1, step 0 again"):
        part.add(9, 1, [0], torch.tensor([1.0]))
    for client, round_number, step, ids, gnq in releases[5:]:
        part.add(client, round_number, ids, gnq, step=step)
    assert part.to_lists() == whole.to_lists()
    assert part.by_client() == whole.by_client()


@pytest.mark.parametrize(
    ("examples", "gnq", "message"),
    [
        ([1, 2], [1.0], "got 1 for 2 ids, 2 of them different"),
        ([1, 1], [1.0, 1.0], "got 2 for 2 ids, 1 of them different"),
        ([1], [math.nan], "finite and not negative"),
        ([1], [-0.5], "finite and not negative"),
    ],
)
def test_a_release_that_makes_no_sense_is_refused_and_not_counted(examples, gnq, message):
    ledger = DisclosureLedger()
    with pytest.raises(ValueError, match=message):
        ledger.add(1, 1, examples, torch.tensor(gnq))
    assert ledger.clients() == [] and ledger.by_client() == [] and ledger.by_example(1) == []


def test_a_certain_prior_is_refused():
    with pytest.raises(ValueError, match="inside \\(0, 1\\), got 1"):
        DisclosureLedger(1)
