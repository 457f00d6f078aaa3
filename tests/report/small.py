"""Runs of a few hand-written rows."""

from collections.abc import Mapping
from pathlib import Path

from fedaudit.records import AuditLog, AuditRecord, Run, load_run, write_json, write_text
from tests.report.fabricate import record, toml


def write_run(
    folder: Path,
    name: str,
    defense: str,
    seed: int,
    rows: list[AuditRecord],
    ended: bool = True,
    config: Mapping[str, object] | None = None,
) -> Run:
    """A run folder with these rows, one file per round."""
    log = AuditLog(folder / name)
    for r in sorted({row.round for row in rows}):
        log.write_round(r, [row for row in rows if row.round == r])
    write_text(
        folder / name / "run.toml", toml({"config": config or {}, "run": {"seed": seed, "defense": defense}})
    )
    if ended:
        write_json(folder / name / "summary.json", {"rounds": 1})
    return load_run(folder / name)


def accuracy_run(folder: Path, defense: str, seed: int, value: float, **more: float) -> Run:
    """A run that reached this accuracy; further keywords are server quantities of client 0 in round 1."""
    name = f"{defense}-{seed}"
    rows = [record(name, defense, 0, "accuracy", 0.1), record(name, defense, 1, "accuracy", value)]
    for quantity, number in more.items():
        rows.append(record(name, defense, 1, quantity.replace("_", "-"), number, client_id=0))
    return write_run(folder, name, defense, seed, rows)
