"""Audit records on disk: one flat row per number, one parquet file per round, one folder per run.

    runs/<run>/run.toml              configuration, versions, seed, git revision
    runs/<run>/audit/round-00001.parquet
    runs/<run>/summary.json          written when the run ends
    runs/<run>/checkpoint/           what a resumed run needs (global weights, strategy and client state)
    runs/<run>/attacks/              reconstructions, only if attack.save-images is set

Every file is written under a temporary name and renamed, so a reader never sees half a file.
"""

import json
import math
import os
import tomllib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fedaudit.errors import RecordError

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

SCHEMA_VERSION = 1
Status = Literal["ok", "skipped", "failed", "rejected"]


@dataclass(frozen=True)
class AuditRecord:
    """One number (or the reason why there is none).

    Attributes:
        run_id: name of the run's folder.
        round: server round; 0 is before training.
        client_id: partition or node; None for a quantity of the whole round.
        node_id: the node that replied; None for a quantity of the whole round.
        quantity: what was measured, e.g. "update-norm", "accuracy", "dlg.psnr", "epsilon".
        value: the number; None unless status is "ok".
        unit: unit of value, low and high.
        kind: exact, estimate, lower or upper.
        low: lower end of an interval.
        high: upper end of an interval.
        observer: server, client or oracle: who could have computed it.
        defense: the defense in force.
        epsilon: the client's example-level epsilon after this round, if there is a guarantee.
        delta: the delta epsilon is stated at.
        privacy_unit: "example" or "client".
        accountant: how epsilon was composed.
        seconds: time the number cost.
        status: ok, skipped, failed or rejected.
        reason: why, unless ok.
        extra: settings and side results as JSON.
    """

    run_id: str
    round: int
    client_id: int | None
    quantity: str
    value: float | None
    unit: str
    kind: str
    observer: str
    defense: str
    node_id: int | None = None
    low: float | None = None
    high: float | None = None
    epsilon: float | None = None
    delta: float | None = None
    privacy_unit: str | None = None
    accountant: str | None = None
    seconds: float = 0.0
    status: Status = "ok"
    reason: str = ""
    extra: str = "{}"


def _schema() -> "pa.Schema":
    import pyarrow as pa

    kinds = {"int": pa.int64(), "float": pa.float64(), "str": pa.string(), "Status": pa.string()}
    pairs = []
    for f in fields(AuditRecord):
        annotation = f.type if isinstance(f.type, str) else getattr(f.type, "__name__", str(f.type))
        first = str(annotation).split(" | ")[0]
        pairs.append((f.name, kinds.get(first, pa.string())))
    return pa.schema(pairs, metadata={"fedaudit-schema": str(SCHEMA_VERSION)})


class AuditLog:
    """Writes a run's records, one file per round; rewriting a round replaces its file."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.audit = self.folder / "audit"
        self.audit.mkdir(parents=True, exist_ok=True)

    @property
    def run_id(self) -> str:
        """Name of the run."""
        return self.folder.name

    def round_file(self, round_number: int) -> Path:
        """Where a round's records are."""
        return self.audit / f"round-{round_number:05d}.parquet"

    def write_round(self, round_number: int, records: Sequence[AuditRecord]) -> Path:
        """Write the records of one round atomically."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = pa.Table.from_pylist([asdict(record) for record in records], schema=_schema())
        path = self.round_file(round_number)
        temporary = path.with_name(f".{path.name}.part")
        pq.write_table(table, temporary)
        temporary.replace(path)
        return path

    def drop_rounds_after(self, last: int) -> None:
        """Delete records of rounds later than `last`: a resumed run writes them again."""
        for path in self.audit.glob("round-*.parquet"):
            if int(path.stem.removeprefix("round-")) > last:
                path.unlink()


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file atomically; NaN and infinities become null."""
    write_text(path, json.dumps(_finite(value), indent=2, sort_keys=True, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


@dataclass(frozen=True)
class Run:
    """A finished or interrupted run, read from its folder.

    Attributes:
        path: the run's folder.
        info: contents of run.toml: tables "config", "versions" and "run".
        summary: contents of summary.json; empty if the run did not end.
    """

    path: Path
    info: Mapping[str, Any] = field(default_factory=dict)
    summary: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Name of the run's folder."""
        return self.path.name

    @cached_property
    def records(self) -> "pd.DataFrame":
        """All records, one row per number, in order of round."""
        import pandas as pd
        import pyarrow.parquet as pq

        files = sorted((self.path / "audit").glob("round-*.parquet"))
        if not files:
            return pd.DataFrame(columns=[f.name for f in fields(AuditRecord)])
        import pyarrow as pa

        table = pa.concat_tables([pq.read_table(file) for file in files])
        frame = table.to_pandas()
        for column in ("client_id", "node_id"):
            frame[column] = pd.array(table[column].to_pylist(), dtype="Int64")
        return frame


def load_run(path: str | Path) -> Run:
    """Read a run's folder; works on interrupted runs too.

    Raises:
        RecordError: if the folder holds no run.
    """
    folder = Path(path)
    if not (folder / "audit").is_dir():
        raise RecordError(f"a run is a folder that holds 'audit/', got {str(folder)!r}: give a run's folder")
    info: dict[str, Any] = {}
    summary: dict[str, Any] = {}
    with suppress(FileNotFoundError):
        info = tomllib.loads((folder / "run.toml").read_text(encoding="utf-8"))
    with suppress(FileNotFoundError, json.JSONDecodeError):
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return Run(folder, info, summary)
