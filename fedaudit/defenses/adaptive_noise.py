"""DP-SGD whose noise changes over the rounds: constant, decaying, or driven by what was measured to leak."""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import ClassVar, Literal

from torch import Generator, Tensor, nn
from torch.optim import Optimizer

from fedaudit.accounting import Ledger, RenyiFilter, noise_multiplier_for
from fedaudit.accounting.schedule import schedule_cost, schedule_scale
from fedaudit.defenses.base import RunPlan, Settings
from fedaudit.defenses.dp_sgd import DPSGD, GradSample
from fedaudit.types import Guarantee, StepRelease

Driver = Literal["constant", "decay", "leakage"]
Decay = Literal["linear", "exponential"]
_SLACK = 1e-9
"""Part of a budget that rounding may not use."""


@dataclass(frozen=True)
class LeakageAdaptive:
    """DP-SGD with a noise multiplier per round, all of them within one total (epsilon, delta).

    Drivers, in round r of R, with sigma the noise that spends the budget over R rounds:

    - "constant": sigma. DP-SGD, accounted for by the filter.
    - "decay": sigma_0 s_r, falling from s_1 = 1 to s_R = ratio: "linear" s_r = 1 - (1 - ratio) t,
      "exponential" s_r = ratio^t, t = (r-1)/(R-1); sigma_0 is such that the R rounds spend the budget. Less
      noise late, when gradients are small (Yu et al. 2019, arXiv 1904.02200, compare such schedules).
    - "leakage": b_r (leakage_{r-1} / target)^gamma, b_r the constant noise that would spend what is left
      over the rounds that are left. It is moved as little as needed to keep every round's noise, this one's
      and all later ones', within low sigma and high sigma and to spend all of the budget in the last round.
      Without a measurement it is b_r.

    All drivers end at the same epsilon in a run in which a client takes part in every round. A client that
    sits a round out does not spend that round's constant share later.

    The guarantee is a Rényi filter's (`fedaudit.accounting.RenyiFilter`), valid although the noise depends
    on outputs: a round that the filter does not admit is not trained. Its orders come from the constant or
    decaying plan before the first step. It costs -ln(0.9)/(a-1) of epsilon against DP-SGD's accountant, 0.04
    at order 4.

    `leakage` is what the SERVER measured in the round before, averaged over clients: mutual information of
    reference batches, or norm, cosine or cohort uniqueness of updates that were noised before they were
    sent. These are functions of releases and of public data, which the filter covers. What a client or the
    simulation's oracle measures on private examples is not, and is never used. A server that reports a wrong
    number moves noise between rounds; it cannot raise the total.

    What DP-SGD's docstring says of threat model, sampling and seeded noise holds here too.

    Attributes:
        epsilon: total budget, > 0.
        delta: as in `DPSGD`; 0 chooses it from the data's size.
        clip_norm: C, the largest norm of one example's gradient.
        driver: what noise follows.
        decay: shape, for driver "decay".
        ratio: noise of the last round over that of the first, in (0, 1], for driver "decay".
        measure: the server's measure, for driver "leakage".
        target: the measure's value at which the factor is 1; 0 means its mean over the rounds so far.
        gamma: exponent; larger reacts more.
        low: least noise of a round over sigma, in (0, 1].
        high: most noise of a round over sigma, >= 1.
        grad_sample: as in `DPSGD`.
        lr: learning rate of clients under this defense; 0 means the run's. Its decay stays the run's.
        batch_size: (expected) batch size of clients under this defense; 0 means the run's.

    Raises:
        ValueError: for an option out of range.

    >>> LeakageAdaptive(clip_norm=2.0, driver="constant").release(100, batch_size=10, planned_steps=50)
    StepRelease(clip_norm=2.0, noise_std=1.72009, sample_rate=0.1)
    """

    epsilon: float = 8.0
    delta: float = 0.0
    clip_norm: float = 1.0
    driver: Driver = "leakage"
    decay: Decay = "exponential"
    ratio: float = 0.5
    measure: str = "mutual-information"
    target: float = 0.0
    gamma: float = 1.0
    low: float = 0.5
    high: float = 2.0
    grad_sample: GradSample = "hooks"
    lr: float = 0.0
    batch_size: int = 0
    _plan: RunPlan | None = field(default=None, init=False, repr=False, compare=False)

    name: ClassVar[str] = "leakage-adaptive"
    poisson: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not (self.epsilon > 0 and math.isfinite(self.epsilon)):
            raise ValueError(f"epsilon must be a number > 0, got {self.epsilon}: choose e.g. 8")
        _ = self._sgd  # checks delta, clip norm and what follows `high`
        if self.driver not in ("constant", "decay", "leakage"):
            raise ValueError(f"driver must be constant, decay or leakage, got {self.driver!r}: choose one")
        if self.decay not in ("linear", "exponential"):
            raise ValueError(f"decay must be linear or exponential, got {self.decay!r}: choose one")
        if not 0 < self.ratio <= 1:
            raise ValueError(f"ratio must lie in (0, 1], got {self.ratio}: 0.5 halves the noise over the run")
        if not (self.target >= 0 and math.isfinite(self.target)):
            raise ValueError(f"target must be a number >= 0, got {self.target}: 0 takes the mean so far")
        if not (self.gamma >= 0 and math.isfinite(self.gamma)):
            raise ValueError(f"gamma must be a number >= 0, got {self.gamma}: choose e.g. 1")
        if not (0 < self.low <= 1 <= self.high and math.isfinite(self.high)):
            raise ValueError(
                f"low and high hold 1 between them, got {self.low} and {self.high}: choose e.g. 0.5 and 2"
            )

    @property
    def signal(self) -> str:
        """The server's measure that drives the noise; empty for the other drivers."""
        return self.measure if self.driver == "leakage" else ""

    def planned(self, plan: RunPlan) -> "LeakageAdaptive":
        """The same defense with a run's rounds, batch size and steps to divide the budget over."""
        if plan.rounds < 1:
            raise ValueError(f"a run has at least one round, got {plan.rounds}: set federation.rounds")
        made = copy.copy(self)
        object.__setattr__(made, "_plan", plan)
        return made

    def settings(self, agreed: Settings) -> Settings:
        """The agreed training, with this defense's own learning rate and batch size where it has them."""
        return self._sgd.settings(agreed)

    def delta_for(self, num_examples: int) -> float:
        """The delta that a client's epsilon is stated at.

        Raises:
            ValueError: if the chosen delta is not under 1 / num_examples.
        """
        return self._sgd.delta_for(num_examples)

    def release(self, num_examples: int, batch_size: int, planned_steps: int) -> StepRelease:
        """One step under constant noise over all planned steps, which the rounds' noise varies around.

        Raises:
            ValueError: if delta is too large for this client or no noise reaches the target.
        """
        sample_rate = min(1.0, batch_size / num_examples)
        delta = self.delta_for(num_examples)
        _, noise = _divided(self.epsilon, delta, sample_rate, planned_steps, (1.0,))
        return StepRelease(self.clip_norm, noise * self.clip_norm, sample_rate)

    def release_in_round(
        self, num_examples: int, round_number: int, ledger: Ledger, leakage: float | None
    ) -> StepRelease:
        """One step in this round; `leakage` is relative to its target and used by driver "leakage" only.

        Raises:
            ValueError: without a plan, for a round that is not planned, or as `release`.
        """
        plan, sample_rate = self._agreed, self._sample_rate(num_examples)
        if not 1 <= round_number <= plan.rounds:
            raise ValueError(
                f"the budget is divided over rounds 1 to {plan.rounds}, got round {round_number}: plan more"
            )
        filtered, scale = self._divided(num_examples)
        if self.driver == "leakage":
            steps = plan.steps(num_examples)
            rest = _Rest.of(filtered, ledger, plan.rounds, round_number, steps, sample_rate)
            noise = rest.noise(self._factor(leakage), self.low * scale, self.high * scale)
        else:
            noise = scale * self._relative[round_number - 1]
        return StepRelease(self.clip_norm, noise * self.clip_norm, sample_rate)

    def charge(self, ledger: Ledger, release: StepRelease, steps: int, num_examples: int) -> Ledger:
        """The ledger after `steps` more steps; call it before training.

        Raises:
            BudgetExhaustedError: if the filter does not admit them.
            ValueError: without a plan, or if the release has no clip norm or no noise.
        """
        if release.clip_norm is None:
            raise ValueError("leakage-adaptive clips, got a release without clip norm: use its own release")
        filtered = self._divided(num_examples)[0].after(ledger)
        return filtered.spend(release.noise_std / release.clip_norm, release.sample_rate, steps).ledger

    def privacy_filter(self, num_examples: int) -> RenyiFilter:
        """The filter of a client with this many examples before its first step.

        Raises:
            ValueError: without a plan.
        """
        return self._divided(num_examples)[0]

    def guarantee(self, ledger: Ledger, num_examples: int) -> Guarantee:
        """Example-level guarantee for everything in the ledger, whatever its noise depended on.

        Raises:
            ValueError: without a plan.
        """
        filtered = self._divided(num_examples)[0].after(ledger)
        return Guarantee(filtered.odometer.epsilon, filtered.delta, "example", "rdp-filter")

    def prepare(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        release: StepRelease,
        expected_batch_size: int,
        generator: Generator | None,
    ) -> tuple[nn.Module, Optimizer]:
        """As DP-SGD, with this round's noise."""
        return self._sgd.prepare(model, optimizer, release, expected_batch_size, generator)

    def empty_step(self, model: nn.Module) -> None:
        """As DP-SGD: a step of noise alone."""
        self._sgd.empty_step(model)

    def restore(self, model: nn.Module) -> None:
        """As DP-SGD."""
        self._sgd.restore(model)

    def protect(self, delta: Mapping[str, Tensor], generator: Generator) -> dict[str, Tensor]:
        """The update itself: its steps are protected already."""
        return dict(delta)

    @property
    def _sgd(self) -> DPSGD:
        return _dp_sgd(self.epsilon, self.delta, self.clip_norm, self.grad_sample, self.lr, self.batch_size)

    @property
    def _agreed(self) -> RunPlan:
        if self._plan is None:
            raise ValueError(
                "leakage-adaptive divides its budget over rounds, got no plan of them: call planned(...)"
            )
        return self._plan

    @property
    def _relative(self) -> tuple[float, ...]:
        """Noise of each round up to a common factor, decided before the first one."""
        return _relative(self._agreed.rounds, self.decay if self.driver == "decay" else None, self.ratio)

    def _sample_rate(self, num_examples: int) -> float:
        return min(1.0, self._agreed.batch_size / num_examples)

    def _divided(self, num_examples: int) -> "tuple[RenyiFilter, float]":
        """An empty filter for this client, and the factor on the rounds' relative noise."""
        steps, delta = self._agreed.steps(num_examples), self.delta_for(num_examples)
        return _divided(self.epsilon, delta, self._sample_rate(num_examples), steps, self._relative)

    def _factor(self, leakage: float | None) -> float:
        if leakage is None or not math.isfinite(leakage):
            return 1.0
        return math.pow(max(leakage, 0.0), self.gamma) if leakage < 1e9 else math.inf


@dataclass(frozen=True)
class _Rest:
    """What a client has left: Rényi divergence at the filter's main order, for so many rounds."""

    budget: float
    rounds: int
    steps: int
    sample_rate: float
    order: float

    @classmethod
    def of(
        cls, filtered: RenyiFilter, ledger: Ledger, rounds: int, current: int, steps: int, sample_rate: float
    ) -> "_Rest":
        order = filtered.orders[0]
        share = filtered.remaining[order] / rounds
        missed = max(0, current - 1 - ledger.steps // steps)
        left = filtered.after(ledger).remaining.get(order, 0.0) - missed * share
        return cls(left * (1 - _SLACK), rounds - current + 1, steps, sample_rate, order)

    def noise(self, factor: float, low: float, high: float) -> float:
        """This round's noise: as near to factor * base as leaves every later round between low and high."""
        if self.budget <= 0:  # the filter refuses whatever comes now
            return high
        base, later = self._scale(self.budget, self.rounds), self.rounds - 1
        if not later or base >= high:
            return max(base, low)
        least = self._scale(self.budget - later * self._cost(high), 1)
        spare = self.budget - later * self._cost(low)
        most = min(high, self._scale(spare, 1)) if spare > 0 else high
        return min(max(factor * base, least, low), max(most, low))

    def _cost(self, noise: float) -> float:
        return schedule_cost(noise, (1.0,), self.sample_rate, self.steps, self.order)

    def _scale(self, budget: float, rounds: int) -> float:
        return schedule_scale(budget, (1.0,) * rounds, self.sample_rate, self.steps, self.order)


@lru_cache(maxsize=64)
def _dp_sgd(
    epsilon: float, delta: float, clip_norm: float, grad_sample: GradSample, lr: float, batch_size: int
) -> DPSGD:
    return DPSGD(epsilon, delta, clip_norm=clip_norm, grad_sample=grad_sample, lr=lr, batch_size=batch_size)


@lru_cache(maxsize=64)
def _relative(rounds: int, decay: Decay | None, ratio: float) -> tuple[float, ...]:
    if decay is None or rounds == 1:
        return (1.0,) * rounds
    passed = [r / (rounds - 1) for r in range(rounds)]
    if decay == "linear":
        return tuple(1 - (1 - ratio) * t for t in passed)
    return tuple(ratio**t for t in passed)


@lru_cache(maxsize=4096)
def _divided(
    epsilon: float, delta: float, sample_rate: float, steps: int, relative: tuple[float, ...]
) -> tuple[RenyiFilter, float]:
    """A filter whose main order suits the schedule, and the scale at which the schedule spends its budget."""
    constant = noise_multiplier_for(epsilon, delta, sample_rate, steps * len(relative))
    plan = Ledger(((constant, sample_rate, steps * len(relative)),))
    for _ in range(3):
        filtered = RenyiFilter.for_plan(epsilon, delta, plan)
        main = filtered.orders[0]
        budget = filtered.remaining[main] * (1 - _SLACK)
        scale = schedule_scale(budget, relative, sample_rate, steps, main)
        plan = Ledger(tuple((scale * part, sample_rate, steps) for part in relative))
    return filtered, scale
