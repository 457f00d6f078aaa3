"""What a run's releases can say about membership so far, added up by example and by client.

Each release bounds the membership information of example i by 1/2 ln(1 + GNQ_i) nats. By the chain rule the
information of all releases is at most the sum, and never more than the entropy H(p) of what is asked: whether
the example is in the client's data, with prior probability p.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class ExampleDisclosure:
    """What the releases counted so far can say about one example's membership.

    Attributes:
        client_id: whose example.
        example: its id at that client.
        nats: sum over the releases of 1/2 ln(1 + GNQ), not capped.
        releases: how many releases were counted.
        cap_nats: H(p), what there is to know.
    """

    client_id: int
    example: int
    nats: float
    releases: int
    cap_nats: float

    @property
    def bound_nats(self) -> float:
        """The upper bound: min(sum, H(p))."""
        return min(self.nats, self.cap_nats)

    @property
    def bound_bits(self) -> float:
        """The upper bound in bits."""
        return self.bound_nats / math.log(2)


@dataclass(frozen=True)
class ClientDisclosure:
    """The same for one client, over its examples that were counted.

    No sum over examples is given: what is learned about all memberships together may exceed it.

    Attributes:
        client_id: the client.
        examples: how many examples were counted at least once.
        mean_nats: mean of the examples' bounds.
        worst_nats: largest of them.
        worst_example: the example that has it.
        releases: how many releases were counted.
    """

    client_id: int
    examples: int
    mean_nats: float
    worst_nats: float
    worst_example: int
    releases: int

    @property
    def mean_bits(self) -> float:
        """The mean in bits."""
        return self.mean_nats / math.log(2)

    @property
    def worst_bits(self) -> float:
        """The largest bound in bits."""
        return self.worst_nats / math.log(2)


class DisclosureLedger:
    """Adds up membership bounds over the releases (steps of rounds) of clients.

    A bound for the releases that were added and for no others: a step that was not added is not covered. It
    holds for an observer who sees the SUM of each step's gradients, with the others' sum taken as Gaussian
    (`membership_bound`), not for one who knows the other examples. Give the uniqueness of every example that
    a step could have used: one that is not given counts as known to be absent from it. GNQ: Abdelghafar et
    al. 2026, arXiv 2510.10902v2; the sum: chain rule of information.

    Args:
        prior: p, the probability that an example is in the client's data, before any release.

    Raises:
        ValueError: if prior is not inside (0, 1).

    >>> ledger = DisclosureLedger()
    >>> ledger.add(client_id=3, round_number=1, examples=[7, 8], gnq=[0.0, 1.0])
    >>> ledger.add(client_id=3, round_number=2, examples=[8], gnq=[100.0])
    >>> [round(example.bound_bits, 3) for example in ledger.by_example(3)]
    [0.0, 1.0]
    """

    def __init__(self, prior: float = 0.5) -> None:
        if not 0 < prior < 1:
            raise ValueError(f"a prior is a probability inside (0, 1), got {prior}: give e.g. 0.5")
        self.prior = prior
        self._nats: dict[int, dict[int, tuple[float, int]]] = {}  # client -> example -> sum, releases
        self._counted: dict[int, set[tuple[int, int]]] = {}  # client -> (round, step)

    @property
    def cap_nats(self) -> float:
        """H(p) = -p ln p - (1 - p) ln(1 - p), ln 2 for p = 1/2: all there is to know."""
        return -sum(q * math.log(q) for q in (self.prior, 1 - self.prior))

    def add(
        self,
        client_id: int,
        round_number: int,
        examples: Sequence[int],
        gnq: Tensor | Sequence[float],
        *,
        step: int = 0,
    ) -> None:
        """Count one release: the uniqueness (B,) of examples in one local step of one round.

        Raises:
            ValueError: if the release was counted before, an example comes twice, or gnq does not fit.
        """
        values = torch.as_tensor(gnq, dtype=torch.float64).flatten().tolist()
        if len(values) != len(examples) or len(set(examples)) != len(examples):
            raise ValueError(
                f"a release has one uniqueness for each of different examples, got {len(values)} for "
                f"{len(examples)} ids, {len(set(examples))} of them different: match them"
            )
        if not all(math.isfinite(value) and value > -1e-9 for value in values):
            raise ValueError("a uniqueness is finite and not negative, got another: use gradient_uniqueness")
        counted = self._counted.setdefault(client_id, set())
        if (round_number, step) in counted:
            raise ValueError(
                f"a release counts once, got client {client_id}, round {round_number}, step {step} again: "
                "restore the ledger of the round before"
            )
        counted.add((round_number, step))
        totals = self._nats.setdefault(client_id, {})
        for example, value in zip(examples, values, strict=True):
            nats, releases = totals.get(example, (0.0, 0))
            totals[example] = (nats + math.log1p(value) / 2, releases + 1)

    def clients(self) -> list[int]:
        """Clients with a release, ascending."""
        return sorted(self._counted)

    def by_example(self, client_id: int) -> list[ExampleDisclosure]:
        """One entry for each example of a client that was counted, ascending by id."""
        totals = sorted(self._nats.get(client_id, {}).items())
        return [ExampleDisclosure(client_id, i, nats, n, self.cap_nats) for i, (nats, n) in totals]

    def by_client(self) -> list[ClientDisclosure]:
        """One entry for each client with a counted example, ascending by id."""
        found = []
        for client in self.clients():
            bounds = {entry.example: entry.bound_nats for entry in self.by_example(client)}
            if bounds:
                worst = max(bounds, key=lambda example: bounds[example])
                mean, releases = sum(bounds.values()) / len(bounds), len(self._counted[client])
                found.append(ClientDisclosure(client, len(bounds), mean, bounds[worst], worst, releases))
        return found

    def to_lists(self) -> dict[str, Any]:
        """The state as numbers and lists, as JSON and TOML can hold them."""
        return {
            "prior": self.prior,
            "counted": [[c, r, s] for c in self.clients() for r, s in sorted(self._counted[c])],
            "nats": [
                [e.client_id, e.example, e.nats, e.releases]
                for c in self.clients()
                for e in self.by_example(c)
            ],
        }

    @classmethod
    def from_lists(cls, state: Mapping[str, Any]) -> "DisclosureLedger":
        """The ledger that `to_lists` described."""
        ledger = cls(float(state["prior"]))
        for client, round_number, step in state["counted"]:
            ledger._counted.setdefault(int(client), set()).add((int(round_number), int(step)))
        for client, example, nats, releases in state["nats"]:
            ledger._nats.setdefault(int(client), {})[int(example)] = (float(nats), int(releases))
        return ledger
