"""Audit records: what is written is what is read, whatever happens in between."""

import json
import math
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedaudit import records
from fedaudit.errors import RecordError
from fedaudit.records import AuditLog, AuditRecord, load_run, schema, write_json, write_text


def record(round_number: int = 1, client_id: int | None = 0, value: float | None = 1.0) -> AuditRecord:
    return AuditRecord("run", round_number, client_id, "update-norm", value, "1", "exact", "server", "none")


def test_every_field_of_a_record_is_a_column_of_its_type() -> None:
    assert [(field.name, str(field.type), field.nullable) for field in schema()] == [
        ("run_id", "string", False),
        ("round", "int64", False),
        ("client_id", "uint64", True),
        ("quantity", "string", False),
        ("value", "double", True),
        ("unit", "string", False),
        ("kind", "string", False),
        ("observer", "string", False),
        ("defense", "string", False),
        ("node_id", "uint64", True),
        ("low", "double", True),
        ("high", "double", True),
        ("epsilon", "double", True),
        ("delta", "double", True),
        ("privacy_unit", "string", True),
        ("accountant", "string", True),
        ("seconds", "double", False),
        ("status", "string", False),
        ("reason", "string", False),
        ("extra", "string", False),
        ("layer", "string", True),
    ]


def test_records_read_back_are_the_records_written(tmp_path: Path) -> None:
    written = [
        AuditRecord(
            "run", 1, 3, "accuracy", 0.5, "1", "estimate", "oracle", "dp-sgd", node_id=7, low=0.4, high=0.6,
            epsilon=8.0, delta=1e-5, privacy_unit="example", accountant="rdp", seconds=0.25, extra='{"n": 2}',
        ),
        AuditRecord("run", 1, None, "y", None, "1", "lower", "client", "none", status="failed", reason="-"),
    ]  # fmt: skip
    path = AuditLog(tmp_path / "run").write_round(1, written)
    assert [AuditRecord(**row) for row in pq.ParquetFile(path).read().to_pylist()] == written
    frame = load_run(tmp_path / "run").records
    assert list(frame.columns) == schema().names
    assert frame["status"].tolist() == ["ok", "failed"]


@pytest.mark.parametrize("identity", [0, 2**53 + 1, 2**63 - 1, 2**63, 2**64 - 1])
def test_no_digit_of_an_id_is_lost_beside_a_missing_one(tmp_path: Path, identity: int) -> None:
    rows = [record(client_id=identity), record(client_id=None)]
    AuditLog(tmp_path).write_round(1, rows)
    column = load_run(tmp_path).records["client_id"]
    assert int(column.iloc[0]) == identity
    assert column.iloc[1] is pd.NA


def test_a_value_that_is_not_a_number_differs_from_no_value(tmp_path: Path) -> None:
    rows = [record(value=v) for v in (math.nan, None, math.inf, 1e-300)]
    path = AuditLog(tmp_path).write_round(1, rows)
    value = pq.ParquetFile(path).read()["value"]
    assert value.null_count == 1
    assert math.isnan(value[0].as_py())
    assert value[1:].to_pylist() == [None, math.inf, 1e-300]


@pytest.mark.parametrize(
    "bad",
    [
        record(client_id=-1),
        record(client_id=2**64),
        record(round_number=None),  # type: ignore[arg-type]
        record(value="high"),  # type: ignore[arg-type]
    ],
    ids=["negative id", "id of 65 bits", "no round", "text"],
)
def test_a_record_outside_the_schema_is_refused_and_the_old_file_stays(
    tmp_path: Path, bad: AuditRecord
) -> None:
    log = AuditLog(tmp_path)
    before = log.write_round(1, [record()]).read_bytes()
    with pytest.raises(RecordError, match="a record must keep the types of AuditRecord, round 1: "):
        log.write_round(1, [record(), bad])
    assert log.round_file(1).read_bytes() == before
    assert [path.name for path in log.audit.iterdir()] == ["round-00001.parquet"]


def test_a_crash_before_the_rename_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = AuditLog(tmp_path)
    log.write_round(1, [record(value=1.0)])
    write_text(tmp_path / "run.toml", "old = 1\n")

    def crash(self: Path, target: Path) -> Path:
        assert self.stat().st_size > 0  # the whole file is there, under its temporary name
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", crash)
        with pytest.raises(KeyboardInterrupt):
            log.write_round(1, [record(value=2.0)])
        with pytest.raises(KeyboardInterrupt):
            write_text(tmp_path / "run.toml", "new = 1\n")
    run = load_run(tmp_path)
    assert run.records["value"].tolist() == [1.0]
    assert run.info == {"old": 1}


def test_a_temporary_file_left_by_a_kill_is_not_read(tmp_path: Path) -> None:
    log = AuditLog(tmp_path)
    log.write_round(1, [record()])
    (log.audit / ".round-00002.parquet.99.part").write_bytes(b"half")
    assert len(load_run(tmp_path).records) == 1
    assert len(pd.read_parquet(log.audit)) == 1


def test_writing_a_round_again_replaces_it(tmp_path: Path) -> None:
    log = AuditLog(tmp_path)
    log.write_round(1, [record(), record(client_id=1)])
    log.write_round(1, [record(value=5.0)])
    assert load_run(tmp_path).records["value"].tolist() == [5.0]


def test_records_come_in_order_of_round(tmp_path: Path) -> None:
    log = AuditLog(tmp_path)
    for number in (100_000, 2, 99_999, 0):
        log.write_round(number, [record(number)])
    assert load_run(tmp_path).records["round"].tolist() == [0, 2, 99_999, 100_000]


def test_rounds_after_the_last_one_are_dropped(tmp_path: Path) -> None:
    log = AuditLog(tmp_path)
    for number in range(4):
        log.write_round(number, [record(number)])
    log.drop_rounds_after(1)
    assert load_run(tmp_path).records["round"].tolist() == [0, 1]


def test_an_interrupted_run_is_read_as_far_as_it_went(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "cut")
    empty = load_run(tmp_path / "cut")
    assert (empty.name, empty.info, empty.summary, len(empty.records)) == ("cut", {}, {}, 0)
    log.write_round(1, [record()])
    log.write_round(2, [])
    write_text(log.folder / "run.toml", "[config]\nseed = 3\n")
    run = load_run(str(log.folder))
    assert (run.info, run.summary, len(run.records)) == ({"config": {"seed": 3}}, {}, 1)
    assert run.records.dtypes.equals(empty.records.dtypes)


def test_a_folder_named_like_a_partition_adds_no_column(tmp_path: Path) -> None:
    AuditLog(tmp_path / "seed=0").write_round(1, [record()])
    assert list(load_run(tmp_path / "seed=0").records.columns) == schema().names


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="a run is a folder that holds 'audit/', got"):
        load_run(tmp_path)


@pytest.mark.parametrize("name", ["run.toml", "summary.json"])
def test_a_damaged_text_file_is_named(tmp_path: Path, name: str) -> None:
    AuditLog(tmp_path)
    (tmp_path / name).write_text("{", encoding="utf-8")
    with pytest.raises(RecordError, match=f"{name} must be valid, got"):
        load_run(tmp_path)


def test_a_damaged_audit_file_is_named(tmp_path: Path) -> None:
    path = AuditLog(tmp_path).write_round(1, [record()])
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(RecordError, match=r"an audit file must be whole, got '.*round-00001\.parquet'"):
        _ = load_run(tmp_path).records


def test_a_file_of_another_schema_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = AuditLog(tmp_path).write_round(1, [record()])
    monkeypatch.setattr(records, "SCHEMA_VERSION", 3)
    with pytest.raises(RecordError, match="audit files of schema 3 can be read, got 2 in"):
        _ = load_run(tmp_path).records
    pq.write_table(pa.table({"a": [1]}), path)
    with pytest.raises(RecordError, match="got none in"):
        _ = load_run(tmp_path).records


def test_json_holds_finite_numbers_only(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "summary.json"
    write_json(path, {"b": [1.5, math.nan], "a": {"x": math.inf, "y": 2}, "c": (True, "t", None)})
    assert json.loads(path.read_text(encoding="utf-8")) == {
        "a": {"x": None, "y": 2},
        "b": [1.5, None],
        "c": [True, "t", None],
    }
