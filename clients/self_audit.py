"""What a client measures about itself: scalars only, and only if the observer "client" is enabled."""

import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import lru_cache

from torch import Tensor

from fedaudit.audit.auditor import Auditor
from fedaudit.audit.measuring import is_due, run_measure
from fedaudit.audit.rows import Finding
from fedaudit.federation.setup import Setup
from fedaudit.training.censorship import findings
from fedaudit.types import ClientUpdate, Guarantee, Measure


def self_audit(
    made: Setup,
    client: int,
    round_number: int,
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    guarantee: Guarantee | None,
    stated: Mapping[str, float],
) -> Iterator[tuple[str, Finding, float]]:
    """Name, finding and seconds of each measure a client may compute on its own examples.

    `stated` is what the client reports of this round's release, where that differs between rounds.
    """
    audit = made.config.audit
    if "client" not in audit.observer_names:
        return
    if not is_due(round_number, audit.every, made.config.federation.rounds):
        return
    delta = {name: after[name] - sent for name, sent in before.items() if sent.is_floating_point()}
    update = ClientUpdate(client, round_number, before, delta, made.num_examples(client), stated)
    ctx = replace(
        made.context(round_number),
        observer="client",
        evidence=made.evidence,
        guarantee=lambda _update: guarantee,
        reference=None,
        num_updates=1,
    )
    for measure in _measures(audit.measures):
        found, seconds = run_measure(measure, "client", [update], ctx)
        yield measure.name, found[0], seconds
    yield from _removal(made, client, before)


def _removal(made: Setup, client: int, before: Mapping[str, Tensor]) -> Iterator[tuple[str, Finding, float]]:
    """How unique the examples are that the client left out and those it kept, if it leaves any out."""
    started = time.perf_counter()
    try:
        found = made.peeled(client, before)
    except ValueError as error:
        yield "censored-examples", error, time.perf_counter() - started
        return
    if found is not None:
        rows = findings(found)
        seconds = (time.perf_counter() - started) / len(rows)
        yield from ((name, estimate, seconds) for name, estimate in rows.items())


@lru_cache(maxsize=2)
def _measures(specs: str) -> tuple[Measure, ...]:
    return tuple(measure for measure in Auditor(None, specs).measures if "client" in measure.observers)
