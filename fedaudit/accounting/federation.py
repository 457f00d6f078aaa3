"""Client-level accounting of central noise: whose presence is protected is a whole client's, against whom.

In a round the updates of a cohort, each clipped to norm C over all its entries, are added up, N(0, (sigma
C)^2 I) is added to the SUM, and the result is divided by a number that does not depend on who replied. That
is the sampled Gaussian mechanism with clients for examples, so the arithmetic is that of
`fedaudit.accounting`; what differs is who may claim what:

| adversary | sees | may claim |
| --- | --- | --- |
| server, plain | every update before noise | nothing: epsilon is infinite |
| server, secure aggregation | cohorts and their noised sums | rounds a client was in, no amplification |
| outsider | noised global weights of every round, no cohort | amplification by sampling of clients |

An outsider who can observe who takes part is to be treated as sampling "none".
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, get_args

from fedaudit.accounting.composition import Accountant, epsilon
from fedaudit.accounting.ledger import Ledger, check_delta, check_step

if TYPE_CHECKING:
    from fedaudit.types import Guarantee

Sampling = Literal["poisson", "fixed", "none"]
Adversary = Literal["server", "outsider"]
FederationEntry = tuple[float, int, int]
"""Noise multiplier, (expected) cohort, rounds."""


@dataclass(frozen=True)
class FederationLedger:
    """Every noised round of a federation: entries (noise multiplier, cohort, rounds), oldest first.

    Attributes:
        clients: N, from whom cohorts are drawn.
        sampling: how. "poisson": every client independently with probability cohort / N, and the divisor
            is the expected cohort. "fixed": exactly `cohort` clients without replacement, as Flower's
            strategies draw them. "none": anything else (availability, a fixed order, everybody).
        history: the rounds.
        most_rounds: the most rounds that any one client took part in, where that is counted and does not
            depend on data; 0 counts every round for everybody. It is used where nothing is amplified.

    Raises:
        ValueError: for a value out of range.

    >>> FederationLedger(1000, "poisson").add(1.0, cohort=50, rounds=10).add(1.0, cohort=50, rounds=5).history
    ((1.0, 50, 15),)
    """

    clients: int
    sampling: Sampling = "none"
    history: tuple[FederationEntry, ...] = ()
    most_rounds: int = 0

    def __post_init__(self) -> None:
        if self.clients < 1:
            raise ValueError(f"a federation has clients, got {self.clients}: give their number")
        if self.sampling not in get_args(Sampling):
            raise ValueError(f"sampling is one of {', '.join(get_args(Sampling))}, got {self.sampling!r}")
        merged: list[FederationEntry] = []
        for noise_multiplier, cohort, rounds in self.history:
            check_step(noise_multiplier, 1.0, rounds)
            if not 1 <= cohort <= self.clients or cohort != int(cohort):
                raise ValueError(f"a cohort is a whole number from 1 to {self.clients}, got {cohort}")
            entry = (float(noise_multiplier), int(cohort), int(rounds))
            if merged and merged[-1][:2] == entry[:2]:
                entry = (*entry[:2], merged.pop()[2] + entry[2])
            merged.append(entry)
        object.__setattr__(self, "history", tuple(merged))
        if not 0 <= self.most_rounds <= self.rounds:
            raise ValueError(
                f"a client takes part in at most {self.rounds} rounds so far, got most_rounds = "
                f"{self.most_rounds}: 0 counts every round"
            )

    @property
    def rounds(self) -> int:
        """Rounds so far."""
        return sum(rounds for _, _, rounds in self.history)

    def add(
        self, noise_multiplier: float, cohort: int, rounds: int = 1, most_rounds: int = 0
    ) -> "FederationLedger":
        """The ledger after `rounds` more rounds, with the new count of a client's rounds."""
        history = (*self.history, (noise_multiplier, cohort, rounds))
        return FederationLedger(self.clients, self.sampling, history, most_rounds)

    def guarantee(
        self,
        delta: float,
        adversary: Adversary = "outsider",
        *,
        secure_aggregation: bool = False,
        accountant: Accountant = "rdp",
    ) -> "Guarantee | None":
        """The client-level guarantee against this adversary; None if there is none.

        Under "fixed" sampling against an outsider it is about replacing a client by another, and the
        accountant is named "rdp-replace-one".

        Raises:
            ValueError: as `client_epsilon`, or for a delta that is not under 1 / clients.
        """
        from fedaudit.types import Guarantee

        if delta >= 1 / self.clients:
            raise ValueError(
                f"delta must be under 1 / clients = {1 / self.clients:.3g}, got {delta}: a larger one "
                "allows publishing a client outright"
            )
        reached = client_epsilon(
            self, delta, adversary, secure_aggregation=secure_aggregation, accountant=accountant
        )
        if not math.isfinite(reached):
            return None
        replaces = self.sampling == "fixed" and adversary == "outsider"
        return Guarantee(reached, delta, "client", "rdp-replace-one" if replaces else accountant)

    def to_lists(self) -> dict[str, Any]:
        """Everything as scalars and lists of plain numbers, as a Flower record can hold them."""
        return {
            "clients": self.clients,
            "sampling": self.sampling,
            "most-rounds": self.most_rounds,
            "noise-multipliers": [noise for noise, _, _ in self.history],
            "cohorts": [cohort for _, cohort, _ in self.history],
            "rounds": [rounds for _, _, rounds in self.history],
        }

    @classmethod
    def from_lists(cls, lists: Mapping[str, Any]) -> "FederationLedger":
        """The ledger that `to_lists` wrote.

        Raises:
            ValueError: if something is missing or impossible.
        """
        try:
            columns = [list(lists[name]) for name in ("noise-multipliers", "cohorts", "rounds")]
            history = tuple((float(n), int(m), int(r)) for n, m, r in zip(*columns, strict=True))
            return cls(int(lists["clients"]), lists["sampling"], history, int(lists["most-rounds"]))
        except KeyError as error:
            raise ValueError(
                f"a kept ledger of a federation has {error}, got {sorted(lists)}: it is damaged"
            ) from error


def client_epsilon(
    ledger: FederationLedger,
    delta: float,
    adversary: Adversary = "outsider",
    *,
    secure_aggregation: bool = False,
    accountant: Accountant = "rdp",
) -> float:
    """Upper bound on the client-level epsilon at `delta` of everything in the ledger, against one adversary.

    - server without secure aggregation: infinity. It receives updates before any noise is added.
    - server with secure aggregation, noise included in what it receives: it chose the cohort, so nothing is
      amplified. Each round counts with sample rate 1; with `most_rounds` = R only the R least noised do.
    - outsider, "poisson": sample rate cohort / N, neighbours differ by adding or removing one client.
    - outsider, "fixed": the bound for subsets without replacement (Wang, Balle, Kasiviswanathan 2019, arXiv
      1808.00087, theorem 27; dp-accounting), whose neighbours REPLACE one client, so that the sum moves by
      up to 2C and sigma counts half. Accountant "rdp" only. It is often worse than "poisson".
    - outsider, "none": as the server with secure aggregation.

    It assumes what the module says: clip norm over all entries, uniform weights, noise scaled to the clip
    norm, a divisor that does not depend on who replied, and noise nobody knows. It is not example-level
    epsilon, and nothing here checks that a federation really does this.

    Raises:
        ValueError: for a delta outside (0, 1), an unknown adversary or accountant, or an accountant other
            than "rdp" under "fixed" sampling.

    >>> rounds = FederationLedger(1000, "poisson").add(1.0, cohort=100, rounds=100)
    >>> [round(client_epsilon(rounds, 1e-3, who), 2) for who in ("outsider", "server")]
    [5.64, inf]
    """
    check_delta(delta)
    if adversary not in get_args(Adversary):
        raise ValueError(f"an adversary is one of {', '.join(get_args(Adversary))}, got {adversary!r}")
    if not ledger.history:
        return 0.0
    if adversary == "server" and not secure_aggregation:
        return math.inf
    if adversary == "server" or ledger.sampling == "none":
        return epsilon(_participation(ledger), delta, accountant)
    if ledger.sampling == "poisson":
        rounds = tuple((noise, cohort / ledger.clients, count) for noise, cohort, count in ledger.history)
        return epsilon(Ledger(rounds), delta, accountant)
    if accountant != "rdp":
        raise ValueError(
            f"fixed-size cohorts are composed by accountant 'rdp' only, got {accountant!r}: use 'rdp' or "
            "sampling 'none'"
        )
    return _fixed_size_epsilon(ledger.clients, ledger.history, delta)


def _participation(ledger: FederationLedger) -> Ledger:
    """The rounds of the client that could have lost most: the least noised ones, without sampling."""
    left = ledger.most_rounds or ledger.rounds
    counted = Ledger()
    for noise, _, rounds in sorted(ledger.history):
        taken = min(left, rounds)
        counted, left = counted.add(noise, 1.0, taken), left - taken
    return counted


@lru_cache(maxsize=1024)
def _fixed_size_epsilon(clients: int, history: tuple[FederationEntry, ...], delta: float) -> float:
    from dp_accounting.dp_event import GaussianDpEvent, SampledWithoutReplacementDpEvent
    from dp_accounting.privacy_accountant import NeighboringRelation
    from dp_accounting.rdp.rdp_privacy_accountant import RdpAccountant

    accountant = RdpAccountant(neighboring_relation=NeighboringRelation.REPLACE_ONE)
    for noise, cohort, rounds in history:
        event = SampledWithoutReplacementDpEvent(clients, cohort, GaussianDpEvent(noise / 2))
        accountant.compose(event, rounds)
    return max(0.0, float(accountant.get_epsilon(delta)))
