"""A SuperLink and two SuperNodes on this machine against the in-process engine."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import load_file

from fedaudit.config import RunConfig
from fedaudit.errors import ConfigError, RunFailedError
from fedaudit.federation.execution import execute
from fedaudit.records import load_run
from fedaudit.simulation.flower_app import flat_toml
from fedaudit.simulation.loopback import HOST, deployed, flower_environment, free_ports, run_on_loopback
from tests.simulation.leftovers import MARK, leftovers

CONFIG = {
    "data.max-examples": 400,
    "model.name": "mlp(hidden=16, activation=tanh)",
    "federation.clients": 2,
    "federation.rounds": 3,
    "federation.device": "cpu",
    "train.lr": 0.5,
    "train.batch-size": 8,
    "train.local-steps": 4,
    "audit.measures": "cohort-gradient-uniqueness, update-norm, update-cosine",
}


def config(**changes) -> RunConfig:
    return RunConfig.from_flat({**CONFIG, **changes})


def server_side(folder: Path) -> pd.Series:
    """The values the server measured, by round, quantity and client."""
    rows = load_run(folder).records
    rows = rows[(rows["observer"] == "server") & (rows["quantity"] != "round-seconds")]
    return rows.set_index(["round", "quantity", "client_id"])["value"].sort_index()


@pytest.mark.slow
def test_the_script_deploys_three_rounds_that_equal_in_process_ones_and_leaves_no_process(tmp_path):
    (tmp_path / "run.toml").write_text(flat_toml(CONFIG))
    script = [sys.executable, "-m", "fedaudit.simulation.loopback", str(tmp_path / "run.toml")]
    script += ["--output", str(tmp_path / "deployed"), "--nodes", "2", "--timeout", "400"]
    done = subprocess.run(
        script,
        env={**os.environ, MARK: str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert leftovers(str(tmp_path)) == []
    assert "3 rounds on 2 nodes" in done.stdout

    run = load_run(tmp_path / "deployed")
    assert (run.path / "report.html").stat().st_size > 10_000
    assert run.info["run"]["engine"] == "deployment"
    assert sorted(run.records["round"].unique()) == [0, 1, 2, 3]
    assert set(run.records["status"]) == {"ok"}

    execute(config(**{"output.directory": str(tmp_path), "output.name": "in-process"}))
    weights, expected = (
        load_file(tmp_path / name / "weights.safetensors") for name in ("deployed", "in-process")
    )
    assert weights.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(weights[name], values, rtol=0, atol=1e-5)
    measured = server_side(tmp_path / "deployed")
    quantities = {"accuracy", "loss", "cohort-gradient-uniqueness", "update-norm", "update-cosine"}
    assert set(measured.index.get_level_values("quantity")) >= quantities
    pd.testing.assert_series_equal(measured, server_side(tmp_path / "in-process"), rtol=1e-5, atol=0)


@pytest.mark.slow
def test_an_app_that_fails_is_a_failed_run_that_shows_its_log_and_leaves_no_process(tmp_path, monkeypatch):
    monkeypatch.setenv(MARK, str(tmp_path))
    with pytest.raises(RunFailedError, match=r"(?s)'finished:failed'.*no strategy is named 'Nobody'"):
        run_on_loopback(config(**{"strategy.name": "Nobody"}), tmp_path / "run")
    assert leftovers(str(tmp_path)) == []
    assert {path.name for path in (tmp_path / "run/logs").iterdir()} == {
        "superlink.log",
        "supernode-0.log",
        "supernode-1.log",
    }


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_an_interrupted_script_leaves_no_process(tmp_path, number):
    (tmp_path / "run.toml").write_text(flat_toml(CONFIG))
    script = [sys.executable, "-m", "fedaudit.simulation.loopback", str(tmp_path / "run.toml")]
    process = subprocess.Popen(
        [*script, "--output", str(tmp_path / "run")],
        env={**os.environ, MARK: str(tmp_path)},
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not any("flower-supernode" in command for command in leftovers(str(tmp_path))):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, "interrupted" in errors) == (1, True)
    assert leftovers(str(tmp_path)) == []


@pytest.mark.slow
def test_a_superlink_without_its_port_is_a_failed_run(tmp_path, monkeypatch):
    monkeypatch.setenv(MARK, str(tmp_path))
    with socket.socket() as taken:
        taken.bind((HOST, 0))
        taken.listen()
        with pytest.raises(RunFailedError, match=r"(?s)the superlink must run until it is stopped.*in use"):
            run_on_loopback(config(), tmp_path / "run", port=taken.getsockname()[1])
    assert leftovers(str(tmp_path)) == []


def test_what_cannot_be_deployed_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="may list 'oracle' in simulation only"):
        deployed(config(**{"audit.observers": "server, oracle"}), tmp_path, 2)
    with pytest.raises(ConfigError, match="resumed by the in-process engine only"):
        deployed(config(**{"output.resume": True}), tmp_path, 2)
    (tmp_path / "audit").mkdir()
    (tmp_path / "audit/round-00001.parquet").touch()
    with pytest.raises(ConfigError, match="a folder of its own"):
        deployed(config(), tmp_path, 2)


def test_the_deployed_configuration_does_not_depend_on_the_working_folder(tmp_path):
    found = deployed(config(), tmp_path / "runs" / "one", 3)
    assert (found.federation.engine, found.federation.clients) == ("deployment", 3)
    assert (found.output.directory, found.output.name) == (str(tmp_path / "runs"), "one")
    assert Path(found.data.root).is_absolute()


def test_flower_finds_its_commands_beside_this_python_and_calls_nobody(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("FLWR_TELEMETRY_ENABLED")
    environment = flower_environment(tmp_path)
    assert environment["FLWR_TELEMETRY_ENABLED"] == "0"
    assert environment["FLWR_HOME"] == str(tmp_path)
    assert environment["NO_PROXY"].startswith(HOST)


def test_missing_commands_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr("fedaudit.simulation.loopback.COMMANDS", ("flower-nothing",))
    with pytest.raises(ConfigError, match="got no 'flower-nothing'"):
        flower_environment(tmp_path)


def test_free_ports_are_distinct():
    assert len(set(free_ports(20))) == 20
