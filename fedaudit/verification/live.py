"""Claims tested while a federation runs: round after round, with a memory that does not grow."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from torch import Tensor

from fedaudit.claims import UNCHECKED, Claim, Finding, Watcher
from fedaudit.types import ClientUpdate, Guarantee
from fedaudit.verification.memory import NoiseMemory
from fedaudit.verification.round import ALPHA, verify_round
from fedaudit.verification.statements import Statement, Statements

if TYPE_CHECKING:
    import pandas as pd

State = Mapping[str, Tensor]
WINDOW = 200
"""Releases of either kind whose noise is remembered: 32 MB at most."""


@dataclass(frozen=True)
class Unstated:
    """A claim that cannot be brought into a form that updates can be tested for.

    Attributes:
        claim: the claim.
        reason: why.
        client_id: of whose update; None for the round as a whole.
    """

    claim: Claim
    reason: str
    client_id: int | None = None


@dataclass(frozen=True)
class RoundClaims:
    """What is claimed of one round.

    Attributes:
        general: of every update and of the aggregate.
        per_client: further claims by client id.
        unstated: claims that this observer cannot test, and why.
        noise_free: by client id, the update without its noise, where an oracle can compute it.
        batches: by client id, the examples of each local step, where an oracle knows them.
        clip_norms: clip norm applied in the round and the one of the next, where these claims know them.
    """

    general: Sequence[Claim] = ()
    per_client: Mapping[int, Sequence[Claim]] = field(default_factory=dict)
    unstated: Sequence[Unstated] = ()
    noise_free: Mapping[int, State] = field(default_factory=dict)
    batches: Mapping[int, Sequence[Tensor]] = field(default_factory=dict)
    clip_norms: tuple[float, float] | None = None


@runtime_checkable
class ClaimsByRound(Protocol):
    """Knows what is claimed of each round."""

    def of_round(
        self,
        number: int,
        updates: Sequence[ClientUpdate],
        statements: Mapping[int, Statement],
        clip_norms: tuple[float, float] | None,
    ) -> RoundClaims:
        """The claims about one round, given what was received and what the clients stated."""
        ...

    def recall(self, records: "pd.DataFrame") -> None:
        """Take over what earlier rounds recorded, in a run that was interrupted."""
        ...


Claimed = Sequence[Claim] | Callable[[int], Sequence[Claim]] | ClaimsByRound
"""Claims of every round, a function of the round's number that returns them, or what looks at updates too."""


def judge(
    made: RoundClaims,
    updates: Sequence[ClientUpdate],
    broadcast: State | None,
    aggregate: State | None,
    *,
    clip_norms: tuple[float, float] | None = None,
    observer: Watcher = "server",
    memory: NoiseMemory | None = None,
    alpha: float = ALPHA,
) -> list[Finding]:
    """Every finding of one round: first the claims that cannot be tested, then those that were."""
    number = updates[0].round if updates else 0
    findings = [
        Finding(u.claim, None, None, None, UNCHECKED, observer, u.reason, number, u.client_id)
        for u in made.unstated
    ]
    return findings + verify_round(
        made.general,
        updates,
        aggregate,
        broadcast,
        per_client=made.per_client,
        observer=observer,
        noise_free=made.noise_free,
        batches=made.batches,
        clip_norms=made.clip_norms or clip_norms,
        memory=memory,
        alpha=alpha,
    )


class LiveVerifier:
    """Tests each round of a running federation against what is claimed of it.

    All tests of an honest round together raise a false alarm with probability at most `alpha`. Across rounds
    it holds samples of the last `window` releases' noise, two numbers for every way of mixing, and for each
    client what it stated: nothing that grows with the rounds, but for the noise of clients who change it.

    Args:
        claims: what is claimed of every round, a function of the round that says so, or an object that also
            looks at the round's updates (`ClaimsByRound`).
        observer: who looks; "oracle" only if the claims come with what an oracle knows.
        window: releases whose noise is remembered, to find it used twice.
        alpha: probability of a false alarm in an honest round.

    >>> from fedaudit.claims import ClipNorm
    >>> import torch
    >>> zero, long = {"w": torch.zeros(2)}, {"w": torch.tensor([3.0, 4.0])}
    >>> LiveVerifier([ClipNorm(1.0)]).check([ClientUpdate(0, 1, zero, long, 10)])[0].verdict
    'violated'
    """

    def __init__(
        self,
        claims: Claimed,
        *,
        observer: Watcher = "server",
        window: int = WINDOW,
        alpha: float = ALPHA,
    ) -> None:
        self.claims = claims
        self.observer: Watcher = observer
        self.alpha = alpha
        self.memory = NoiseMemory(window)
        self.statements = Statements()
        self._stated: dict[int, Statement] = {}

    def hear(self, updates: Sequence[ClientUpdate], guarantees: Mapping[int, Guarantee]) -> None:
        """Take down what clients state in a round, also in one that is not checked."""
        heard = {u.client_id: self.statements.hear(u, guarantees.get(u.client_id)) for u in updates}
        self._stated = {client: said for client, said in heard.items() if said is not None}

    def recall(self, records: "pd.DataFrame") -> None:
        """Go on where a run was interrupted: what clients stated comes from its records."""
        self.statements = Statements()
        self.statements.recall(records)
        if isinstance(self.claims, ClaimsByRound):
            self.claims.recall(records)

    def check(
        self,
        updates: Sequence[ClientUpdate],
        aggregate: State | None = None,
        broadcast: State | None = None,
        clip_norms: tuple[float, float] | None = None,
    ) -> list[Finding]:
        """Test one round; one finding per claim and release.

        Args:
            updates: what was received, one or more.
            aggregate: the weights after the round; None if unknown.
            broadcast: the weights before it; the first update's `before` if left out.
            clip_norms: clip norm applied in this round and the one of the next, where a server changes it.
        """
        made = self._of_round(updates, clip_norms)
        return judge(
            made,
            updates,
            broadcast,
            aggregate,
            clip_norms=clip_norms,
            observer=self.observer,
            memory=self.memory,
            alpha=self.alpha,
        )

    def _of_round(
        self, updates: Sequence[ClientUpdate], clip_norms: tuple[float, float] | None
    ) -> RoundClaims:
        if isinstance(self.claims, ClaimsByRound):
            return self.claims.of_round(updates[0].round, updates, self._stated, clip_norms)
        return RoundClaims(self.claims(updates[0].round) if callable(self.claims) else self.claims)
