"""When a round is measured, and one measure on one round's updates."""

import logging
import time
from collections.abc import Sequence

from fedaudit.audit.rows import Finding
from fedaudit.needs import missing
from fedaudit.types import ClientUpdate, Measure, Observer, RoundContext, Skip

logger = logging.getLogger(__name__)


def is_due(round_number: int, every: int, last_round: int) -> bool:
    """Whether a round is measured: every `every` rounds, the first and the last always.

    >>> [number for number in range(1, 9) if is_due(number, 5, 8)]
    [1, 5, 8]
    """
    return round_number in (1, last_round) or round_number % every == 0


def run_measure(
    measure: Measure, observer: Observer, updates: Sequence[ClientUpdate], ctx: RoundContext
) -> tuple[list[Finding], float]:
    """One finding per update (or exactly one for a round-wise measure), and the seconds they took."""
    count = len(updates) if measure.scope == "client" else 1
    lacking = missing(measure.needs(observer), ctx.known, ctx.summed)
    if lacking:
        return [Skip(lacking)] * count, 0.0
    started = time.perf_counter()
    try:
        findings: list[Finding] = list(measure(updates, ctx))
        if len(findings) != count:
            raise RuntimeError(f"{measure.name} returned {len(findings)} estimates for {count}")
    except Exception as error:
        logger.warning("measure %s failed: %s", measure.name, error)
        findings = [error] * count
    return findings, time.perf_counter() - started
