"""The command `fedaudit`: run, compare, calibrate, tune, attack, membership, attribute, diagnose, ...

Exit codes: 0 done, 1 a run failed or a claim is violated, 2 bad input.
Heavy imports wait until a command needs them.
"""

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from fedaudit import __version__
from fedaudit.cli import federations, kept_updates, parts
from fedaudit.errors import ConfigError, DataError, FedauditError, RecordError

INTERRUPTED = 130  # what Typer makes of Ctrl-C; other versions raise Abort

cli = typer.Typer(
    name="fedaudit",
    help="Federated learning simulation with leakage auditing: what do these updates give away?",
    add_completion=False,
    pretty_exceptions_enable=False,
)


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


for command in (
    federations.run,
    federations.compare,
    federations.calibrate,
    federations.tune,
    kept_updates.attack,
    kept_updates.membership,
    kept_updates.attribute,
    kept_updates.diagnose,
    federations.report,
    kept_updates.verify,
):
    cli.command()(command)
cli.command("list")(parts.list_parts)


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
