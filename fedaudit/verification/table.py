"""Findings as a frame of all of them, and as a table of the least that must be read."""

from collections.abc import Sequence

import pandas as pd
from rich import box
from rich.markup import escape
from rich.table import Table

from fedaudit.claims import HOLDS, UNCHECKED, VIOLATED, Finding

COLUMNS = ["round", "client", "claim", "measured", "low", "high", "verdict", "observer", "reason"]
_STYLE = {HOLDS: "green", VIOLATED: "bold red", UNCHECKED: "yellow"}
_SHORT = {HOLDS: "holds", VIOLATED: "violated", UNCHECKED: "cannot be\nchecked"}


def findings_frame(findings: Sequence[Finding]) -> pd.DataFrame:
    """One row per finding; `client` is missing for the round as a whole."""
    rows = [
        (f.round, f.client_id, str(f.claim), f.measured, f.low, f.high, f.verdict, f.observer, f.reason)
        for f in findings
    ]
    frame = pd.DataFrame(rows, columns=COLUMNS)
    frame[["measured", "low", "high"]] = frame[["measured", "low", "high"]].astype("float64")
    return frame.astype({"client": "UInt64"})


def outcome(findings: Sequence[Finding]) -> dict[str, int]:
    """How many findings have each verdict."""
    keys = {"holds": HOLDS, "violated": VIOLATED, "unchecked": UNCHECKED}
    return {key: sum(f.verdict == verdict for f in findings) for key, verdict in keys.items()}


def findings_table(findings: Sequence[Finding]) -> Table:
    """One row per claim and verdict, the numbers being those of the first finding of its kind.

    Claims that differ from client to client in a number only (the noise follows from a client's number of
    examples) share a row if their first words agree.
    """
    counts = outcome(findings)
    title = f"{counts['violated']} violated, {counts['holds']} hold, {counts['unchecked']} cannot be checked"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("Claim and evidence", overflow="fold", ratio=1)
    for heading in ("Measured", "Interval", "Verdict", "Observer", "Rounds"):
        table.add_column(heading)
    groups: dict[tuple[str, str], list[Finding]] = {}
    for finding in findings:
        kind = f"{type(finding.claim).__name__}{getattr(finding.claim, 'between', '')}"
        place = str(getattr(finding.claim, "on", ""))
        groups.setdefault((f"{kind} {place}", finding.verdict), []).append(finding)
    order = (VIOLATED, UNCHECKED, HOLDS)
    for group in sorted(groups.values(), key=lambda group: order.index(group[0].verdict)):
        first = group[0]
        verdict = f"[{_STYLE[first.verdict]}]{_SHORT[first.verdict]}[/]"
        table.add_row(
            f"[bold]{escape(str(first.claim))}[/]\n{escape(_whose(first) + first.reason)}",
            _number(first.measured),
            _interval(first),
            verdict + (f"\n{len(group)} times" if len(group) > 1 else ""),
            first.observer,
            _rounds(group),
            end_section=True,
        )
    if not findings:
        table.add_row("Neither the defense nor the strategy claims anything that updates can show.")
    return table


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _interval(finding: Finding) -> str:
    if finding.low is None and finding.high is None:
        return ""
    if finding.low is None:
        return f"at most\n{_number(finding.high)}"
    if finding.high is None:
        return f"at least\n{_number(finding.low)}"
    return f"{_number(finding.low)} to\n{_number(finding.high)}"


def _whose(finding: Finding) -> str:
    return "" if finding.client_id is None else f"client {finding.client_id}: "


def _rounds(group: Sequence[Finding]) -> str:
    numbers = sorted({finding.round for finding in group})
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"
