"""What starting up costs: neither torch nor flwr before they are needed."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = {"torch", "flwr", "ray", "opacus", "sklearn", "pandas", "plotly"}


def imported_by(*arguments: str) -> set[str]:
    """Top-level modules that a fresh interpreter imports."""
    command = [sys.executable, "-X", "importtime", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = (line.rpartition("|")[2].strip() for line in done.stderr.splitlines())
    return {name.partition(".")[0] for name in rows}


@pytest.mark.parametrize(
    "arguments",
    [
        ("-c", "import fedaudit"),
        ("-c", "import fedaudit.config"),
        ("-c", "import fedaudit.records"),
        ("-m", "fedaudit", "--help"),
        ("-m", "fedaudit", "run", "--help"),
        ("-m", "fedaudit", "list", "presets"),
    ],
    ids=" ".join,
)
def test_starting_up_imports_neither_torch_nor_flwr(arguments: tuple[str, ...]) -> None:
    names = imported_by(*arguments)
    assert "fedaudit" in names
    assert names & HEAVY == set()


def test_the_list_of_imports_sees_an_import() -> None:
    assert "sqlite3" in imported_by("-c", "import sqlite3.dbapi2")


def test_every_public_name_is_there() -> None:
    import fedaudit

    assert [name for name in fedaudit.__all__ if not hasattr(fedaudit, name)] == []
    with pytest.raises(AttributeError, match="module 'fedaudit' has no attribute 'nothing'"):
        _ = fedaudit.nothing
