"""Audit records on disk: one flat row per number, one parquet file per round, one folder per run.

    runs/<run>/run.toml              configuration, versions, seed, git revision
    runs/<run>/audit/round-00001.parquet
    runs/<run>/summary.json          written when the run ends
    runs/<run>/checkpoint.safetensors  what a resumed run needs (global weights, strategy and client state)
    runs/<run>/attacks/              reconstructions, only if attack.save-images is set

Every file is written under a temporary name and renamed, so a reader never sees half a file.
"""

import json
import math
import os
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_type_hints

from fedaudit.errors import RecordError

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

SCHEMA_VERSION = 2
_VERSION_KEY = "fedaudit-schema"
Status = Literal["ok", "skipped", "failed", "rejected"]


@dataclass(frozen=True)
class AuditRecord:
    """One number (or the reason why there is none).

    Attributes:
        run_id: name of the run's folder.
        round: server round; 0 is before training.
        client_id: partition or node; None for a quantity of the whole round.
        node_id: the node that replied; None for a quantity of the whole round.
        quantity: what was measured, e.g. "update-norm", "accuracy", "dlg.psnr", "epsilon"; a layer's share
            of a measure is "<measure>.layer".
        value: the number; None unless status is "ok".
        unit: unit of value, low and high.
        kind: exact, estimate, lower or upper.
        low: lower end of an interval.
        high: upper end of an interval.
        observer: server, client or oracle: who could have computed it.
        defense: the defense in force.
        epsilon: the client's epsilon after this round, if there is a guarantee; of every client where
            `client_id` is None.
        delta: the delta epsilon is stated at.
        privacy_unit: "example" or "client": whose presence is protected.
        accountant: how epsilon was composed.
        seconds: time the number cost.
        status: ok, skipped, failed or rejected.
        reason: why, unless ok.
        extra: settings and side results as JSON.
        layer: module name, for "<measure>.layer" rows only.
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
    layer: str | None = None


@cache
def schema() -> "pa.Schema":
    """The columns of an audit file, from the annotations of AuditRecord; `X | None` may be null."""
    import pyarrow as pa

    types = {int: pa.int64(), float: pa.float64(), str: pa.string()}
    columns = []
    for name, annotation in get_type_hints(AuditRecord).items():
        choices = set(get_args(annotation)) or {annotation}  # of X | None, of Literal["a", "b"], of X
        kinds = {type(choice) if isinstance(choice, str) else choice for choice in choices}
        (kind,) = kinds - {type(None)}
        # Flower draws node ids from all 64 bits: they do not fit a signed integer
        arrow = pa.uint64() if name in ("client_id", "node_id") else types[kind]
        columns.append(pa.field(name, arrow, nullable=type(None) in kinds))
    return pa.schema(columns, metadata={_VERSION_KEY: str(SCHEMA_VERSION)})


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
        """Write the records of one round atomically.

        Raises:
            RecordError: if a record does not fit the schema.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = self.round_file(round_number)
        try:
            columns = [
                pa.array([getattr(record, column.name) for record in records], column.type)
                for column in schema()
            ]
            table = pa.Table.from_arrays(columns, schema=schema())
            # dictionaries and statistics pay in files of many rows; a round has few
            buffer = pa.BufferOutputStream()
            pq.write_table(table, buffer, use_dictionary=False, write_statistics=False)
            with _atomically(path) as temporary:
                temporary.write_bytes(buffer.getvalue())
        except (pa.ArrowException, OverflowError) as error:
            raise RecordError(
                f"a record must keep the types of AuditRecord, round {round_number}: {error}"
            ) from error
        return path

    def drop_rounds_after(self, last: int) -> None:
        """Delete records of rounds later than `last`: a resumed run writes them again."""
        for number, path in _round_files(self.audit):
            if number > last:
                path.unlink()


def _round_files(audit: Path) -> list[tuple[int, Path]]:
    """Rounds and their files, in order of round."""
    return sorted((int(path.stem.removeprefix("round-")), path) for path in audit.glob("round-*.parquet"))


@contextmanager
def _atomically(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` that takes its place when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with _atomically(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


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
        """All records, one row per number, in order of round.

        `client_id` and `node_id` have the nullable dtype "UInt64", so that no digit of an id is lost.

        Raises:
            RecordError: if a file is damaged or was written with another schema.
        """
        import pandas as pd
        import pyarrow as pa

        tables = [_read_round(path) for _, path in _round_files(self.path / "audit")]
        table = pa.concat_tables(tables) if tables else schema().empty_table()
        frame: pd.DataFrame = table.to_pandas(types_mapper={pa.uint64(): pd.UInt64Dtype()}.get)
        return frame


def _read_round(path: Path) -> "pa.Table":
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:  # read_table would make columns of folders named like a=b
            table = file.read()
    except (pa.ArrowException, OSError) as error:
        raise RecordError(f"an audit file must be whole, got {str(path)!r}: delete it ({error})") from error
    version = (table.schema.metadata or {}).get(_VERSION_KEY.encode(), b"none").decode()
    if version != str(SCHEMA_VERSION):
        raise RecordError(
            f"audit files of schema {SCHEMA_VERSION} can be read, got {version} in {str(path)!r}: "
            "use the fedaudit that wrote it"
        )
    return table


def load_run(path: str | Path) -> Run:
    """Read a run's folder; works on interrupted runs too.

    Raises:
        RecordError: if the folder holds no run, or one of its files is damaged.
    """
    folder = Path(path)
    if not (folder / "audit").is_dir():
        raise RecordError(f"a run is a folder that holds 'audit/', got {str(folder)!r}: give a run's folder")
    return Run(
        folder,
        info=_parsed(folder / "run.toml", tomllib.loads),
        summary=_parsed(folder / "summary.json", json.loads),
    )


def _parsed(path: Path, parse: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    """Contents of a file; empty if the run ended before it was written."""
    try:
        return parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:  # of TOML, JSON or UTF-8
        raise RecordError(f"{path.name} must be valid, got {str(path)!r}: delete it ({error})") from error
