"""A recorded run against the claims of its own configuration."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import get_args

from torch import Tensor

from fedaudit.accounting import Accountant
from fedaudit.claims import (
    UNCHECKED,
    AdaptiveClipping,
    Claim,
    ClipNorm,
    EpsilonClaim,
    Finding,
    GaussianNoise,
    IndependentNoise,
    Watcher,
)
from fedaudit.config import RunConfig
from fedaudit.defenses.base import BudgetedByRound, Defense
from fedaudit.defenses.chain import Chain, claims_left
from fedaudit.errors import RecordError
from fedaudit.kept_files import load_update
from fedaudit.records import Run, load_run
from fedaudit.registry import DEFENSES
from fedaudit.round_release import release_behind
from fedaudit.spec import parse_spec
from fedaudit.training import TrainSettings, settings_in_round, steps_per_round
from fedaudit.types import ClientUpdate, StepRelease
from fedaudit.verification.derive import Claiming, Unstated, step_claims, strategy_claims
from fedaudit.verification.memory import NoiseMemory
from fedaudit.verification.round import ALPHA, verify_round

State = Mapping[str, Tensor]
_HIDDEN = "what a later defense does to the update hides it; the client sees the update in between"


@dataclass(frozen=True)
class Insight:
    """What an oracle adds to updates: how to compute an update without noise, and the batches behind it.

    Attributes:
        noise_free: the update without its noise; None where it cannot be computed.
        batches: indices of the examples of each local step.
    """

    noise_free: Callable[[ClientUpdate, StepRelease], State | None]
    batches: Callable[[ClientUpdate], Sequence[Tensor]]


class RecordedRun:
    """The claims of a run and what it kept.

    Args:
        folder: the run's folder.

    Raises:
        RecordError: if the folder holds no run, no configuration or no updates.
    """

    def __init__(self, folder: str | Path) -> None:
        self.run: Run = load_run(folder)
        recorded = dict(self.run.info.get("config", {}))
        if not recorded:
            raise RecordError(f"{self.run.path} has no run.toml to take claims from: start the run anew")
        self.config = RunConfig.from_flat(recorded)
        self.files: dict[int, list[Path]] = defaultdict(list)
        for path in sorted((self.run.path / "updates").glob("round-*-client-*.safetensors")):
            self.files[int(path.name.split("-")[1])].append(path)
        if not self.files:
            raise RecordError(
                f"verification needs the updates of a run, got none in {self.run.path}: "
                "run it again with --set audit.save-updates=true"
            )

    def rounds(self) -> Iterator[tuple[int, list[ClientUpdate], State | None]]:
        """Each kept round with its updates and the weights after it, None where those are not known."""
        numbers = sorted(self.files)
        updates = self._load(numbers[0])
        for number, following in zip(numbers, [*numbers[1:], None], strict=True):
            ahead = self._load(following) if following is not None else []
            after = ahead[0].before if ahead and following == number + 1 else None
            if number == self.config.federation.rounds:
                after = self._final()
            yield number, updates, after
            updates = ahead

    def _load(self, number: int) -> list[ClientUpdate]:
        return [load_update(path) for path in self.files[number]]

    def _final(self) -> State | None:
        from safetensors.torch import load_file

        path = self.run.path / "weights.safetensors"
        return load_file(path) if path.exists() else None

    def settings(self, round_number: int) -> TrainSettings:
        """Local training in a round, as the configuration has it."""
        strategy = parse_spec(self.config.strategy.name)
        mu = strategy.options.get("proximal-mu", 0.0)
        proximal_mu = float(mu) if isinstance(mu, (int, float)) else 0.0
        return settings_in_round(self.config.train, self.defense, round_number, proximal_mu)

    @cached_property
    def defense(self) -> Defense:
        """The defense of the run, told over how many rounds it divides its budget."""
        built: Defense = DEFENSES.build(parse_spec(self.config.defense.name))
        if isinstance(built, BudgetedByRound):
            return built.over_rounds(self.config.federation.rounds)
        return built

    def release(self, defense: Defense, num_examples: int) -> StepRelease:
        """What one local step makes visible."""
        settings = self.settings(1)
        planned = steps_per_round(num_examples, settings) * self.config.federation.rounds
        return defense.release(num_examples, settings.batch_size, planned)

    def epsilon_claims(self) -> dict[tuple[int, int], tuple[float, float, str, str, int]]:
        """By (round, client): epsilon, delta, unit, accountant as stated, and rounds taken part in so far."""
        records = self.run.records
        stated = records[(records["quantity"] == "epsilon") & (records["status"] == "ok")].sort_values(
            "round"
        )
        rounds: dict[int, int] = defaultdict(int)
        found = {}
        for row in stated.to_dict("records"):
            client = int(row["client_id"])
            rounds[client] += 1
            numbers = float(row["value"]), float(row["delta"])
            words = str(row["privacy_unit"]), str(row["accountant"])
            found[int(row["round"]), client] = (*numbers, *words, rounds[client])
        return found


def verify_run(
    folder: str | Path,
    *,
    observer: Watcher = "server",
    insight: Callable[[RecordedRun], Insight] | None = None,
    alpha: float = ALPHA,
) -> list[Finding]:
    """Every finding of every kept round of a run, against the claims of its own configuration.

    The defense's claims are tested on the updates, the strategy's on the aggregates: the aggregate of a round
    is the broadcast of the next, so the last kept round needs the final weights, and a round whose successor
    was not kept has no aggregate.

    Args:
        folder: the run's folder; updates must have been kept (`audit.save-updates`).
        observer: "server", or "oracle" with `insight`.
        insight: what an oracle adds.
        alpha: probability of a false alarm in an honest round.

    Raises:
        RecordError: if the folder holds no run or no updates.
    """
    recorded = RecordedRun(folder)
    config = recorded.config
    defense = recorded.defense
    general = strategy_claims(
        config.strategy.name,
        clients=config.federation.clients,
        fraction_train=config.federation.fraction_train,
    )
    first_only = any(isinstance(claim, AdaptiveClipping) for claim in general)
    stated = recorded.epsilon_claims()
    extra = insight(recorded) if insight is not None else None
    memory, findings = NoiseMemory(), list[Finding]()
    batches: dict[int, list[Tensor]] = defaultdict(list)
    for number, updates, after in recorded.rounds():
        settings = recorded.settings(number)
        own: dict[int, list[Claim]] = {}
        noise_free: dict[int, State] = {}
        for update in updates:
            planned = recorded.release(defense, update.num_examples)
            release = release_behind(defense, update) or planned
            steps = steps_per_round(update.num_examples, settings)
            claims, unstated = step_claims(release, settings, update.num_examples, steps)
            parts = defense.parts if isinstance(defense, Chain) else (defense,)
            own_claims = [part.claims(update, settings) for part in parts if isinstance(part, Claiming)]
            claims, hidden = claims_left([claims, *own_claims])
            unstated += [Unstated(claim, _HIDDEN) for claim in hidden]
            claims += _client_epsilon(update, claims, stated)
            own[update.client_id] = [*claims, *_epsilon(update, release, steps, stated)]
            findings += [_unstated(part, update, observer) for part in unstated]
            if extra is not None:
                batches[update.client_id] += extra.batches(update)  # single rounds show little of sampling
                known = extra.noise_free(update, release)
                if known is not None:
                    noise_free[update.client_id] = known
        unknown = first_only and number > 1
        findings += verify_round(
            [claim for claim in general if not (unknown and _follows_norm(claim))],
            updates,
            after,
            per_client=own,
            observer=observer,
            noise_free=noise_free,
            batches=batches,
            memory=memory,
            alpha=alpha,
        )
        if unknown:
            findings += [_without_norm(c, number, observer) for c in general if _follows_norm(c)]
    return findings


def _epsilon(
    update: ClientUpdate,
    release: StepRelease,
    steps: int,
    stated: Mapping[tuple[int, int], tuple[float, float, str, str, int]],
) -> list[Claim]:
    claim = stated.get((update.round, update.client_id))
    if claim is None or not release.noise_std or not release.clip_norm:
        return []
    epsilon, delta, unit, accountant, rounds = claim
    kind: Accountant | None = next((known for known in get_args(Accountant) if known == accountant), None)
    if kind is None or unit != "example":
        return []
    multiplier = release.noise_std / release.clip_norm
    return [EpsilonClaim(epsilon, delta, "example", kind, multiplier, release.sample_rate, steps * rounds)]


def _client_epsilon(
    update: ClientUpdate,
    claims: Sequence[Claim],
    stated: Mapping[tuple[int, int], tuple[float, float, str, str, int]],
) -> list[Claim]:
    """A client-level epsilon follows from noise on whole updates, one release a round, without sampling."""
    claim = stated.get((update.round, update.client_id))
    noise = next((c for c in claims if isinstance(c, GaussianNoise) and c.on == "update"), None)
    clip = next((c for c in claims if isinstance(c, ClipNorm) and (c.of, c.by) == ("update", "client")), None)
    if claim is None or noise is None or clip is None:
        return []
    epsilon, delta, unit, accountant, rounds = claim
    kind = next((known for known in (*get_args(Accountant), "analytic") if known == accountant), None)
    if kind is None or unit != "client":
        return []
    return [EpsilonClaim(epsilon, delta, "client", kind, noise.std / clip.norm, steps=rounds)]


def _follows_norm(claim: Claim) -> bool:
    return isinstance(claim, (AdaptiveClipping, ClipNorm, GaussianNoise, IndependentNoise))


def _without_norm(claim: Claim, number: int, observer: Watcher) -> Finding:
    reason = "the clip norm of later rounds is not recorded; whoever runs the strategy knows it"
    return Finding(claim, None, None, None, UNCHECKED, observer, reason, number)


def _unstated(part: Unstated, update: ClientUpdate, observer: Watcher) -> Finding:
    return Finding(
        part.claim, None, None, None, UNCHECKED, observer, part.reason, update.round, update.client_id
    )
