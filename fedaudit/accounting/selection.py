"""What choosing the best of several private trainings costs, beside the trainings themselves.

Each trial is a run of one mechanism Q (draw a setting, train, score) with Rényi divergences eps(a). Releasing
the best of a number K of trials that is FIXED in advance may cost nearly K times as much as one. A random K,
drawn without looking at data and kept secret, costs little more (Papernot, Steinke 2021, arXiv 2110.03620):

    K ~ Poisson(m):  eps'(a) = eps(a) + m d + ln(m) / (a - 1)                                    (theorem 6)
    K ~ Geometric:   eps'(a) = eps(a) + 2 (1 - 1/b) eps(b) + 2 ln(m) / b + ln(m) / (a - 1)       (theorem 2)

with m = E[K], Q (ln(1 + 1/(a - 1)), d)-DP and any order b. A Poisson K may be 0, and then the release must
not depend on data. The score must be part of Q: one on data that nobody protects is outside every guarantee.
"""

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

from fedaudit.accounting.ledger import Ledger
from fedaudit.accounting.renyi import Curve, conversion, orders, rdp_curve

Search = Literal["all released", "poisson", "geometric"]


def poisson_selection(curve: Curve, at: Sequence[float], mean: float) -> Curve:
    """Rényi divergences of the best of K ~ Poisson(mean) trials.

    Args:
        curve: divergences of one trial, in nats, at the orders `at`.
        at: orders > 1.
        mean: expected number of trials, > 0.
    """
    _check_mean(mean)
    a = np.asarray(at, dtype=np.float64)
    allowed = np.log1p(1 / (a - 1))
    # ln delta of one trial at each epsilon allowed: the smallest over orders (Balle et al. 2020)
    log_delta = (a - 1) * (curve + np.log((a - 1) / a) - allowed[:, None]) - np.log(a)
    raised: Curve = curve + mean * np.exp(np.minimum(log_delta.min(axis=1), 0.0)) + math.log(mean) / (a - 1)
    return raised


def geometric_selection(curve: Curve, at: Sequence[float], mean: float) -> Curve:
    """Rényi divergences of the best of K trials, K geometric from 1 on with this mean.

    Args:
        curve: divergences of one trial, in nats, at the orders `at`.
        at: orders > 1.
        mean: expected number of trials, >= 1.
    """
    _check_mean(mean, least=1.0)
    a = np.asarray(at, dtype=np.float64)
    beside = float((2 * (1 - 1 / a) * curve + 2 * math.log(mean) / a).min())
    raised: Curve = curve + beside + math.log(mean) / (a - 1)
    return raised


def search_epsilon(trials: Sequence[Ledger], delta: float, search: Search) -> float:
    """Epsilon at delta of a search over settings, in nats, by Rényi accounting.

    A trial draws one of the settings; it is accounted for by the largest divergence among them, so that which
    one was drawn does not matter. "all released" composes every trial: what a fixed list of trials costs if
    nothing is assumed of the choice. The other two are the best of a random number of trials with as many
    expected as there are settings.

    Args:
        trials: what each setting's trial spends, one ledger each.
        delta: failure probability.
        search: how the number of trials came about.

    Raises:
        ValueError: if there is no trial or delta is outside (0, 1).

    >>> one = Ledger().add(1.0, 0.01, 1000)
    >>> [round(search_epsilon([one] * 10, 1e-5, kind), 2) for kind in ("poisson", "geometric")]
    [4.33, 4.1]
    """
    if not trials or not 0 < delta < 1:
        raise ValueError(
            f"a search has at least one trial and 0 < delta < 1, got {len(trials)} trials and "
            f"delta={delta}: give both"
        )
    curves = np.stack([_curve(ledger) for ledger in trials])
    if search == "all released":
        total = curves.sum(axis=0)
    else:
        chosen = poisson_selection if search == "poisson" else geometric_selection
        total = chosen(curves.max(axis=0), orders(), float(len(trials)))
    shift = np.array([conversion(order, delta) for order in orders()])
    return max(0.0, float((total + shift).min()))


def _curve(ledger: Ledger) -> Curve:
    parts = [steps * rdp_curve(noise, rate, orders()) for noise, rate, steps in ledger.history]
    return np.sum(parts, axis=0) if parts else np.zeros(len(orders()))


def _check_mean(mean: float, least: float = 0.0) -> None:
    if not (mean > 0 and mean >= least and math.isfinite(mean)):
        raise ValueError(
            f"an expected number of trials is a number > 0 and >= {least:g}, got {mean}: give one"
        )
