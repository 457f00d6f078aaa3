"""The auditor: which measures and attacks run on a round's updates, and the rows that come of it.

A measure runs where its needs are known; otherwise it becomes a skipped row with the reason. An exception
becomes a failed row and the federation goes on; `strict` turns either into an error.
"""

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from fedaudit import claims
from fedaudit.audit.attacking import run_attack
from fedaudit.audit.measuring import is_due, run_measure
from fedaudit.audit.rows import AuditRows, ClientFinding, Finding, Rejection
from fedaudit.audit.secure_sum import context_of_sum
from fedaudit.config.attack_trigger import Trigger
from fedaudit.errors import ConfigError, RunFailedError
from fedaudit.kept_files import save_update
from fedaudit.progress import announce
from fedaudit.records import AuditLog, AuditRecord
from fedaudit.registry import ATTACKS, MEASURES
from fedaudit.spec import parse_specs
from fedaudit.types import (
    Attack,
    ClientUpdate,
    Guarantee,
    Measure,
    Observer,
    Oracle,
    RoundContext,
    Skip,
)
from fedaudit.verification.live import Claimed, LiveVerifier

logger = logging.getLogger(__name__)
ALWAYS_ON = "cohort-gradient-uniqueness, update-norm, update-cosine"


class Auditor:
    """Measures, attacks and records of one run.

    Args:
        output: the run's folder; None keeps records in memory only.
        measures: spec list of measures.
        context: what the server knows: a RoundContext, or a function of the round that returns one.
        observers: who measures; "client" admits what clients report, "oracle" needs `oracle`.
        oracle: looks at the clients' data; simulation only.
        attacks: spec list of attacks.
        attack_rounds: rounds whose updates are attacked.
        attack_clients: how many clients of such a round, lowest ids first.
        attack_trigger: "quantity > number" or "quantity < number": in any audited round the clients for whom
            it holds are attacked too, at most `attack_clients` of them, most extreme first; empty is none.
        defense: the defense in force, for the records.
        every: audit every this many rounds; the first and `last_round` always.
        last_round: the federation's last round; 0 if unknown.
        strict: raise on a skipped or failed measure, and on a violated claim, instead of recording it alone.
        save_images: keep originals and reconstructions of attacks under `output`/attacks.
        lpips: score reconstructions by LPIPS too; skipped where its weights are not on this machine.
        save_updates: keep the updates of audited rounds under `output`/updates as safetensors.
        verify: what updates and aggregates are claimed to keep, tested in every audited round: claims of
            every round (`fedaudit.claims`, `fedaudit.verification.derive`), a function of the round's number
            that returns them, or a `LiveVerifier`; none by default. Findings are rows "verify.*".

    Raises:
        ConfigError: if a spec does not name a registered part or has a wrong option.
        RunFailedError: in a strict audit, when a measure or attack was skipped or failed or a claim violated.
    """

    def __init__(
        self,
        output: str | Path | None = None,
        measures: str = ALWAYS_ON,
        *,
        context: RoundContext | Callable[[int], RoundContext] | None = None,
        observers: Sequence[Observer] = ("server",),
        oracle: Oracle | None = None,
        attacks: str = "",
        attack_rounds: Sequence[int] = (1,),
        attack_clients: int = 1,
        attack_trigger: str = "",
        defense: str = "unknown",
        every: int = 1,
        last_round: int = 0,
        strict: bool = False,
        save_images: bool = False,
        save_updates: bool = False,
        verify: Claimed | LiveVerifier | None = None,
        lpips: bool = False,
    ) -> None:
        self.log = AuditLog(output) if output is not None else None
        self.run_id = self.log.run_id if self.log else "memory"
        self.measures: list[Measure] = [MEASURES.build(spec) for spec in parse_specs(measures)]
        names = [measure.name for measure in self.measures]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ConfigError(f"a measure is listed once, got {twice} more than once: give its options once")
        self.attacks: list[Attack] = [ATTACKS.build(spec) for spec in parse_specs(attacks)]
        self._context = context if callable(context) else lambda _round: context or RoundContext(0)
        self.observers = tuple(observers)
        self.oracle = oracle
        self.attack_rounds = frozenset(attack_rounds)
        self.attack_clients = attack_clients
        self.trigger = Trigger.parse(attack_trigger) if attack_trigger else None
        self.defense = defense
        self.every = every
        self.last_round = last_round
        self.strict = strict
        self.save_images = save_images
        self.save_updates = save_updates
        self.verifier = (
            verify if isinstance(verify, LiveVerifier) else LiveVerifier(verify) if verify else None
        )
        self.lpips = lpips
        self._guarantees: Mapping[int, Guarantee] = {}
        self._round = 0
        self._held = self._unwritten = False
        self.current: list[AuditRecord] = []

    @property
    def measure_names(self) -> tuple[str, ...]:
        """Names of the measures."""
        return tuple(measure.name for measure in self.measures)

    def due(self, round_number: int) -> bool:
        """Whether this round is measured."""
        return is_due(round_number, self.every, self.last_round)

    def audit(
        self,
        round_number: int,
        updates: Sequence[ClientUpdate],
        rejected: Sequence[Rejection] = (),
        findings: Sequence[ClientFinding] = (),
        guarantees: Mapping[int, Guarantee] | None = None,
        behind: Sequence[ClientUpdate] = (),
    ) -> list[AuditRecord]:
        """Measure and attack one round's updates, write the rows, and return them.

        Args:
            round_number: from 1.
            updates: what the server sees: single updates, or one that is their sum.
            rejected: replies that were not usable.
            findings: what clients measured about themselves.
            guarantees: what each client states, by client id.
            behind: the single updates behind a sum, which an oracle sees and the server does not.
        """
        self._start(round_number)
        ordered = sorted(updates, key=lambda update: update.client_id)
        self._guarantees = dict(guarantees or {})
        rows = AuditRows(self.run_id, round_number, self.defense, self._guarantees)
        for rejection in rejected:
            rows.reject(rejection)
        single = sorted(behind, key=lambda update: update.client_id) or ordered
        for update in single:
            rows.reported(update)
        if self.due(round_number) and ordered:
            self._measure(ordered, single, rows)
            for found in findings:
                rows.client_finding(found, self._unit(found.measure))
        if self.save_updates and self.log and self.due(round_number):
            for update in ordered:
                save_update(self.log.folder / "updates", update)
        for attack in self.attacks:
            self._attack(attack, self._attacked(round_number, ordered, rows), rows)
        self.add(round_number, rows.records)
        bad = [row for row in rows.records if row.status in ("skipped", "failed")]
        if self.strict and bad:
            raise RunFailedError(
                f"a strict audit stops on what it cannot measure, got {bad[0].quantity} {bad[0].status} "
                f"in round {round_number}: {bad[0].reason}"
            )
        return rows.records

    def check_claims(
        self,
        round_number: int,
        updates: Sequence[ClientUpdate],
        *,
        broadcast: Mapping[str, Tensor] | None = None,
        aggregate: Mapping[str, Tensor] | None = None,
        clip_norms: tuple[float, float] | None = None,
    ) -> list[claims.Finding]:
        """Test what is claimed of a round that `audit` has seen; one row per finding is added to it.

        A violated claim is announced by a warning. Whatever goes wrong becomes a failed row.

        Args:
            round_number: server round.
            updates: what was received.
            broadcast: the weights that were sent; the first update's `before` if left out.
            aggregate: the weights after the round; None if unknown.
            clip_norms: clip norm applied in this round and the one of the next, where a server changes it.

        Returns:
            The findings; none without claims, without updates, or in a round that is not audited.

        Raises:
            RunFailedError: in a strict audit, if a claim is violated or could not be tested for an error.
        """
        if self.verifier is None or not updates:
            return []
        ordered = sorted(updates, key=lambda update: update.client_id)
        rows = AuditRows(self.run_id, round_number, self.defense, dict(self._guarantees))
        found: list[claims.Finding] = []
        started = time.perf_counter()
        try:
            self.verifier.hear(ordered, self._guarantees)
            if self.due(round_number):
                found = self.verifier.check(ordered, aggregate, broadcast, clip_norms)
        except Exception as error:
            logger.warning("the claims of round %d could not be tested: %s", round_number, error)
            rows.add("verify", "1", self.verifier.observer, error, time.perf_counter() - started, None)
        seconds = (time.perf_counter() - started) / max(1, len(found))
        nodes: dict[int | None, int] = {update.client_id: update.node_id for update in ordered}
        for finding in found:
            rows.claim(finding, nodes.get(finding.client_id), seconds)
        self._warn(found)
        self.add(round_number, rows.records)
        bad = next((row for row in rows.records if row.status in ("violated", "failed")), None)
        if self.strict and bad is not None:
            raise RunFailedError(
                f"a strict audit stops on a claim that does not hold, got {bad.quantity} {bad.status} "
                f"in round {round_number}: {bad.reason}"
            )
        return found

    def _warn(self, found: Sequence[claims.Finding]) -> None:
        """One line for every kind of claim that is violated in a round."""
        violated: dict[str, list[claims.Finding]] = {}
        for finding in found:
            if finding.verdict == claims.VIOLATED:
                violated.setdefault(claims.quantity_of(finding.claim), []).append(finding)
        for findings in violated.values():
            more = f", and {len(findings) - 1} more findings" if len(findings) > 1 else ""
            logger.warning("claim violated %s%s", findings[0], more)

    def add(self, round_number: int, records: Sequence[AuditRecord]) -> None:
        """Append rows to a round and write its file again, unless files are held."""
        self._start(round_number)
        self.current.extend(records)
        self._unwritten = True
        if not self._held:
            self.flush()

    def flush(self) -> None:
        """Write the current round's file if it lacks rows."""
        if self._unwritten and self.log:
            self.log.write_round(self._round, self.current)
        self._unwritten = False

    @contextmanager
    def held(self) -> Iterator[None]:
        """Inside the block a round's file is written by `flush`, by the next round and at the block's end.

        For a caller that adds several rows to a round and knows when it is complete: without the block every
        addition writes the file. The end of the block writes after an error, too.
        """
        self._held = True
        try:
            yield
        finally:
            self._held = False
            self.flush()

    def note(
        self,
        round_number: int,
        quantity: str,
        value: float,
        unit: str,
        kind: str = "exact",
        extra: Mapping[str, float] | None = None,
    ) -> None:
        """Append one quantity of the whole round, such as accuracy."""
        row = AuditRecord(
            self.run_id, round_number, None, quantity, value, unit, kind, "server", self.defense
        )
        self.add(round_number, [replace(row, extra=json.dumps(extra)) if extra else row])

    def _start(self, round_number: int) -> None:
        if round_number != self._round:
            self.flush()
            self._round, self.current = round_number, []

    def _unit(self, name: str) -> str:
        return next((measure.unit for measure in self.measures if measure.name == name), "1")

    def _contexts(self, updates: Sequence[ClientUpdate]) -> dict[Observer, RoundContext]:
        round_number = updates[0].round
        server = replace(
            self._context(round_number),
            round=round_number,
            observer="server",
            evidence=None,
            guarantee=lambda update: self._guarantees.get(update.client_id),
            num_updates=len(updates),
            shared={},
        )
        contexts: dict[Observer, RoundContext] = {"server": server}
        if updates[0].summed:
            contexts["server"] = context_of_sum(server, updates[0])
        elif "oracle" in self.observers and self.oracle is not None:
            contexts["oracle"] = replace(server, observer="oracle", evidence=self.oracle.evidence)
        return contexts

    def _measure(self, seen: Sequence[ClientUpdate], single: Sequence[ClientUpdate], rows: AuditRows) -> None:
        """The server measures what it sees, the oracle every single update, or how well the server does."""
        contexts = self._contexts(seen)
        if single is not seen:
            contexts = self._contexts(single) | contexts
        jobs = [
            (measure, observer)
            for measure in self.measures
            for observer in ("server", "oracle")
            if observer in measure.observers and observer in self.observers
        ]
        for number, (measure, observer) in enumerate(jobs, 1):
            updates, ctx = single, contexts.get(observer)
            if observer == "server" or getattr(measure, "of_server_view", False):
                updates = seen
            if updates[0].summed and ctx is not None and self.oracle is not None and observer == "oracle":
                ctx = replace(contexts["server"], observer="oracle", evidence=self.oracle.evidence)
            if ctx is None:
                findings: list[Finding] = [Skip("needs an oracle, which exists in simulation only")] * len(
                    updates
                )
                seconds = 0.0
            else:
                findings, seconds = run_measure(measure, observer, updates, ctx)
            targets: Sequence[ClientUpdate | None] = updates if measure.scope == "client" else [None]
            for update, finding in zip(targets, findings, strict=False):
                rows.add(
                    measure.name, measure.unit, observer, finding, seconds / max(len(targets), 1), update
                )
            announce("audit", number, len(jobs) + len(self.attacks), seen[0].round, name=measure.name)

    def _attacked(
        self, round_number: int, updates: Sequence[ClientUpdate], rows: AuditRows
    ) -> Sequence[ClientUpdate]:
        """The updates of this round that are attacked: by plan, or because a measure asks for it."""
        planned = updates[: self.attack_clients] if round_number in self.attack_rounds else ()
        if self.trigger is None:
            return planned
        asked = self.trigger.clients(rows.records)[: self.attack_clients]
        return [*planned, *(u for u in updates if u.client_id in asked and u not in planned)]

    def _attack(self, attack: Attack, updates: Sequence[ClientUpdate], rows: AuditRows) -> None:
        if not updates:
            return
        images = self.log.folder / "attacks" if self.save_images and self.log else None
        ctx = self._contexts(updates)["server"]
        run_attack(attack, updates, ctx, rows, oracle=self.oracle, images=images, lpips=self.lpips)
