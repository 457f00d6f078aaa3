"""What tests of claims found while the runs went on: a table, and the sentences that must not be missed."""

import math
from typing import Any

import pandas as pd

from fedaudit.claims import HOLDS, UNCHECKED, VIOLATED
from fedaudit.report.display import count, listing, number
from fedaudit.report.evidence import Runs, gather
from fedaudit.report.seeds import parse_extras

VERDICTS = {"violated": VIOLATED, "skipped": UNCHECKED, "ok": HOLDS}
MEANING = (
    "Every audited round was tested against what the run's defense and strategy claim. “Holds” means that a "
    "violation of a stated size would have been noticed and was not: evidence, not a proof. All tests of an "
    "honest round together raise a false alarm in at most one round of a thousand. “Cannot be checked by "
    "this observer” is no verdict on the defense; the reason names who could tell. Numbers and evidence are "
    "those of the first finding of a kind."
)


def claims_table(runs: Runs) -> pd.DataFrame:
    """One row per defense, kind of claim, observer and verdict; of each defense what is violated first.

    Columns "defense", "claim" and "evidence" (of the first finding), "verdict", "measured", "low", "high",
    "observer", "findings" (how many), "clients" and "first" (ids of a few), "rounds" (from-to).
    """
    evidence = gather(runs)
    if not len(evidence.tested):
        return pd.DataFrame(columns=_COLUMNS)
    tested = evidence.tested.sort_values(["round", "client_id"], kind="stable", na_position="first")
    texts = parse_extras(tested["extra"])
    places = {name: place for place, name in enumerate(evidence.defenses)}
    order = {status: place for place, status in enumerate(VERDICTS)}
    rows: list[dict[str, Any]] = []
    claims = tested["extra"].map({text: str(content.get("claim", "")) for text, content in texts.items()})
    # claims that differ from client to client in a number only are of one kind
    kinds = claims.str.replace(_NUMBER, "#", regex=True)
    groups = tested.assign(claim=claims, claim_kind=kinds).groupby(
        ["defense", "claim_kind", "observer", "status"], sort=False
    )
    for (defense, _, observer, status), part in groups:
        if status not in VERDICTS:
            continue
        first = part.iloc[0]
        clients = sorted(part["client_id"].dropna().unique())
        low, high = int(part["round"].min()), int(part["round"].max())
        rows.append(
            {
                "defense": str(defense),
                "claim": str(first["claim"]),
                "evidence": _whose(first["client_id"]) + str(first["reason"]),
                "verdict": VERDICTS[str(status)],
                **{name: float(pd.to_numeric(first[key])) for name, key in _NUMBERS.items()},
                "observer": str(observer),
                "findings": len(part),
                "clients": len(clients),
                "first": listing([str(client) for client in clients], 5),
                "rounds": str(low) if low == high else f"{low}–{high}",
                "place": (places.get(str(defense), len(places)), order[str(status)]),
            }
        )
    rows.sort(key=lambda row: row["place"])
    return pd.DataFrame(rows, columns=_COLUMNS)


_NUMBER = r"\d[\d.e+-]*"
_NUMBERS = {"measured": "value", "low": "low", "high": "high"}
_COLUMNS = [
    *("defense", "claim", "evidence", "verdict", *_NUMBERS, "observer", "findings", "clients"),
    *("first", "rounds"),
]


def sentences(runs: Runs) -> list[str]:
    """What a reader must hear first: claims that are violated; else that none was. Empty without tests."""
    table = claims_table(runs)
    found = []
    for defense, part in table.groupby("defense", sort=False):
        violated = part[part["verdict"] == VIOLATED]
        for _, row in violated.iterrows():
            where = _found(int(row["findings"]), row["rounds"], "")
            found.append(
                f"CLAIM VIOLATED under {defense}: {row['claim']}. {_capital(row['evidence'])} "
                f"({where}; observer: {row['observer']})."
            )
        if not len(violated):
            kept = int(part.loc[part["verdict"] == HOLDS, "findings"].sum())
            unseen = int(part.loc[part["verdict"] == UNCHECKED, "findings"].sum())
            found.append(
                f"No claim of {defense} was found violated: {count(kept, 'test')} passed, {unseen} could not "
                "be made by this observer."
            )
    return found


def shown(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of one defense for people: claim, verdict, evidence, numbers as text."""
    numbers = zip(table["low"], table["high"], strict=True)
    found = zip(table["findings"], table["rounds"], table["first"], strict=True)
    return pd.DataFrame(
        {
            "Claim": table["claim"],
            "Verdict": table["verdict"],
            "Evidence": table["evidence"],
            "Measured": [_number(value) for value in table["measured"]],
            "Interval": [_ends(low, high) for low, high in numbers],
            "Observer": table["observer"],
            "Findings": [_found(int(n), rounds, clients) for n, rounds, clients in found],
        }
    )


def totals(table: pd.DataFrame) -> str:
    """How many findings have each verdict."""
    counts = table.groupby("verdict")["findings"].sum()
    return ", ".join(f"{int(counts[name]):,} {word}" for name, word in _WORDS.items() if name in counts)


_WORDS = {VIOLATED: "violated", HOLDS: "hold", UNCHECKED: "cannot be checked by this observer"}


def _found(findings: int, rounds: str, clients: str) -> str:
    where = f"round {rounds}" if "–" not in rounds else f"rounds {rounds}"
    whose = f", clients {clients}" if "," in clients else f", client {clients}" if clients else ""
    return f"{findings:,} in {where}{whose}"


def _ends(low: float, high: float) -> str:
    if math.isnan(low):
        return "" if math.isnan(high) else f"allowed: {number(high)}"
    return f"at least {number(low)}" if math.isnan(high) else f"{number(low)} to {number(high)}"


def _number(value: float) -> str:
    return "" if math.isnan(value) else number(value)


def _whose(client: Any) -> str:
    return "" if pd.isna(client) else f"client {client}: "


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
