"""Client-level epsilon of central noise: who may claim what."""

import math

import pytest
from dp_accounting import GaussianDpEvent, NeighboringRelation, SampledWithoutReplacementDpEvent
from dp_accounting.rdp import RdpAccountant

from fedaudit.accounting import FederationLedger, Ledger, client_epsilon, epsilon
from fedaudit.types import Guarantee

DELTA = 1e-4


def rounds(sampling, **changes):
    return FederationLedger(1000, sampling, **changes).add(1.0, cohort=100, rounds=100)


@pytest.mark.parametrize("accountant", ["rdp", "prv", "pld"])
def test_poisson_cohorts_are_the_sampled_gaussian_with_clients_for_examples(accountant):
    """METHODS' reference: q = 0.1, sigma = 1, 100 steps at delta 1e-3 is 5.641 (rdp) and 4.784 (pld)."""
    reached = client_epsilon(rounds("poisson"), 1e-3, accountant=accountant)
    assert reached == epsilon(Ledger().add(1.0, 0.1, 100), 1e-3, accountant)
    assert reached == pytest.approx(5.641 if accountant == "rdp" else 4.784, rel=0.01)


def test_only_an_outsider_gains_by_sampling():
    unsampled = epsilon(Ledger().add(1.0, 1.0, 100), DELTA)
    assert client_epsilon(rounds("poisson"), DELTA, "outsider") < unsampled / 5
    for sampling in ("poisson", "fixed", "none"):
        reached = client_epsilon(rounds(sampling), DELTA, "server", secure_aggregation=True)
        assert reached == unsampled
    assert client_epsilon(rounds("none"), DELTA, "outsider") == unsampled


def test_a_server_that_sees_updates_before_noise_has_no_bound():
    assert client_epsilon(rounds("poisson"), DELTA, "server") == math.inf
    assert rounds("poisson").guarantee(DELTA, "server") is None


def test_fixed_cohorts_are_dp_accountings_event_with_half_the_noise():
    """Replacing one client moves the sum by up to twice the clip norm."""
    reference = RdpAccountant(neighboring_relation=NeighboringRelation.REPLACE_ONE)
    reference.compose(SampledWithoutReplacementDpEvent(1000, 100, GaussianDpEvent(2.0)), 100)
    ledger = FederationLedger(1000, "fixed").add(4.0, cohort=100, rounds=100)
    assert client_epsilon(ledger, DELTA) == pytest.approx(reference.get_epsilon(DELTA), rel=1e-12)
    everybody = FederationLedger(10, "fixed").add(4.0, cohort=10, rounds=5)
    assert client_epsilon(everybody, DELTA) == pytest.approx(
        epsilon(Ledger().add(2.0, 1.0, 5), DELTA), rel=1e-3
    )
    with pytest.raises(ValueError, match="by accountant 'rdp' only, got 'pld'"):
        client_epsilon(ledger, DELTA, accountant="pld")


def test_a_client_that_sat_rounds_out_loses_its_own_rounds_only():
    ledger = (
        FederationLedger(50, "none")
        .add(2.0, cohort=10, rounds=30)
        .add(1.0, cohort=10, rounds=5, most_rounds=8)
    )
    worst = Ledger().add(1.0, 1.0, 5).add(2.0, 1.0, 3)  # the least noised eight
    assert client_epsilon(ledger, DELTA) == epsilon(worst, DELTA)
    assert client_epsilon(ledger, DELTA) < client_epsilon(FederationLedger(50, "none", ledger.history), DELTA)


@pytest.mark.parametrize("sampling", ["poisson", "fixed", "none"])
def test_more_rounds_and_less_noise_never_cost_less(sampling):
    start = FederationLedger(100, sampling).add(3.0, cohort=20, rounds=5)
    reached = [
        client_epsilon(ledger, DELTA)
        for ledger in (
            FederationLedger(100, sampling),
            start,
            start.add(3.0, cohort=20),
            start.add(1.5, cohort=20),
        )
    ]
    assert reached == sorted(reached) and reached[0] == 0.0 and len(set(reached)) == 4


@pytest.mark.parametrize("sampling", ["poisson", "none"])
def test_a_guarantee_is_for_clients_and_names_its_accountant(sampling):
    given = rounds(sampling).guarantee(DELTA, accountant="rdp")
    assert given == Guarantee(client_epsilon(rounds(sampling), DELTA), DELTA, "client", "rdp")
    assert rounds("fixed").guarantee(DELTA).accountant == "rdp-replace-one"
    assert rounds("fixed").guarantee(DELTA, "server", secure_aggregation=True).accountant == "rdp"


def test_a_delta_that_allows_publishing_a_client_is_refused():
    with pytest.raises(ValueError, match=r"under 1 / clients = 0.001, got 0.001"):
        rounds("none").guarantee(1e-3)


def test_a_ledger_survives_as_plain_numbers():
    ledger = FederationLedger(40, "fixed").add(1.0, cohort=4, rounds=2).add(1.5, cohort=5, most_rounds=2)
    lists = ledger.to_lists()
    assert all(isinstance(value, (int, str, list)) for value in lists.values())
    assert FederationLedger.from_lists(lists) == ledger
    assert ledger.rounds == 3


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: FederationLedger(0), "a federation has clients, got 0"),
        (lambda: FederationLedger(5, "shuffled"), "one of poisson, fixed, none, got 'shuffled'"),
        (lambda: FederationLedger(5).add(1.0, cohort=6), "whole number from 1 to 5, got 6"),
        (lambda: FederationLedger(5).add(0.0, cohort=5), "noise multiplier must be a number > 0, got 0.0"),
        (
            lambda: FederationLedger(5).add(1.0, cohort=5, most_rounds=2),
            "at most 1 rounds so far, got most_r",
        ),
        (lambda: client_epsilon(rounds("none"), DELTA, "nobody"), "one of server, outsider, got 'nobody'"),
        (lambda: client_epsilon(rounds("none"), 0.0), r"delta must lie in \(0, 1\), got 0.0"),
        (lambda: FederationLedger.from_lists({"clients": 3}), "'noise-multipliers'.*: it is damaged"),
    ],
)
def test_nonsensical_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
