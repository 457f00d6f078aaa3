"""Commands on the updates that a run kept: attack, membership, attribute, diagnose, verify."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from fedaudit.cli.options import Clients, Json, Output, Rounds
from fedaudit.cli.runs import finish, fresh
from fedaudit.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    Curves = dict[str, dict[str, tuple[Tensor, Tensor]]]

Kept = Annotated[
    str, typer.Argument(metavar="RUN", help="folder of a simulation run with audit.save-updates")
]


def attack(
    run: Annotated[
        str | None, typer.Argument(metavar="RUN", help="folder of a run with audit.save-updates")
    ] = None,
    name: Annotated[
        str, typer.Option("--attack", metavar="SPEC", help="which, e.g. 'dlg(labels=idlg)'")
    ] = "dlg",
    client: Clients = None,
    round_: Rounds = None,
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
    from fedaudit.cli.watch import Watch
    from fedaudit.config.texts import ints
    from fedaudit.offline.attacks import ForeignUpdate, attack_foreign, attack_run, with_limits
    from fedaudit.records import load_run

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


def membership(
    run: Kept,
    client: Clients = None,
    round_: Rounds = None,
    score: Annotated[
        list[str] | None, typer.Option("--score", help="which score; repeatable; all if left out")
    ] = None,
    candidates: Annotated[
        int, typer.Option(min=5, help="most members, and most non-members, of each client")
    ] = 256,
    output: Output = None,
    as_json: Json = False,
) -> None:
    """Say how well candidate examples are told from others by recorded updates: ROC of every score."""
    from fedaudit.inference.candidate_scores import SCORES
    from fedaudit.offline.membership import curve_of, membership_of_run, per_update, pooled
    from fedaudit.records import load_run

    wrong = [name for name in score or () if name not in SCORES]
    if wrong:
        raise ConfigError(f"--score is one of {', '.join(SCORES)}, got {wrong[0]!r}: choose one")
    chosen = [name for name in SCORES if not score or name in score]
    read = load_run(Path(run))
    told = membership_of_run(read, chosen, client or (), round_ or (), candidates)
    together, updates = pooled(told), per_update(told)
    curves: Curves = {
        scope: {
            str(name): curve
            for name in chosen
            if (curve := curve_of(told, name, averaged=scope == "mean over rounds")) is not None
        }
        for scope in together["scope"].unique()
    }
    from fedaudit.report.membership_page import rich_tables, write_membership

    folder = fresh(Path(output) if output else read.path.with_name(f"{read.name}-membership"))
    folder.mkdir(parents=True)
    page = write_membership(read, together, updates, curves, folder / "membership.html")
    together.to_csv(folder / "membership.csv", index=False)
    updates.to_csv(folder / "membership-updates.csv", index=False)
    if as_json:
        rows = json.loads(together.to_json(orient="records"))
        print(json.dumps({"membership": rows, "report": str(page)}, indent=2))
        return
    from rich.console import Console

    for table in rich_tables(together):
        Console().print(table)
    for reason in dict.fromkeys(filter(None, together["reason"])):
        print(f"no number: {reason}")
    print(f"report: {page}")


def attribute(
    run: Kept,
    name: Annotated[
        str, typer.Option("--attribute", metavar="NAME", help="brightness, contrast or label:K")
    ] = "brightness",
    round_: Rounds = None,
    shadows: Annotated[int, typer.Option(min=16, help="shadow updates to train in each round")] = 90,
    low: Annotated[float, typer.Option(min=0, max=1, help="share with it in half of the shadows")] = 0.25,
    high: Annotated[float, typer.Option(min=0, max=1, help="share with it in the others")] = 0.75,
    output: Output = None,
    as_json: Json = False,
) -> None:
    """Infer from recorded updates which clients hold many examples with an attribute, and score it."""
    from fedaudit.offline.attribute import attribute_of_run
    from fedaudit.records import load_run
    from fedaudit.report.attribute_page import rich_tables, write_attribute

    read = load_run(Path(run))
    found = attribute_of_run(read, name, round_ or (), shadows=shadows, low=low, high=high)
    folder = fresh(Path(output) if output else read.path.with_name(f"{read.name}-attribute"))
    folder.mkdir(parents=True)
    page = write_attribute(read, name, found.clients, found.rounds, (low, high), folder / "attribute.html")
    found.clients.to_csv(folder / "attribute-clients.csv", index=False)
    found.rounds.to_csv(folder / "attribute.csv", index=False)
    if as_json:
        shown = {
            part: json.loads(frame.to_json(orient="records"))
            for part, frame in (("rounds", found.rounds), ("clients", found.clients))
        }
        print(json.dumps({**shown, "report": str(page)}, indent=2))
        return
    from rich.console import Console

    for table in rich_tables(name, found.clients, found.rounds):
        Console().print(table)
    for reason in dict.fromkeys(filter(None, found.rounds["reason"])):
        print(f"no area: {reason}")
    print(f"report: {page}")


def diagnose(
    run: Annotated[str, typer.Argument(metavar="RUN", help="folder of a simulation run")],
    client: Annotated[int, typer.Option("--client", help="whose update")] = 0,
    round_: Annotated[int, typer.Option("--round", help="of which round")] = 1,
    as_json: Json = False,
) -> None:
    """Say why an inversion cannot work on an update, and which attack applies."""
    from dataclasses import asdict

    from fedaudit.offline.attacks import diagnose_run
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
        from fedaudit.federation.insight import insight

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
