"""The command `fedaudit`: run, compare, calibrate, tune, attack, membership, attribute, diagnose, ...

Exit codes: 0 done, 1 a run failed or a claim is violated, 2 bad input.
Heavy imports wait until a command needs them.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from fedaudit import __version__
from fedaudit.cli_inference import attribute, membership
from fedaudit.cli_runs import (
    execute_all,
    finish,
    fresh,
    overrides,
    refuse_overwrite,
    resumed,
    run_folders,
)
from fedaudit.config import load_config, presets
from fedaudit.errors import ConfigError, DataError, FedauditError, RecordError

if TYPE_CHECKING:
    pass

INTERRUPTED = 130  # what Typer makes of Ctrl-C; other versions raise Abort
Engine = Literal["in-process", "ray"]
Kind = Literal[
    "measures", "attacks", "defenses", "datasets", "partitioners", "models", "strategies", "presets"
]

cli = typer.Typer(
    name="fedaudit",
    help="Federated learning simulation with leakage auditing: what do these updates give away?",
    add_completion=False,
    pretty_exceptions_enable=False,
)
Config = Annotated[str, typer.Argument(metavar="CONFIG", help="a TOML file, or a preset's name")]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="override one key; repeatable")
]
EngineOption = Annotated[Engine | None, typer.Option("--engine", help="where clients run")]
Output = Annotated[str | None, typer.Option("--output", metavar="DIR", help="folder that results go into")]
Json = Annotated[bool, typer.Option("--json", help="machine-readable output, no progress")]


def _version(wanted: bool) -> None:
    if wanted:
        print(f"fedaudit {__version__}")
        raise typer.Exit


@cli.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    """Federated learning simulation with leakage auditing: what do these updates give away?"""


@cli.command()
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
    from fedaudit.app import check, run_folder

    check(loaded)
    refuse_overwrite(run_folder(loaded), loaded)
    finished = execute_all([loaded], as_json)
    finish(finished, finished[0].path / "report.html", as_json)


@cli.command()
def compare(
    config: Config,
    set_: Set = None,
    engine: EngineOption = None,
    output: Output = None,
    as_json: Json = False,
) -> None:
    """Run every defense with every seed of a configuration and set them side by side."""
    loaded = load_config(config, overrides(set_, engine, output))
    from fedaudit.app import check, comparisons

    folder = fresh(Path(loaded.output.directory) / f"compare-{Path(config).stem}")
    runs = comparisons(loaded, folder)
    for each in runs:
        check(each)
    finished = execute_all(runs, as_json)
    finish(finished, folder / "report.html", as_json)


@cli.command()
def calibrate(
    config: Config,
    set_: Set = None,
    engine: EngineOption = None,
    output: Output = None,
    as_json: Json = False,
) -> None:
    """Attack many examples and say which measures predict the attacks' success."""
    loaded = load_config(config, overrides(set_, engine, output))
    from fedaudit.app import check, comparisons
    from fedaudit.calibration import calibrate as run_calibration
    from fedaudit.calibration import correlations
    from fedaudit.watch import Watch

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


@cli.command()
def tune(
    config: Config,
    set_: Set = None,
    engine: EngineOption = None,
    output: Output = None,
    as_json: Json = False,
) -> None:
    """Search learning rate, clip norm and batch size of a defense on validation data."""
    loaded = load_config(config, overrides(set_, engine, output))
    from fedaudit.config import ints
    from fedaudit.tuning import search_cost, settings_of, write_tuning
    from fedaudit.tuning import tune as run_trials
    from fedaudit.watch import Watch

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


@cli.command()
def attack(
    run: Annotated[
        str | None, typer.Argument(metavar="RUN", help="folder of a run with audit.save-updates")
    ] = None,
    name: Annotated[
        str, typer.Option("--attack", metavar="SPEC", help="which, e.g. 'dlg(labels=idlg)'")
    ] = "dlg",
    client: Annotated[list[int] | None, typer.Option("--client", help="whose update; repeatable")] = None,
    round_: Annotated[list[int] | None, typer.Option("--round", help="of which round; repeatable")] = None,
    restarts: Annotated[int | None, typer.Option(min=1, help="most restarts")] = None,
    seconds: Annotated[float | None, typer.Option(min=0, help="time budget per update")] = None,
    before: Annotated[Path | None, typer.Option(help="weights sent out, safetensors, instead of RUN")] = None,
    after: Annotated[Path | None, typer.Option(help="weights that came back")] = None,
    model: Annotated[str, typer.Option(help="package.module:function that returns the model")] = "",
    shape: Annotated[str, typer.Option(help="shape of an input, e.g. 3,32,32")] = "",
    classes: Annotated[int, typer.Option(min=0, help="number of classes")] = 0,
    lr: Annotated[float, typer.Option(min=0, help="local learning rate of plain SGD")] = 0.0,
    steps: Annotated[int, typer.Option(min=1, help="local steps")] = 1,
    batch_size: Annotated[int, typer.Option(min=1, help="examples in a step")] = 1,
    lpips: Annotated[
        bool, typer.Option("--lpips", help="score by LPIPS too, if its weights are here")
    ] = False,
    output: Output = None,
    as_json: Json = False,
) -> None:
    """Attack recorded updates of a run, or one update of any federation."""
    from fedaudit.config import ints
    from fedaudit.offline_attacks import ForeignUpdate, attack_foreign, attack_run, with_limits
    from fedaudit.records import load_run
    from fedaudit.watch import Watch

    if (run is None) == (before is None):
        raise ConfigError("attack takes either a RUN or --before and --after: give exactly one of the two")
    spec = with_limits(name, restarts, seconds)
    if run is not None:
        attacked = load_run(Path(run))
        folder = fresh(Path(output) if output else attacked.path.with_name(f"{attacked.name}-attack"))
        with Watch(1, quiet=as_json):
            found = attack_run(attacked, spec, folder, client or (), round_ or (), lpips)
    else:
        missing = [flag for flag, value in (("--after", after), ("--model", model), ("--shape", shape),
                                            ("--classes", classes), ("--lr", lr)) if not value]  # fmt: skip
        if missing or before is None or after is None:
            raise ConfigError(
                f"an update from elsewhere needs {', '.join(missing)} beside --before: give all"
            )
        foreign = ForeignUpdate(model, before, after, ints(shape), classes, lr, steps, batch_size)
        folder = fresh(Path(output) if output else after.with_suffix(".attack"))
        with Watch(1, quiet=as_json):
            found = attack_foreign(foreign, spec, folder)
    finish([found], folder / "report.html", as_json)


cli.command()(membership)
cli.command()(attribute)


@cli.command()
def diagnose(
    run: Annotated[str, typer.Argument(metavar="RUN", help="folder of a simulation run")],
    client: Annotated[int, typer.Option("--client", help="whose update")] = 0,
    round_: Annotated[int, typer.Option("--round", help="of which round")] = 1,
    as_json: Json = False,
) -> None:
    """Say why an inversion cannot work on an update, and which attack applies."""
    from dataclasses import asdict

    from fedaudit.offline_attacks import diagnose_run
    from fedaudit.records import load_run

    card, advice = diagnose_run(load_run(Path(run)), client, round_)
    if as_json:
        shown = {"card": card.as_extra(), "attacks": [asdict(each) for each in advice]}
        print(json.dumps(shown, indent=2))
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=f"Update of client {client} in round {round_}: {card.grade} conditions", box=None)
    for heading in ("Attack", "Verdict", "Why"):
        table.add_column(heading, overflow="fold")
    for each in advice:
        table.add_row(each.attack, each.verdict, escape("; ".join(each.reasons) or "no obstacle"))
    Console().print(table)
    print(f"in the attacker's favour: {', '.join(card.favours) or 'nothing'}")


@cli.command()
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


@cli.command()
def verify(
    run: Annotated[str, typer.Argument(metavar="RUN", help="folder of a run that kept its updates")],
    observer: Annotated[
        Literal["server", "oracle"],
        typer.Option("--observer", help="who looks; an oracle rebuilds the clients' data (simulation only)"),
    ] = "server",
    as_json: Json = False,
) -> None:
    """Test what a run's defense and strategy claim against what was received."""
    from fedaudit.verification.recorded import verify_run
    from fedaudit.verification.table import findings_frame, findings_table, outcome

    if observer == "oracle":
        from fedaudit.insight import insight

        findings = verify_run(run, observer="oracle", insight=insight)
    else:
        findings = verify_run(run)
    page = Path(run) / "verification.csv"
    frame = findings_frame(findings)
    frame.to_csv(page, index=False)
    if as_json:
        rows = json.loads(frame.to_json(orient="records"))
        print(json.dumps({"findings": rows, **outcome(findings), "csv": str(page)}, indent=2))
    else:
        from rich.console import Console

        Console().print(findings_table(findings))
        print(f"findings: {page}")
    if outcome(findings)["violated"]:
        raise typer.Exit(1)


@cli.command("list")
def list_parts(
    kind: Annotated[
        Kind | None, typer.Argument(metavar="KIND", help="what to list; everything if left out")
    ] = None,
    as_json: Json = False,
) -> None:
    """List measures, attacks, defenses, datasets, partitioners, models, strategies and presets."""
    from fedaudit import registry

    parts: dict[str, dict[str, str]] = {
        "measures": registry.MEASURES.summaries(),
        "attacks": registry.ATTACKS.summaries(),
        "defenses": registry.DEFENSES.summaries(),
        "datasets": registry.DATASETS.summaries(),
        "partitioners": registry.PARTITIONERS.summaries(),
        "models": registry.MODELS.summaries(),
        "presets": {name: _first_comment(path) for name, path in presets().items()},
    }
    if kind in (None, "strategies"):
        from fedaudit.app import reference_module

        names = reference_module("strategies.flower_strategies").strategy_names()
        parts["strategies"] = dict.fromkeys(names, "Flower's own")
    shown = {kind: parts[kind]} if kind else parts
    if as_json:
        print(json.dumps(shown, indent=2))
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    for title, entries in shown.items():
        table = Table(title=title, title_justify="left", show_header=False, box=None, pad_edge=False)
        for name, summary in entries.items():
            table.add_row(name, escape(summary))
        Console().print(table, "")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    from click.exceptions import ClickException

    arguments = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    try:
        result = cli(args=arguments, standalone_mode=False)
    except (ConfigError, DataError, RecordError) as error:
        return _stop(str(error), 2)
    except FedauditError as error:
        return _stop(str(error), 1)
    except ClickException as error:
        return _stop(f"{error.format_message()} See 'fedaudit --help'.", 2)
    except OSError as error:  # a folder or file the user named; those of a run are failed runs
        return _stop(f"a file or folder cannot be used: {error}", 2)
    except (typer.Abort, KeyboardInterrupt):
        return _stop("interrupted", 1)
    if result == INTERRUPTED:
        return _stop("interrupted", 1)
    return result if isinstance(result, int) else 0


def _stop(sentence: str, code: int) -> int:
    print(f"fedaudit: {sentence}", file=sys.stderr)
    return code


def entry() -> None:
    """Console entry point."""
    sys.exit(main())


def _first_comment(path: Path) -> str:
    first = path.read_text(encoding="utf-8").split("\n", 1)[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""


__all__ = ["cli", "entry", "main"]
