"""Arguments and options that several commands have."""

from typing import Annotated, Literal

import typer

Engine = Literal["in-process", "ray"]
Config = Annotated[str, typer.Argument(metavar="CONFIG", help="a TOML file, or a preset's name")]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="override one key; repeatable")
]
EngineOption = Annotated[Engine | None, typer.Option("--engine", help="where clients run")]
Output = Annotated[str | None, typer.Option("--output", metavar="DIR", help="folder that results go into")]
Json = Annotated[bool, typer.Option("--json", help="machine-readable output, no progress")]


Clients = Annotated[list[int] | None, typer.Option("--client", help="whose update; repeatable")]
Rounds = Annotated[list[int] | None, typer.Option("--round", help="of which round; repeatable")]
