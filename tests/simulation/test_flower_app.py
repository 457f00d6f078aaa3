"""The app folder that is handed to Flower's commands."""

import tomllib
import zipfile
from io import BytesIO

import pytest
from flwr.cli.build import build_fab_from_disk
from flwr.cli.config_utils import load_and_validate
from flwr.common.config import get_fused_config_from_dir, parse_config_args

import fedaudit
from fedaudit.config import RunConfig
from fedaudit.errors import ConfigError
from fedaudit.simulation.flower_app import flat_toml, write_app


def test_flower_accepts_the_app_and_packs_the_library_with_it(tmp_path):
    folder = write_app(tmp_path / "app")
    load_and_validate(folder / "pyproject.toml")
    names = set(zipfile.ZipFile(BytesIO(build_fab_from_disk(folder))).namelist())
    assert {"fedaudit/federation/setup.py", "strategies/server_app.py", "clients/client_app.py"} <= names
    assert not any("_app/" in name or "__pycache__" in name for name in names)


def test_flower_reads_back_the_configuration_it_is_given(tmp_path):
    folder = write_app(tmp_path / "app")
    assert get_fused_config_from_dir(folder, {}) == RunConfig().flat()
    wanted = RunConfig.from_flat({"train.lr": 2.0, "output.directory": "a 'b' \"c\" \\ é \U0001f600 \x7f\n"})
    (tmp_path / "run.toml").write_text(flat_toml(wanted.flat()), encoding="utf-8")
    fused = get_fused_config_from_dir(folder, parse_config_args([str(tmp_path / "run.toml")]))
    assert RunConfig.from_flat(fused) == wanted
    assert {key: type(value) for key, value in fused.items()} == {
        key: type(value) for key, value in wanted.flat().items()
    }


def test_keys_of_the_flat_form_are_not_nested():
    assert tomllib.loads(flat_toml({"data.name": "digits"})) == {"data.name": "digits"}


def test_a_package_without_its_app_is_named(tmp_path, monkeypatch):
    (tmp_path / "fedaudit").mkdir()
    monkeypatch.setattr(fedaudit, "__file__", str(tmp_path / "fedaudit" / "__init__.py"))
    with pytest.raises(ConfigError, match="has a folder 'strategies', got none"):
        write_app(tmp_path / "app")
