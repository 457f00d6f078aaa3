"""The rows that come of one round's findings: what a measure, a client or the server's checks say, flat."""

import json
from dataclasses import dataclass, replace
from typing import Any

from fedaudit import claims
from fedaudit.records import AuditRecord, Status
from fedaudit.types import NOISE_MULTIPLIER, STATED, ClientUpdate, Estimate, Guarantee, Skip, StepRelease

Finding = Estimate | Skip | Exception
_VERDICTS: dict[claims.Verdict, Status] = {
    claims.HOLDS: "ok",
    claims.VIOLATED: "violated",
    claims.UNCHECKED: "skipped",
}


@dataclass(frozen=True)
class Rejection:
    """A client's reply that was not usable, and why."""

    client_id: int
    node_id: int
    reason: str


@dataclass(frozen=True)
class ClientFinding:
    """What a client measured about itself and reported."""

    client_id: int
    node_id: int
    measure: str
    finding: Finding
    seconds: float


class AuditRows:
    """Collects the rows of one round; every row of a client carries the client's epsilon."""

    def __init__(
        self, run_id: str, round_number: int, defense: str, guarantees: dict[int, Guarantee]
    ) -> None:
        self.run_id, self.round, self.defense, self.guarantees = run_id, round_number, defense, guarantees
        self.records: list[AuditRecord] = []

    def _row(self, client: int | None, node: int | None, quantity: str, unit: str, **values: Any) -> None:
        privacy: dict[str, Any] = {}
        guarantee = self.guarantees.get(client) if client is not None else None
        if guarantee is not None:
            privacy = {
                "epsilon": guarantee.epsilon,
                "delta": guarantee.delta,
                "privacy_unit": guarantee.unit,
                "accountant": guarantee.accountant,
            }
        base = {"kind": "exact", "value": None, "observer": "server"} | values
        self.records.append(
            AuditRecord(
                run_id=self.run_id,
                round=self.round,
                client_id=client,
                node_id=node,
                quantity=quantity,
                unit=unit,
                defense=self.defense,
                **base,
                **privacy,
            )
        )

    def reject(self, rejection: Rejection) -> None:
        """A reply that was not used."""
        self._row(
            rejection.client_id, rejection.node_id, "update", "1", status="rejected", reason=rejection.reason
        )

    def reported(self, update: ClientUpdate) -> None:
        """What a client reports with its update: its loss, its epsilon, and its noise where that changes."""
        if "train-loss" in update.reported:
            loss = update.reported["train-loss"]
            self._row(update.client_id, update.node_id, "train-loss", "nats", value=loss, observer="client")
        guarantee = self.guarantees.get(update.client_id)
        if guarantee is not None:
            self._row(
                update.client_id,
                update.node_id,
                "epsilon",
                "1",
                value=guarantee.epsilon,
                kind="upper",
                observer="client",
            )
        release = StepRelease.stated(update.reported)
        if release is not None and release.clip_norm:
            said = {name: update.reported[name] for name in (*STATED, "steps") if name in update.reported}
            self._row(
                update.client_id,
                update.node_id,
                NOISE_MULTIPLIER,
                "1",
                value=release.noise_std / release.clip_norm,
                observer="client",
                extra=json.dumps(said, sort_keys=True),
            )

    def claim(self, found: claims.Finding, node: int | None, seconds: float) -> None:
        """What a test of a claim found: violated, skipped where the observer cannot check it, else ok."""
        self._row(
            found.client_id,
            node,
            claims.quantity_of(found.claim),
            "1",
            value=found.measured,
            kind="exact" if found.low is None else "estimate",
            low=found.low,
            high=found.high,
            observer=found.observer,
            status=_VERDICTS[found.verdict],
            reason=found.reason,
            extra=json.dumps({"claim": str(found.claim), "verdict": found.verdict}),
            seconds=seconds,
        )

    def client_finding(self, found: ClientFinding, unit: str) -> None:
        """What a client measured about itself."""
        self._finding(
            found.client_id, found.node_id, found.measure, unit, "client", found.finding, found.seconds
        )

    def add(
        self,
        quantity: str,
        unit: str,
        observer: str,
        finding: Finding,
        seconds: float,
        update: ClientUpdate | None,
    ) -> None:
        """What the server or the oracle measured; what it measured on a sum belongs to no client."""
        client, node = (update.client_id, update.node_id) if update is not None else (None, None)
        if update is not None and update.summed:
            client = node = None
            if isinstance(finding, Estimate):
                finding = replace(finding, extra={**finding.extra, "sum-of-clients": len(update.summed)})
        self._finding(client, node, quantity, unit, observer, finding, seconds)

    def _finding(
        self,
        client: int | None,
        node: int | None,
        quantity: str,
        unit: str,
        observer: str,
        finding: Finding,
        seconds: float,
    ) -> None:
        common: dict[str, Any] = {"observer": observer, "seconds": seconds}
        if isinstance(finding, Estimate):
            self._row(
                client,
                node,
                quantity,
                finding.unit,
                value=float(finding.value),
                kind=finding.kind,
                low=finding.low,
                high=finding.high,
                extra=json.dumps(dict(finding.extra), sort_keys=True),
                **common,
            )
            for layer, value in finding.layers.items():
                self._row(
                    client,
                    node,
                    f"{quantity}.layer",
                    finding.unit,
                    value=float(value),
                    kind=finding.kind,
                    observer=observer,
                    layer=layer,
                )
            return
        status: Status = "skipped" if isinstance(finding, Skip) else "failed"
        reason = finding.reason if isinstance(finding, Skip) else f"{type(finding).__name__}: {finding}"
        self._row(client, node, quantity, unit, status=status, reason=reason, **common)
