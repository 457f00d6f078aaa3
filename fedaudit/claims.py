"""What a defense claims to do, in words that can be tested, and what a test of one claim found.

A claim says what leaves a client or the server: how long it can be, how much noise it holds, how it is
mixed. It names no implementation, so that the same tests serve this project's defenses, Flower's wrappers
and a description on paper. `fedaudit.verification` tests claims; it never reads the code of a defense.
"""

import math
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["holds", "violated", "cannot be checked by this observer"]
HOLDS: Verdict = "holds"
VIOLATED: Verdict = "violated"
UNCHECKED: Verdict = "cannot be checked by this observer"
Release = Literal["update", "aggregate"]
Watcher = Literal["server", "client", "oracle"]


def _positive(name: str, value: float) -> None:
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name} must be a number > 0, got {value}: state what the defense promises")


def _share(name: str, value: float) -> None:
    if not 0 < value <= 1:
        raise ValueError(f"{name} must lie in (0, 1], got {value}: state what the defense promises")


@dataclass(frozen=True)
class ClipNorm:
    """No vector is longer than `norm`, over every floating-point entry: scalars and buffers count.

    Attributes:
        norm: the largest Euclidean norm.
        of: what is clipped: a client's "update", or the gradient of each "example" in a local step.
        over: "all" entries together, or each tensor by itself ("layer").
        by: who clips. What a "client" clips is short when it arrives; what the "server" clips arrives as long
            as it was, and shows in the aggregate only.

    >>> str(ClipNorm(0.5))
    'update norm <= 0.5 over all entries, clipped by the client'
    """

    norm: float
    of: Literal["update", "example"] = "update"
    over: Literal["all", "layer"] = "all"
    by: Literal["client", "server"] = "client"

    def __post_init__(self) -> None:
        _positive("norm", self.norm)

    def __str__(self) -> str:
        over = "over all entries" if self.over == "all" else "in each tensor"
        what = "update norm" if self.of == "update" else "norm of an example's gradient"
        return f"{what} <= {self.norm:.4g} {over}, clipped by the {self.by}"


@dataclass(frozen=True)
class GaussianNoise:
    """Every coordinate holds independent Gaussian noise of this standard deviation.

    Attributes:
        std: standard deviation of the noise in what is released.
        on: a client's "update", or the server's "aggregate" (the change of the global weights).
        signal: largest Euclidean norm of what the noise was added to, where that follows from the other
            claims; None if unknown. Tests of single updates cannot tell signal from noise below it.
    """

    std: float
    on: Release = "update"
    signal: float | None = None

    def __post_init__(self) -> None:
        _positive("std", self.std)
        if self.signal is not None and not self.signal >= 0:
            raise ValueError(f"signal must be >= 0 or None, got {self.signal}: None means unknown")

    def __str__(self) -> str:
        return f"Gaussian noise of std {self.std:.4g} on every coordinate of the {self.on}"


@dataclass(frozen=True)
class IndependentNoise:
    """The noise is drawn anew: between clients, between rounds, and from one tensor to the next.

    Attributes:
        between: across what no draw is used twice.
        on: which release.
    """

    between: Literal["clients", "rounds", "tensors"]
    on: Release = "update"

    def __str__(self) -> str:
        return f"noise on the {self.on} independent between {self.between}"


@dataclass(frozen=True)
class Sparsity:
    """At most this share of an update's coordinates is not zero.

    Attributes:
        kept: share of coordinates that may differ from zero; a tensor may round its share up.
    """

    kept: float

    def __post_init__(self) -> None:
        _share("kept", self.kept)

    def __str__(self) -> str:
        return f"at most {self.kept:.4g} of the coordinates are not zero"


@dataclass(frozen=True)
class QuantizationLevels:
    """A tensor of an update takes at most this many values (k bits: 2^k).

    Attributes:
        levels: number of values.
    """

    levels: int

    def __post_init__(self) -> None:
        if self.levels < 2:
            raise ValueError(f"levels must be >= 2, got {self.levels}: one level carries nothing")

    def __str__(self) -> str:
        return f"at most {self.levels} values in each tensor"


@dataclass(frozen=True)
class Weights:
    """How the aggregate weights the clients; the noise must fit the largest weight.

    Attributes:
        rule: 1/n each ("uniform"), each client's share of the examples ("num-examples"), or its examples up
            to a limit over a fixed number ("capped").
        cap: no weight is larger than this; None means that no cap is claimed.
        divisor: what uniform and capped weights are divided by, whoever replied; None means by n.
        most_examples: the limit of "capped".
    """

    rule: Literal["uniform", "num-examples", "capped"] = "uniform"
    cap: float | None = None
    divisor: float | None = None
    most_examples: int = 0

    def __post_init__(self) -> None:
        if self.cap is not None:
            _share("cap", self.cap)
        if self.divisor is not None:
            _positive("divisor", self.divisor)
        if (self.rule == "capped") != (self.most_examples > 0) or (
            self.rule == "capped" and self.divisor is None
        ):
            raise ValueError(
                f"capped weights state most_examples and divisor, got rule={self.rule!r}, "
                f"most_examples={self.most_examples}, divisor={self.divisor}: state both, or neither"
            )
        if self.rule == "num-examples" and self.divisor is not None:
            raise ValueError(f"shares of the examples have no divisor, got {self.divisor}: leave it out")

    def __str__(self) -> str:
        cap = "" if self.cap is None else f", none above {self.cap:.4g}"
        most = f" at {self.most_examples} examples" if self.most_examples else ""
        over = "" if self.divisor is None else f", divided by {self.divisor:.4g} whoever replies"
        return f"aggregation weights: {self.rule}{most}{over}{cap}"


@dataclass(frozen=True)
class EpsilonClaim:
    """A guarantee together with the mechanism it is said to follow from.

    Attributes:
        epsilon: the privacy loss bound that is stated.
        delta: the probability it is stated at.
        unit: whose presence is protected.
        accountant: "rdp", "prv" or "pld" for sampled steps; "analytic" for Gaussian releases, unsampled.
        noise_multiplier: noise standard deviation over the sensitivity.
        sample_rate: with which an example (or client) enters a release.
        steps: releases composed.
        on: the release whose measured noise the epsilon stands on.
    """

    epsilon: float
    delta: float
    unit: Literal["example", "client"]
    accountant: Literal["rdp", "prv", "pld", "analytic"]
    noise_multiplier: float
    sample_rate: float = 1.0
    steps: int = 1
    on: Release = "update"

    def __post_init__(self) -> None:
        _positive("epsilon", self.epsilon)
        _positive("noise_multiplier", self.noise_multiplier)
        _share("sample_rate", self.sample_rate)
        if not 0 < self.delta < 1:
            raise ValueError(f"delta must lie in (0, 1), got {self.delta}: state it with epsilon")
        if self.steps < 1:
            raise ValueError(f"steps must be >= 1, got {self.steps}: count the releases")
        if self.accountant == "analytic" and self.sample_rate < 1:
            raise ValueError(
                f"accountant 'analytic' knows no sampling, got sample_rate={self.sample_rate}: use pld"
            )

    def __str__(self) -> str:
        return f"({self.epsilon:.4g}, {self.delta:.1e})-DP per {self.unit} [{self.accountant}]"


@dataclass(frozen=True)
class PoissonSampling:
    """Every local step includes every example independently with probability `sample_rate`.

    Attributes:
        sample_rate: the probability.
    """

    sample_rate: float

    def __post_init__(self) -> None:
        _share("sample_rate", self.sample_rate)

    def __str__(self) -> str:
        return f"batches drawn by Poisson sampling at rate {self.sample_rate:.4g}"


@dataclass(frozen=True)
class AdaptiveClipping:
    """The clip norm follows a quantile of the update norms (Andrew et al. 2021, arXiv 1905.03871).

    C' = C exp(-lr (b - quantile)), b the share of updates with norm <= C plus N(0, (count_std / n)^2).

    Attributes:
        quantile: share of updates that shall not be clipped.
        lr: step size of the logarithm of the clip norm.
        count_std: standard deviation of the noise on the number of updates within the norm.
        cohort: n where it is fixed beforehand, a missing update counting as half; None means the replies.
    """

    quantile: float = 0.5
    lr: float = 0.2
    count_std: float = 0.0
    cohort: float | None = None

    def __post_init__(self) -> None:
        _positive("lr", self.lr)
        if not 0 <= self.quantile <= 1:
            raise ValueError(f"quantile must lie in [0, 1], got {self.quantile}: it is a share of updates")
        if not self.count_std >= 0:
            raise ValueError(f"count_std must be >= 0, got {self.count_std}: 0 means no noise")
        if self.cohort is not None:
            _positive("cohort", self.cohort)

    def __str__(self) -> str:
        return f"clip norm moves towards the {self.quantile:.4g} quantile of update norms"


@dataclass(frozen=True)
class NothingBeside:
    """The guarantee covers all that a client sends: beside its update it reports only public scalars.

    Attributes:
        allowed: names of scalars that are public or computed from noised values.
    """

    allowed: tuple[str, ...] = (
        *("num-examples", "partition-id", "steps", "epsilon", "delta"),
        *("clip-norm", "noise-std", "sample-rate"),
    )

    def __str__(self) -> str:
        return "nothing computed from data leaves beside the update"


Claim = (
    ClipNorm
    | GaussianNoise
    | IndependentNoise
    | Sparsity
    | QuantizationLevels
    | Weights
    | EpsilonClaim
    | PoissonSampling
    | AdaptiveClipping
    | NothingBeside
)


@dataclass(frozen=True)
class Finding:
    """What one test of one claim found.

    "holds" means that a violation of a stated size would have been noticed and was not; it is evidence, not a
    proof. Where the observer could not have noticed, the verdict says so and the reason names who could.

    Attributes:
        claim: the claim tested.
        measured: the quantity the claim speaks of, as measured; None if nothing could be.
        low: lower end of its interval.
        high: upper end of its interval.
        verdict: holds, violated, or cannot be checked by this observer.
        observer: who looked.
        reason: the evidence in one sentence.
        round: server round.
        client_id: whose update; None for the round as a whole.
    """

    claim: Claim
    measured: float | None
    low: float | None
    high: float | None
    verdict: Verdict
    observer: Watcher
    reason: str
    round: int = 0
    client_id: int | None = None

    def __str__(self) -> str:
        whose = f"round {self.round}" + ("" if self.client_id is None else f", client {self.client_id}")
        return f"[{whose}] {self.claim}: {self.verdict} ({self.reason})"
