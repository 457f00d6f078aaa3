"""The Flower App Bundle: everything the app needs, on a machine that has no checkout."""

import zipfile
from pathlib import Path

import pytest
from flwr.common.config import get_fused_config_from_dir, parse_config_args

from fedaudit.config import RunConfig, load_config
from fedaudit.config.files import presets
from fedaudit.config.schema import known_keys
from tests.packaging.conftest import Environment

pytestmark = pytest.mark.slow


@pytest.fixture
def bundle(project: Path, environment: Environment, elsewhere: Path) -> Path:
    """The bundle that Flower builds from the project, unpacked."""
    build = "from flwr.cli.app import app; app()"
    environment.run(
        "python",
        "-c",
        build,
        "build",
        "--app",
        str(project),
        cwd=elsewhere,
        FLWR_HOME=str(elsewhere / "home"),
    )
    (fab,) = elsewhere.glob("*.fab")
    assert fab.name.startswith("fedaudit.fedaudit.")
    unpacked = elsewhere / "unpacked"
    zipfile.ZipFile(fab).extractall(unpacked)
    return unpacked


def test_the_bundle_holds_the_library_the_app_and_its_presets(project: Path, bundle: Path) -> None:
    parts = (("fedaudit", "*.py"), ("strategies", "*.py"), ("clients", "*.py"), ("configs", "*.toml"))
    for top, pattern in parts:
        wanted = {path.relative_to(project) for path in (project / top).rglob(pattern)}
        assert wanted
        assert {path.relative_to(bundle) for path in (bundle / top).rglob("*.*")} == wanted
    assert not (bundle / "tests").exists()


def test_the_bundle_loads_where_there_is_no_checkout(
    bundle: Path, environment: Environment, tmp_path: Path
) -> None:
    load = (
        "import fedaudit, strategies.server_app as s, clients.client_app as c;"
        "print(type(s.app).__name__, type(c.app).__name__, *fedaudit.__path__)"
    )
    printed = environment.run("python", "-P", "-c", load, cwd=tmp_path, PYTHONPATH=str(bundle))
    assert printed.split() == ["ServerApp", "ClientApp", str(bundle / "fedaudit")]


def test_flower_fuses_every_preset_into_the_configuration_it_means(bundle: Path) -> None:
    assert presets()
    for name, path in presets().items():
        fused = get_fused_config_from_dir(bundle, parse_config_args([str(path)]))
        assert set(fused) == set(known_keys())
        assert RunConfig.from_flat(fused) == load_config(name)
