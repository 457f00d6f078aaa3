"""The command `list`: measures, attacks, defenses and everything else that has a name."""

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from fedaudit.cli.options import Json
from fedaudit.config.files import presets

Kind = Literal[
    "measures", "attacks", "defenses", "datasets", "partitioners", "models", "strategies", "presets"
]


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
        from fedaudit.federation.reference_app import reference_module

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


def _first_comment(path: Path) -> str:
    first = path.read_text(encoding="utf-8").split("\n", 1)[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""
