"""What a user gets from pip: one top-level name, the app inside it, a command that works anywhere."""

import json
import zipfile
from pathlib import Path

import pytest

from fedaudit import __version__
from tests.packaging.conftest import ROOT, Environment

pytestmark = pytest.mark.slow
PRESETS = sorted(path.stem for path in (ROOT / "configs").glob("*.toml"))


def sources(top: str, pattern: str = "*.py") -> set[str]:
    return {path.relative_to(ROOT).as_posix() for path in (ROOT / top).rglob(pattern)}


def test_the_wheel_holds_the_library_and_the_app_inside_it(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    packed = {name for name in names if ".dist-info/" not in name}
    app = sources("strategies") | sources("clients") | sources("configs", "*.toml")
    assert packed == sources("fedaudit") | {"fedaudit/py.typed"} | {f"fedaudit/_app/{name}" for name in app}
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_the_wheel_has_one_top_level_name(wheel: Path) -> None:
    tops = {name.partition("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert tops == {"fedaudit", f"fedaudit-{__version__}.dist-info"}


@pytest.mark.parametrize("way", ["wheel", "project", "editable"])
def test_the_command_works_from_another_folder(
    way: str, wheel: Path, project: Path, environment: Environment, elsewhere: Path
) -> None:
    what = {"wheel": [str(wheel)], "project": [str(project)], "editable": ["--editable", str(project)]}
    environment.install(*what[way])
    assert __version__ in environment.run("fedaudit", "--version", cwd=elsewhere)
    listed = json.loads(environment.run("fedaudit", "list", "presets", "--json", cwd=elsewhere))
    assert PRESETS
    assert {name for name in PRESETS if name not in json.dumps(listed)} == set()
    home = environment.run(
        "python", "-c", "import fedaudit; print(*fedaudit.__path__)", cwd=elsewhere
    ).strip()
    inside = project if way == "editable" else environment.folder
    assert Path(home).resolve().is_relative_to(inside.resolve())
    assert list(elsewhere.iterdir()) == []


def test_the_wheel_leaves_the_names_strategies_and_clients_to_the_user(
    wheel: Path, environment: Environment, elsewhere: Path
) -> None:
    environment.install(str(wheel))
    look = "from importlib.util import find_spec as f; print([f(n) for n in ('strategies', 'clients')])"
    assert environment.run("python", "-c", look, cwd=elsewhere).strip() == "[None, None]"
    load = (
        "import fedaudit._app.strategies.server_app as s, fedaudit._app.clients.client_app as c; s.app, c.app"
    )
    environment.run("python", "-c", load, cwd=elsewhere)


def test_the_tests_are_found_without_an_installation(project: Path, environment: Environment) -> None:
    # -P keeps the working folder off the path: pytest itself must find the packages at the root
    listed = environment.run("python", "-P", "-m", "pytest", "--collect-only", "-q", cwd=project)
    assert "tests/config/test_schema.py::test_every_section_says_what_it_is" in listed
    assert "fedaudit/spec.py::fedaudit.spec.Spec" in listed
    assert " error" not in listed
