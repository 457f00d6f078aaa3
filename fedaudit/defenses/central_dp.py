"""Central, client-level differential privacy: the server clips, adds up, adds noise, and releases the sum."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, get_args

from torch import Generator, Tensor

from fedaudit.accounting import Accountant, FederationLedger, noise_multiplier_for
from fedaudit.defenses.central_mechanism import AdaptiveNorm, CentralMechanism
from fedaudit.defenses.plain_steps import PlainSteps
from fedaudit.types import Guarantee

Sampling = Literal["fixed", "poisson"]
Weighting = Literal["uniform", "capped"]
ADVERSARY: Literal["outsider"] = "outsider"
"""Against whom the guarantee holds: those who see the released models and no update."""
LEAST_NOISE = 0.01
COHORT_SHARE, MULTIPLE = 1 / 20, 1.5
"""Noise on the count unless stated: cohort / 20 (Andrew et al. 2019), at least 1.5 times the multiplier."""


@dataclass(frozen=True)
class CentralPlan:
    """A mechanism in a federation of known size, and the accounting of its rounds.

    Attributes:
        mechanism: what one round does.
        clients: N, from whom cohorts are drawn; taken to be public.
        cohort: (expected) number of clients asked in a round.
        sampling: "poisson": each client is asked independently with probability cohort / N. "fixed": anything
            else; nothing is amplified then.
        delta: probability that epsilon is stated at, under 1 / N.
        accountant: how rounds compose.
        budget: the largest epsilon that may be reached; 0 is none.

    Raises:
        ValueError: for a cohort that does not fit, or a delta that is not under 1 / N.
    """

    mechanism: CentralMechanism
    clients: int
    cohort: int
    sampling: Sampling = "fixed"
    delta: float = 1e-5
    accountant: Accountant = "rdp"
    budget: float = 0.0

    def __post_init__(self) -> None:
        self.ledger().add(1.0, self.cohort).guarantee(self.delta)

    @property
    def sample_rate(self) -> float:
        """Probability that a client is asked, as far as accounting may use it; 1 without Poisson sampling."""
        return self.cohort / self.clients if self.sampling == "poisson" else 1.0

    def ledger(self) -> FederationLedger:
        """An empty ledger."""
        return FederationLedger(self.clients, "poisson" if self.sampling == "poisson" else "none")

    def after(self, ledger: FederationLedger) -> FederationLedger:
        """The ledger after one more round."""
        return ledger.add(self.mechanism.noise_multiplier, self.cohort)

    def guarantee(self, ledger: FederationLedger) -> Guarantee | None:
        """The guarantee of everything in the ledger against those who see the released models only.

        None where epsilon has no bound worth the name: multipliers up to 0.01, epsilon in the thousands.
        Against the server, which receives updates before any noise, there is no guarantee at all.
        """
        if self.mechanism.noise_multiplier <= LEAST_NOISE:
            return None
        return ledger.guarantee(self.delta, ADVERSARY, accountant=self.accountant)

    def admits(self, ledger: FederationLedger) -> bool:
        """Whether one more round keeps within the budget; it depends on no data."""
        if not self.budget:
            return True
        reached = self.guarantee(self.after(ledger))
        return reached is not None and reached.epsilon <= self.budget * (1 + 1e-6)


@dataclass(frozen=True)
class CentralPrivacy(PlainSteps):
    """The server clips each update to norm C, adds them up, and adds N(0, (z w C)^2) before it divides by D.

    Threat model: the server is trusted. It sees every update before any noise, and so does an auditor at the
    server: measures and attacks on updates find what they find without a defense. What is protected, against
    everybody who sees only the released models, is a client as a whole: its update counts, or a zero update
    stands in its place. Who is asked is public under "fixed" sampling. With "poisson" each client is asked
    with probability cohort / N, and the guarantee is amplified, for add-or-remove neighbours, against those
    who see neither the updates nor who is asked. Replacing a client by another moves the sum by up to 2 C:
    that is protected with the epsilon of half this z.

    Clients that fail, are rejected or are too late count as zero updates: the divisor is the planned cohort,
    whoever replies, so the sensitivity stays C / cohort and the mean becomes shorter. A round that nobody
    replied to releases noise alone; releasing nothing would tell it from a round with one client. Integer
    entries (counters of batches) keep their broadcast value; floating-point buffers are clipped and noised
    like parameters, which can turn a running variance negative: use GroupNorm instead of BatchNorm. Metrics
    that clients report, evaluation on clients included, are not released. Each reply is judged by itself:
    what one client sends never decides whether another's update counts.

    The noise is scaled to the clip norm that was applied. Adaptive clipping (Andrew et al. 2019, arXiv
    1905.03871) moves the norm towards a quantile of the update norms afterwards, by a count that takes its
    own part of z. Noise comes from a seeded generator of floating-point numbers: whoever knows the seed
    removes it, and it is no cryptographic generator.

    Attributes:
        epsilon: target and budget over all rounds; 0 means no target. A round that would exceed it is not
            run: the model stays as it is.
        noise_multiplier: z; 0 means from epsilon and the rounds of the run. If both are given, z is used and
            epsilon is the budget only.
        clip: C, the largest norm of an update over all floating-point entries; the first round's if adaptive.
        delta: probability that epsilon is stated at; under 1 / clients.
        accountant: "rdp", "prv" or "pld", see `fedaudit.accounting.epsilon`.
        adaptive: whether C follows a quantile of the norms.
        quantile: share of updates that shall not be clipped.
        clip_lr: step size of the logarithm of C.
        count_noise: standard deviation of the noise on the count; 0 means max(cohort / 20, 1.5 z).
        weights: "uniform", or "capped": min(examples, cap) over a fixed denominator.
        cap: examples that a client counts with at most; for "capped".
        denominator: of "capped" weights; a public number; 0 means cohort times cap.
        sampling: "fixed": as the strategy asks clients. "poisson": each independently.
        rounds: that the budget is divided over; 0 means the rounds of the run.

    Raises:
        ValueError: for an option out of range, or neither epsilon nor noise multiplier.

    >>> CentralPrivacy(noise_multiplier=1.0, epsilon=0.0).central_plan(50, 10).mechanism.noise_std(1.0)
    0.1
    """

    epsilon: float = 8.0
    noise_multiplier: float = 0.0
    clip: float = 1.0
    delta: float = 1e-5
    accountant: Accountant = "rdp"
    adaptive: bool = False
    quantile: float = 0.5
    clip_lr: float = 0.2
    count_noise: float = 0.0
    weights: Weighting = "uniform"
    cap: int = 0
    denominator: float = 0.0
    sampling: Sampling = "fixed"
    rounds: int = 0

    name: ClassVar[str] = "central-dp"

    def __post_init__(self) -> None:
        for option in ("epsilon", "noise_multiplier", "count_noise", "cap", "denominator", "rounds"):
            value = getattr(self, option)
            if not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"{option.replace('_', '-')} must be a number >= 0, got {value}")
        for option, kinds in (("accountant", Accountant), ("weights", Weighting), ("sampling", Sampling)):
            if getattr(self, option) not in get_args(kinds):
                allowed = ", ".join(get_args(kinds))
                raise ValueError(f"{option} must be one of {allowed}, got {getattr(self, option)!r}")
        if not self.epsilon and not self.noise_multiplier:
            raise ValueError(
                "central-dp needs epsilon > 0 or noise-multiplier > 0, got 0 for both: give at least one"
            )
        if (self.weights == "capped") != bool(self.cap) or (self.denominator and not self.cap):
            raise ValueError(
                f"weights=capped goes with cap > 0, and with nothing else, got weights={self.weights}, "
                f"cap={self.cap}, denominator={self.denominator:g}: write weights=capped, cap=100"
            )
        if self.count_noise and not self.adaptive:
            raise ValueError(
                f"count-noise belongs to adaptive clipping, got {self.count_noise:g}: write adaptive=true"
            )
        if not 0 < self.delta < 1:
            raise ValueError(f"delta must lie in (0, 1), got {self.delta}: choose it under 1 / clients")
        CentralMechanism(1.0, self.clip, 1.0)
        AdaptiveNorm(1.0, 1.0, self.quantile, self.clip_lr)

    def over_rounds(self, rounds: int) -> "CentralPrivacy":
        """The same for a run of so many rounds, unless the option `rounds` says otherwise."""
        return self if self.rounds else replace(self, rounds=rounds)

    def protect(self, delta: Mapping[str, Tensor], generator: Generator) -> dict[str, Tensor]:
        """The update itself: a client leaves everything to the server."""
        return dict(delta)

    def central_plan(self, clients: int, cohort: int) -> CentralPlan:
        """The mechanism for a federation of so many clients, `cohort` of which are asked in a round.

        Raises:
            ValueError: if the noise follows from epsilon and nobody said over how many rounds, if a count
                takes more than there is, or as `CentralPlan`.
        """
        z = self.noise_multiplier
        if not z:
            if not self.rounds:
                raise ValueError(
                    "central-dp divides epsilon over rounds, got none: set the option rounds, or give "
                    "noise-multiplier"
                )
            rate = cohort / clients if self.sampling == "poisson" else 1.0
            z = noise_multiplier_for(self.epsilon, self.delta, rate, self.rounds, self.accountant)
        counting = self.count_noise or max(cohort * COHORT_SHARE, MULTIPLE * z)
        mechanism = CentralMechanism(
            noise_multiplier=z,
            clip_norm=self.clip,
            divisor=(self.denominator or cohort * self.cap) if self.cap else cohort,
            most_examples=self.cap,
            adaptive=AdaptiveNorm(cohort, counting, self.quantile, self.clip_lr) if self.adaptive else None,
        )
        return CentralPlan(
            mechanism, clients, cohort, self.sampling, self.delta, self.accountant, self.epsilon
        )
