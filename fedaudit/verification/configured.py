"""The claims of a configuration: its defense's about updates, its strategy's about aggregates."""

from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, get_args, runtime_checkable

from torch import Tensor

from fedaudit.accounting import Accountant, RenyiFilter
from fedaudit.claims import AdaptiveClipping, Claim, ClipNorm, EpsilonClaim, GaussianNoise, IndependentNoise
from fedaudit.config import RunConfig
from fedaudit.defenses.base import BudgetedByRound, Defense
from fedaudit.defenses.chain import Chain, central, claims_left
from fedaudit.registry import DEFENSES
from fedaudit.spec import parse_spec
from fedaudit.training.local import TrainSettings, settings_in_round, steps_per_round
from fedaudit.training.round_release import plan, release_behind
from fedaudit.types import ClientUpdate, StepRelease
from fedaudit.verification.central_rounds import CentralRounds
from fedaudit.verification.derive import Claiming, step_claims, strategy_claims
from fedaudit.verification.live import RoundClaims, State, Unstated
from fedaudit.verification.statements import Statement

if TYPE_CHECKING:
    import pandas as pd

BATCHES = 200
"""Batches of a client that are remembered, the latest: single rounds show little of sampling."""
_HIDDEN = "what a later defense does to the update hides it; the client sees the update in between"
_SUM = "secure aggregation leaves nothing but the sum of {} clients' updates; each client sees its own"
_NORM = "the clip norm of this round is not recorded; whoever runs the strategy knows it"
_HISTORY = "the noise of every round is needed, and the client did not state it in each"


@runtime_checkable
class Filtering(Protocol):
    """A defense whose noise depends on releases, and whose epsilon a Rényi filter therefore counts."""

    def privacy_filter(self, num_examples: int) -> RenyiFilter:
        """The client's filter before its first step: orders and shares are fixed by then."""
        ...


@dataclass(frozen=True)
class Insight:
    """What an oracle adds to updates: how to compute an update without noise, and the batches behind it.

    Attributes:
        noise_free: the update without its noise; None where it cannot be computed.
        batches: indices of the examples of each local step.
    """

    noise_free: Callable[[ClientUpdate, StepRelease], State | None]
    batches: Callable[[ClientUpdate], Sequence[Tensor]]


class ConfiguredClaims:
    """What a configuration claims of each round.

    Args:
        config: the configuration.
        insight: what an oracle adds, given these claims; simulation only.
    """

    def __init__(
        self, config: RunConfig, insight: "Callable[[ConfiguredClaims], Insight] | None" = None
    ) -> None:
        self.config = config
        built: Defense = DEFENSES.build(parse_spec(config.defense.name))
        rounds = config.federation.rounds
        if isinstance(built, BudgetedByRound):
            built = built.over_rounds(rounds)
        self.defense = built
        self.defense = plan(built, self.settings(1), rounds)  # settings follow from the defense, not its plan
        at_server = central(self.defense)
        self._central = CentralRounds(at_server, config) if at_server is not None else None
        self._insight = insight(self) if insight is not None else None
        self._batches: dict[int, deque[Tensor]] = defaultdict(lambda: deque(maxlen=BATCHES))

    def settings(self, round_number: int) -> TrainSettings:
        """Local training in a round, as configuration and defense have it."""
        mu = parse_spec(self.config.strategy.name).options.get("proximal-mu", 0.0)
        proximal_mu = float(mu) if isinstance(mu, (int, float)) else 0.0
        return settings_in_round(self.config.train, self.defense, round_number, proximal_mu)

    def release(self, num_examples: int) -> StepRelease:
        """What one local step makes visible, as planned."""
        settings = self.settings(1)
        planned = steps_per_round(num_examples, settings) * self.config.federation.rounds
        return self.defense.release(num_examples, settings.batch_size, planned)

    def recall(self, records: "pd.DataFrame") -> None:
        """Take over what earlier rounds released at the server."""
        if self._central is not None:
            self._central.recall(records)

    def hear_release(self, row: Mapping[str, Any]) -> None:
        """Take down what the server released in a round, by the columns of its row."""
        if self._central is not None:
            self._central.hear(row)

    def of_round(
        self,
        number: int,
        updates: Sequence[ClientUpdate],
        statements: Mapping[int, Statement],
        clip_norms: tuple[float, float] | None,
    ) -> RoundClaims:
        """The claims about one round; call it once for each, in order."""
        general, unstated = self._of_strategy(number, clip_norms)
        if updates[0].summed:
            return self._behind_sum(updates[0], [*general, *(u.claim for u in unstated)], statements)
        own: dict[int, list[Claim]] = {}
        noise_free: dict[int, State] = {}
        batches: dict[int, list[Tensor]] = {}
        for update in updates:
            client = update.client_id
            release = release_behind(self.defense, update) or self.release(update.num_examples)
            own[client], hidden = self._of_update(update, release, statements.get(client))
            unstated += hidden
            if self._insight is not None:
                self._batches[client].extend(self._insight.batches(update))
                batches[client] = list(self._batches[client])
                known = self._insight.noise_free(update, release)
                if known is not None:
                    noise_free[client] = known
        norms = self._central.clip_norms(number) if self._central is not None else None
        return RoundClaims(general, own, unstated, noise_free, batches, norms)

    def _behind_sum(
        self, seen: ClientUpdate, general: Sequence[Claim], statements: Mapping[int, Statement]
    ) -> RoundClaims:
        """Claims of single updates, taken to be those of the mean client; none of them can be tested."""
        mean = max(1, round(seen.num_examples / len(seen.summed)))
        reason = _SUM.format(len(seen.summed))
        unseen = [Unstated(claim, reason) for claim in general]
        for client in seen.summed:
            single = replace(seen, client_id=client, num_examples=mean, summed=())
            claims, hidden = self._of_update(single, self.release(mean), statements.get(client))
            unseen += [Unstated(c, reason, client) for c in (*claims, *(part.claim for part in hidden))]
        return RoundClaims(unstated=unseen)

    def _of_strategy(
        self, number: int, clip_norms: tuple[float, float] | None
    ) -> tuple[list[Claim], list[Unstated]]:
        if self._central is not None:
            return self._central.claims(number)
        claims = strategy_claims(
            self.config.strategy.name,
            clients=self.config.federation.clients,
            fraction_train=self.config.federation.fraction_train,
            clip_norm=clip_norms[0] if clip_norms is not None else None,
        )
        moving = any(isinstance(claim, AdaptiveClipping) for claim in claims)
        if not moving or number == 1 or clip_norms is not None:
            return claims, []
        return [c for c in claims if not _follows_norm(c)], [
            Unstated(c, _NORM) for c in claims if _follows_norm(c)
        ]

    def _of_update(
        self, update: ClientUpdate, release: StepRelease, statement: Statement | None
    ) -> tuple[list[Claim], list[Unstated]]:
        settings = self.settings(update.round)
        steps = steps_per_round(update.num_examples, settings)
        claims, unstated = step_claims(release, settings, update.num_examples, steps)
        parts = self.defense.parts if isinstance(self.defense, Chain) else (self.defense,)
        own_claims = [part.claims(update, settings) for part in parts if isinstance(part, Claiming)]
        claims, hidden = claims_left([claims, *own_claims])
        unstated += [Unstated(claim, _HIDDEN) for claim in hidden]
        if statement is not None and statement.usable:
            if statement.guarantee.accountant == "rdp-filter":
                epsilons, unknown = self._filtered(update, release, steps, statement)
                claims += epsilons
                unstated += unknown
            else:
                claims += _client_epsilon(claims, statement)
                claims += _epsilon(release, steps, statement)
        return claims, [Unstated(part.claim, part.reason, update.client_id) for part in unstated]

    def _filtered(
        self, update: ClientUpdate, release: StepRelease, steps: int, statement: Statement
    ) -> tuple[list[Claim], list[Unstated]]:
        """Epsilon of a filter: its orders are the defense's, the noise is what the client stated."""
        said = statement.guarantee
        if not isinstance(self.defense, Filtering) or not release.clip_norm:
            return [], []
        fixed = self.defense.privacy_filter(update.num_examples)
        claim = EpsilonClaim(
            said.epsilon,
            said.delta,
            said.unit,
            "rdp-filter",
            release.noise_std / release.clip_norm,
            release.sample_rate,
            steps,
            history=statement.history or (),
            orders=fixed.orders,
            shares=fixed.shares,
        )
        return ([claim], []) if statement.history else ([], [Unstated(claim, _HISTORY)])


def _epsilon(release: StepRelease, steps: int, statement: Statement) -> list[Claim]:
    """An example-level epsilon follows from equal steps in every round taken part in."""
    said = statement.guarantee
    kind: Accountant | None = next(
        (known for known in get_args(Accountant) if known == said.accountant), None
    )
    if kind is None or said.unit != "example" or not release.noise_std or not release.clip_norm:
        return []
    multiplier = release.noise_std / release.clip_norm
    total = steps * statement.rounds
    return [EpsilonClaim(said.epsilon, said.delta, "example", kind, multiplier, release.sample_rate, total)]


def _client_epsilon(claims: Sequence[Claim], statement: Statement) -> list[Claim]:
    """A client-level epsilon follows from noise on whole updates, one release a round, without sampling."""
    noise = next((c for c in claims if isinstance(c, GaussianNoise) and c.on == "update"), None)
    clip = next((c for c in claims if isinstance(c, ClipNorm) and (c.of, c.by) == ("update", "client")), None)
    said = statement.guarantee
    kind = next((known for known in (*get_args(Accountant), "analytic") if known == said.accountant), None)
    if kind is None or noise is None or clip is None or said.unit != "client":
        return []
    multiplier = noise.std / clip.norm
    return [EpsilonClaim(said.epsilon, said.delta, "client", kind, multiplier, steps=statement.rounds)]


def _follows_norm(claim: Claim) -> bool:
    return isinstance(claim, (AdaptiveClipping, ClipNorm, GaussianNoise, IndependentNoise))
