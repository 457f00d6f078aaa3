"""Epsilon where the noise of a step is chosen from what earlier steps released: an odometer and a filter.

Adding up epsilons, or Rényi divergences at an order picked afterwards, assumes that every noise multiplier
was decided before the first output. What holds without that assumption, and why:

P and Q are the laws of all outputs with and without one example, L_n = ln dP/dQ of the first n steps, and
S_n(a) the sum of their Rényi divergences of order a at the noise that was really used. Given the outputs so
far the next noise is a constant, so M_n(a) = exp((a-1)(L_n - S_n(a))) is a non-negative supermartingale
under P with M_0 = 1, for every order that is FIXED before the first step (the argument of Feldman and Zrnic
2021, arXiv 2008.11193, for their adaptive composition theorem and Rényi filter). Its mean is at most 1 at
every stopping time tau, however tau depends on the outputs.

Several orders at once cost a share of delta each, since which of them is the best at tau depends on the
outputs. With shares w_a that add up to at most 1 and

    eps_n = min over a of S_n(a) + ln((a-1)/a) - (ln(w_a delta) + ln a)/(a-1),

the bound (1 - e^(e-l))_+ <= (1/a) ((a-1)/a)^(a-1) e^((a-1)(l-e)) (it gives Balle et al. 2020, arXiv
1905.09982, theorem 21) yields E_P[(1 - e^(eps_tau - L_tau))_+] <= sum_a w_a delta E_P[M_tau(a)] <= delta.
Hence, for every event E and every rule for stopping,

    P(E) <= E_Q[e^(eps_tau) 1_E] + delta.

That is the odometer's guarantee; where the rule keeps eps_tau <= epsilon it reads P(E) <= e^epsilon Q(E) +
delta, the filter's. P and Q may change places. Doubling budgets (Rogers et al. 2016, arXiv 1605.08294;
Lécuyer 2021, arXiv 2103.01379) is not needed for it.

Both assume that each step is the sampled Gaussian mechanism of `fedaudit.accounting` and that its noise is
a function of earlier RELEASES and of data that is not protected. Noise chosen from the protected data
itself, a local loss for instance, is covered by none of this.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from fedaudit.accounting.composition import best_order
from fedaudit.accounting.ledger import Entry, Ledger, check_delta, check_step
from fedaudit.accounting.renyi import Curve, conversion, rdp_curve
from fedaudit.errors import BudgetExhaustedError

ORDERS = (1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 12.0, 16.0, 20.0, 24.0, 32.0, 48.0, 64.0, 128.0)
"""Default orders: each costs ln(17)/(a-1) of epsilon against knowing the best one in advance."""
MAIN_SHARE = 0.9
"""Share of delta that the order of a plan takes; the others divide the rest."""


@dataclass(frozen=True)
class RenyiOdometer:
    """Reads epsilon at any time of a history whose noise and length may depend on its own outputs.

    Guarantee: whenever and for whatever reason in the outputs one stops, P(E) <= E_Q[e^epsilon 1_E] + delta
    for every event E, epsilon being the value read at the stop (see the module). It is never under `epsilon`
    of the same history (accountant "rdp") at these orders, and above it by at most -ln(w_a)/(a-1), w_a the
    share of the order a that is the best: 0.94 at order 4, 0.18 at order 16 for the default equal shares.

    Attributes:
        delta: probability in (0, 1) that all orders share.
        orders: Rényi orders, fixed before the first step.
        shares: of delta, one per order; none means equal shares.
        ledger: what was spent.

    Raises:
        ValueError: for a delta outside (0, 1), an order <= 1, or shares that do not fit or exceed 1.

    >>> odometer = RenyiOdometer(1e-5).spend(1.0, 0.01, steps=1000)
    >>> round(odometer.epsilon, 2), round(odometer.spend(2.0, 0.01, steps=999).epsilon, 2)
    (2.51, 2.63)
    """

    delta: float
    orders: tuple[float, ...] = ORDERS
    shares: tuple[float, ...] = ()
    ledger: Ledger = field(default_factory=Ledger)

    def __post_init__(self) -> None:
        orders, shares = _checked(self.delta, tuple(self.orders), tuple(self.shares))
        object.__setattr__(self, "orders", orders)
        object.__setattr__(self, "shares", shares)

    @property
    def epsilon(self) -> float:
        """Epsilon at `delta` of everything spent so far; 0 before the first step."""
        return _reading(self.ledger.history, self.orders, self.shares, self.delta)

    @property
    def privacy_loss(self) -> float:
        """Bound on |L_n| at ALL times at once, with probability at least 1 - delta for either direction.

        Ville's inequality on M_n(a): min over a of S_n(a) + ln(1/(w_a delta))/(a-1). Larger than `epsilon`:
        this is the odometer of Rogers et al. 2016, for those who need every reading of a run to hold
        together rather than the last one.
        """
        if not self.ledger.history:
            return 0.0
        tails = [-math.log(w * self.delta) / (a - 1) for a, w in zip(self.orders, self.shares, strict=True)]
        return float(np.min(self.spent + np.array(tails)))

    @property
    def spent(self) -> Curve:
        """Rényi divergence spent at each order, in nats."""
        return _summed(self.ledger.history, self.orders)

    def spend(self, noise_multiplier: float, sample_rate: float, steps: int) -> "RenyiOdometer":
        """The odometer after `steps` more steps."""
        after = self.ledger.add(noise_multiplier, sample_rate, steps)
        return RenyiOdometer(self.delta, self.orders, self.shares, after)

    def to_lists(self) -> dict[str, Any]:
        """Everything as numbers and lists of numbers, as a Flower record can hold them."""
        return {
            "delta": self.delta,
            "orders": list(self.orders),
            "shares": list(self.shares),
            **self.ledger.to_lists(),
        }

    @classmethod
    def from_lists(cls, lists: Mapping[str, Any]) -> "RenyiOdometer":
        """The odometer that `to_lists` wrote.

        Raises:
            ValueError: if something is missing or impossible.
        """
        delta, orders, shares = (_kept(lists, name) for name in ("delta", "orders", "shares"))
        return cls(float(delta), tuple(orders), tuple(shares), Ledger.from_lists(lists))


@dataclass(frozen=True)
class RenyiFilter:
    """Admits steps while the odometer stays within epsilon, so that the whole is (epsilon, delta)-DP.

    Guarantee: if every step was admitted before it was taken, everything released, and the moment at which
    one stopped, is (epsilon, delta)-differentially private, although noise, sample rate and number of steps
    were chosen from earlier outputs (see the module). With one order this is the filter of Feldman and Zrnic
    2021: go on while S_n(a) <= epsilon - ln((a-1)/a) + (ln delta + ln a)/(a-1). With several, a step is
    admitted while one order has budget left, and each order's budget is that of its share of delta.

    Orders, shares, epsilon and delta are fixed before the first step: changing them afterwards, also by
    restarting with other ones, voids the guarantee. `for_plan` chooses them from a plan.

    Attributes:
        epsilon: the budget.
        delta: probability in (0, 1) that all orders share.
        orders: Rényi orders.
        shares: of delta, one per order; none means equal shares.
        ledger: what was spent.

    Raises:
        ValueError: for an epsilon <= 0, or as in `RenyiOdometer`.

    >>> [RenyiFilter(2.0, 1e-5).admits(noise, 0.01, steps=100) for noise in (1.0, 0.5)]
    [True, False]
    """

    epsilon: float
    delta: float
    orders: tuple[float, ...] = ORDERS
    shares: tuple[float, ...] = ()
    ledger: Ledger = field(default_factory=Ledger)

    def __post_init__(self) -> None:
        if not (self.epsilon > 0 and math.isfinite(self.epsilon)):
            raise ValueError(f"epsilon must be a number > 0, got {self.epsilon}: choose e.g. 8")
        orders, shares = _checked(self.delta, tuple(self.orders), tuple(self.shares))
        object.__setattr__(self, "orders", orders)
        object.__setattr__(self, "shares", shares)

    @classmethod
    def for_plan(cls, epsilon: float, delta: float, plan: Ledger) -> "RenyiFilter":
        """An empty filter most of whose delta goes to the order at which the plan's epsilon is attained.

        A history near the plan then costs -ln(0.9)/(a-1) more than `epsilon` of it: 0.04 at order 4. The
        plan is not part of the guarantee; it must not depend on any output.
        """
        main = best_order(plan, delta)
        others = tuple(order for order in ORDERS if order != main)
        shares = (MAIN_SHARE, *((1 - MAIN_SHARE) / len(others),) * len(others))
        return cls(epsilon, delta, (main, *others), shares)

    @property
    def odometer(self) -> RenyiOdometer:
        """Reads what was spent."""
        return RenyiOdometer(self.delta, self.orders, self.shares, self.ledger)

    @property
    def remaining(self) -> dict[float, float]:
        """Rényi divergence left at each order that has any, in nats; empty when nothing is admitted."""
        spent = _summed(self.ledger.history, self.orders)
        left = self.epsilon - _conversions(self.orders, self.shares, self.delta) - spent
        return {order: float(rest) for order, rest in zip(self.orders, left, strict=True) if rest > 0}

    def admits(self, noise_multiplier: float, sample_rate: float, steps: int) -> bool:
        """Whether `steps` more steps with this noise keep within the budget.

        Raises:
            ValueError: for values that no step can have.
        """
        if steps == 0:
            return True
        check_step(noise_multiplier, sample_rate, steps)
        after = self.ledger.add(noise_multiplier, sample_rate, steps).history
        return _reading(after, self.orders, self.shares, self.delta) <= self.epsilon

    def spend(self, noise_multiplier: float, sample_rate: float, steps: int) -> "RenyiFilter":
        """The filter after `steps` more steps; call it before they are taken.

        Raises:
            BudgetExhaustedError: if the filter does not admit them; nothing is spent then.
        """
        if not self.admits(noise_multiplier, sample_rate, steps):
            reached = self.odometer.spend(noise_multiplier, sample_rate, steps).epsilon
            raise BudgetExhaustedError(
                f"{steps} more steps with noise multiplier {noise_multiplier:.4g} would raise epsilon from "
                f"{self.odometer.epsilon:.4g} to {reached:.4g}, above the budget of {self.epsilon:.4g} at "
                f"delta={self.delta:.1e}: take fewer steps or more noise"
            )
        return self.after(self.ledger.add(noise_multiplier, sample_rate, steps))

    def after(self, ledger: Ledger) -> "RenyiFilter":
        """The same filter with another history, such as one kept elsewhere."""
        return RenyiFilter(self.epsilon, self.delta, self.orders, self.shares, ledger)

    def to_lists(self) -> dict[str, Any]:
        """Everything as numbers and lists of numbers, as a Flower record can hold them."""
        return {"epsilon": self.epsilon, **self.odometer.to_lists()}

    @classmethod
    def from_lists(cls, lists: Mapping[str, Any]) -> "RenyiFilter":
        """The filter that `to_lists` wrote.

        Raises:
            ValueError: if something is missing or impossible.
        """
        epsilon, kept = float(_kept(lists, "epsilon")), RenyiOdometer.from_lists(lists)
        return cls(epsilon, kept.delta, kept.orders, kept.shares, kept.ledger)


@lru_cache(maxsize=1024)
def _checked(
    delta: float, given: tuple[float, ...], wanted: tuple[float, ...]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Orders and shares as floats, equal shares filled in; raises as the classes say."""
    check_delta(delta)
    orders = tuple(map(float, given))
    if not orders or len(set(orders)) < len(orders) or not all(order > 1 for order in orders):
        raise ValueError(f"orders are different numbers > 1, got {given}: choose e.g. {ORDERS[:4]}")
    shares = tuple(map(float, wanted)) or (1 / len(orders),) * len(orders)
    fits = len(shares) == len(orders) and all(share > 0 for share in shares)
    if not fits or math.fsum(shares) > 1 + 1e-12:
        raise ValueError(
            f"each order has a share > 0 of delta and they add up to at most 1, got {wanted} for "
            f"{len(orders)} orders: leave them out for equal shares"
        )
    return orders, shares


@lru_cache(maxsize=8192)
def _summed(history: tuple[Entry, ...], orders: tuple[float, ...]) -> Curve:
    total = np.zeros(len(orders))
    for noise_multiplier, sample_rate, steps in history:
        total += steps * rdp_curve(noise_multiplier, sample_rate, orders)
    total.setflags(write=False)
    return total


@lru_cache(maxsize=8192)
def _reading(
    history: tuple[Entry, ...], orders: tuple[float, ...], shares: tuple[float, ...], delta: float
) -> float:
    if not history:
        return 0.0
    return max(0.0, float(np.min(_summed(history, orders) + _conversions(orders, shares, delta))))


@lru_cache(maxsize=1024)
def _conversions(orders: tuple[float, ...], shares: tuple[float, ...], delta: float) -> Curve:
    made = np.array([conversion(a, w * delta) for a, w in zip(orders, shares, strict=True)])
    made.setflags(write=False)
    return made


def _kept(lists: Mapping[str, Any], name: str) -> Any:
    if name not in lists:
        raise ValueError(f"a kept filter or odometer has {name!r}, got {sorted(lists)}: it is damaged")
    return lists[name]
