"""Commands that infer from a run's kept updates: who was a member, and which client has an attribute."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedaudit.cli_runs import fresh
from fedaudit.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    Curves = dict[str, dict[str, tuple[Tensor, Tensor]]]

Kept = Annotated[
    str, typer.Argument(metavar="RUN", help="folder of a simulation run with audit.save-updates")
]
Clients = Annotated[list[int] | None, typer.Option("--client", help="whose update; repeatable")]
Rounds = Annotated[list[int] | None, typer.Option("--round", help="of which round; repeatable")]
Output = Annotated[str | None, typer.Option("--output", metavar="DIR", help="folder that results go into")]
Json = Annotated[bool, typer.Option("--json", help="machine-readable output, no progress")]


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
    from fedaudit.candidate_scores import SCORES
    from fedaudit.offline_membership import curve_of, membership_of_run, per_update, pooled
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
    from fedaudit.offline_attribute import attribute_of_run
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
