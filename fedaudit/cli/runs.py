"""What several commands do alike: read overrides, choose folders, run configurations, report."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedaudit.config.overrides import parse_override
from fedaudit.errors import ConfigError, RecordError, RunFailedError
from fedaudit.spec import Scalar

if TYPE_CHECKING:
    import pandas as pd

    from fedaudit.config import RunConfig
    from fedaudit.records import Run


def overrides(pairs: Sequence[str] | None, engine: str | None, output: str | None) -> dict[str, Scalar]:
    """What --set, --engine and --output change, by dotted key."""
    changes = dict(parse_override(pair) for pair in pairs or ())
    if engine is not None:
        changes["federation.engine"] = engine
    if output is not None:
        changes["output.directory"] = output
    return changes


def resumed(folder: Path, changes: dict[str, Scalar]) -> "RunConfig":
    """The configuration of an interrupted run, to be continued in its folder."""
    from fedaudit.config import RunConfig
    from fedaudit.records import load_run

    recorded = dict(load_run(folder).info.get("config", {}))
    if not recorded:
        raise RecordError(f"{folder} has no run.toml to continue from: start the run anew")
    place = {"output.directory": str(folder.parent), "output.name": folder.name, "output.resume": True}
    return RunConfig.from_flat({**recorded, **changes, **place})


def refuse_overwrite(folder: Path, config: "RunConfig") -> None:
    """Raise if the folder holds a run already and is not to be resumed."""
    if any((folder / "audit").glob("round-*.parquet")) and not config.output.resume:
        raise ConfigError(
            f"a run keeps a folder of its own, got {folder} which holds one: "
            f"give --output or --set output.name=NAME, or continue it with --resume {folder}"
        )


def fresh(folder: Path) -> Path:
    """The folder, or the first of folder-2, folder-3, ... that does not exist."""
    number, candidate = 1, folder
    while candidate.exists():
        number += 1
        candidate = folder.with_name(f"{folder.name}-{number}")
    return candidate


def run_folders(folder: Path) -> list[Path]:
    """The run in this folder, or the runs inside it."""
    inside = sorted(path.parent for path in folder.glob("*/audit"))
    return [folder] if (folder / "audit").is_dir() or not inside else inside


def execute_all(configs: "Sequence[RunConfig]", quiet: bool) -> "list[Run]":
    """Run one configuration after the other and show their progress."""
    from fedaudit.cli.watch import Watch
    from fedaudit.federation.execution import execute
    from fedaudit.federation.folders import run_folder

    finished: list[Run] = []
    with Watch(len(configs), quiet=quiet):
        for config in configs:
            try:
                finished.append(execute(config))
            except KeyboardInterrupt:
                raise RunFailedError(
                    "interrupted; completed rounds are kept, "
                    f"continue with 'fedaudit run --resume {run_folder(config)}'"
                ) from None
    return finished


def finish(runs: "list[Run]", page: Path, as_json: bool) -> None:
    """Write the report and the tables beside it, and print the comparison, for people or for machines."""
    from fedaudit.report.display import by_variation
    from fedaudit.report.evidence import gather
    from fedaudit.report.exports import write_tables
    from fedaudit.report.page import write_report
    from fedaudit.report.tables import comparison_table

    evidence = gather(runs)
    table = comparison_table(evidence)
    write_report(evidence, page)
    answer: dict[str, Any] = {"table": _rows(table)}
    if len(runs) > 1:
        tables = write_tables(evidence, page.parent)
        answer |= {"differences": _rows(tables.differences), "pareto": _rows(tables.pareto)}
    if as_json:
        answer |= {"report": str(page), "runs": [str(run.path) for run in runs]}
        print(json.dumps(answer, indent=2))
        return
    from rich.console import Console

    from fedaudit.report.terminal import rich_table

    title = "Comparison of defenses"
    if not len(table):
        Console().print(rich_table(table, title))
    for label, part in by_variation(table):
        Console().print(rich_table(part, f"{title}, {label}" if label else title))
    print(f"report: {page}")  # not wrapped, so that it can be copied


def _rows(frame: "pd.DataFrame") -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(frame.to_json(orient="records"))
    return rows
