"""What a client measures about itself: scalars only, and only if the observer "client" is enabled."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import lru_cache

from flwr.app import ArrayRecord
from torch import Tensor

from fedaudit.app import Setup
from fedaudit.audit_rows import Finding
from fedaudit.auditor import Auditor, is_due, run_measure
from fedaudit.flower.arrays import to_state_dict
from fedaudit.types import ClientUpdate, Guarantee, Measure


def self_audit(
    made: Setup,
    client: int,
    round_number: int,
    arrays: ArrayRecord,
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
    before = to_state_dict(arrays)
    delta = {name: after[name] - sent for name, sent in before.items() if sent.is_floating_point()}
    update = ClientUpdate(client, round_number, before, delta, len(made.partitions[client]), stated)
    ctx = replace(
        made.context(round_number),
        observer="client",
        evidence=made.evidence,
        guarantee=lambda _update: guarantee,
        reference=None,
        num_updates=1,
    )
    for measure in _measures(audit.measures):
        findings, seconds = run_measure(measure, "client", [update], ctx)
        yield measure.name, findings[0], seconds


@lru_cache(maxsize=2)
def _measures(specs: str) -> tuple[Measure, ...]:
    return tuple(measure for measure in Auditor(None, specs).measures if "client" in measure.observers)
