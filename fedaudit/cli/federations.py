"""Commands that run federations, or report those that ran: run, compare, calibrate, tune, report."""

import json
from pathlib import Path
from typing import Annotated

import typer

from fedaudit.cli.options import Config, EngineOption, Json, Output, Set
from fedaudit.cli.runs import execute_all, finish, fresh, overrides, refuse_overwrite, resumed, run_folders
from fedaudit.config import load_config
from fedaudit.errors import ConfigError


def run(
    config: Annotated[
        str | None, typer.Argument(metavar="CONFIG", help="a TOML file, or a preset's name")
    ] = None,
    set_: Set = None,
    engine: EngineOption = None,
    output: Output = None,
    resume: Annotated[
        str | None,
        typer.Option("--resume", metavar="RUN", help="continue the interrupted run in this folder"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Run one federation under audit and write its records and report."""
    if (config is None) == (resume is None):
        raise ConfigError("run takes either a CONFIG or --resume RUN: give exactly one")
    if resume is not None:
        if output is not None:
            raise ConfigError(f"a resumed run stays in its folder, got --output {output}: leave it out")
        loaded = resumed(Path(resume), overrides(set_, engine, None))
    else:
        loaded = load_config(str(config), overrides(set_, engine, output))
    from fedaudit.federation.checks import check
    from fedaudit.federation.folders import run_folder

    check(loaded)
    refuse_overwrite(run_folder(loaded), loaded)
    finished = execute_all([loaded], as_json)
    finish(finished, finished[0].path / "report.html", as_json)


def compare(
    config: Config,
    set_: Set = None,
    engine: EngineOption = None,
    output: Output = None,
    as_json: Json = False,
) -> None:
    """Run every defense with every seed of a configuration and set them side by side."""
    loaded = load_config(config, overrides(set_, engine, output))
    from fedaudit.federation.checks import check
    from fedaudit.studies.comparison import comparisons

    folder = fresh(Path(loaded.output.directory) / f"compare-{Path(config).stem}")
    runs = comparisons(loaded, folder)
    for each in runs:
        check(each)
    finished = execute_all(runs, as_json)
    finish(finished, folder / "report.html", as_json)


def calibrate(
    config: Config,
    set_: Set = None,
    engine: EngineOption = None,
    output: Output = None,
    as_json: Json = False,
) -> None:
    """Attack many examples and say which measures predict the attacks' success."""
    loaded = load_config(config, overrides(set_, engine, output))
    from fedaudit.cli.watch import Watch
    from fedaudit.federation.checks import check
    from fedaudit.studies.calibration import calibrate as run_calibration
    from fedaudit.studies.calibration import correlations
    from fedaudit.studies.comparison import comparisons

    folder = fresh(Path(loaded.output.directory) / f"calibrate-{Path(config).stem}")
    planned = comparisons(loaded, folder)
    for each in planned:
        check(each)
    with Watch(len(planned), quiet=as_json):
        runs, points = run_calibration(loaded, folder)
    found = correlations(points)
    from fedaudit.report.calibration_page import rich_table, write_calibration

    page = write_calibration(runs, points, found, folder / "calibration.html")
    points.to_csv(folder / "points.csv", index=False)
    found.to_csv(folder / "correlations.csv", index=False)
    if as_json:
        rows = json.loads(found.to_json(orient="records"))
        print(json.dumps({"correlations": rows, "points": len(points), "report": str(page)}, indent=2))
        return
    from rich.console import Console

    Console().print(rich_table(found))
    print(f"report: {page}")


def tune(
    config: Config,
    set_: Set = None,
    engine: EngineOption = None,
    output: Output = None,
    as_json: Json = False,
) -> None:
    """Search learning rate, clip norm and batch size of a defense on validation data."""
    loaded = load_config(config, overrides(set_, engine, output))
    from fedaudit.cli.watch import Watch
    from fedaudit.config.texts import ints
    from fedaudit.studies.tuning import search_cost, settings_of, write_tuning
    from fedaudit.studies.tuning import tune as run_trials

    folder = fresh(Path(loaded.output.directory) / f"tune-{Path(config).stem}")
    with Watch(len(settings_of(loaded)) * len(ints(loaded.tune.seeds)), quiet=as_json):
        trials = run_trials(loaded, folder)
    found = write_tuning(loaded, trials, search_cost(loaded, trials), folder)
    if as_json:
        print(json.dumps(found, indent=2))
        return
    from rich.console import Console

    from fedaudit.report.terminal import trials_table

    Console().print(trials_table(found["trials"], found["best"]["defense"]))
    for note in found["notes"]:
        print(note)
    print(f"best setting: {found['tuned']}  (fedaudit compare {found['tuned']})")


def report(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="folders of runs, or of comparisons")],
    output: Annotated[
        str, typer.Option("--output", metavar="FILE", help="where the page goes")
    ] = "report.html",
    as_json: Json = False,
) -> None:
    """Write the report of finished or interrupted runs."""
    from fedaudit.records import load_run

    folders = [folder for given in runs for folder in run_folders(Path(given))]
    finish([load_run(folder) for folder in folders], Path(output), as_json)
