"""`flwr run .` in a checkout, as Flower's own documentation tells users to run an app."""

import re
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from fedaudit.config import RunConfig
from fedaudit.federation.execution import execute
from fedaudit.records import load_run
from fedaudit.simulation.flower_app import flat_toml
from fedaudit.simulation.loopback import ask_flower, flower_environment, free_ports, run_status
from fedaudit.simulation.processes import Processes
from tests.simulation.leftovers import MARK, leftovers

SUPERNODES = 2  # Flower's default, whatever federation.clients says
CONFIG = {
    "data.max-examples": 400,
    "model.name": "mlp(hidden=16, activation=tanh)",
    "federation.clients": 10,
    "federation.rounds": 3,
    "federation.device": "cpu",
    "train.local-steps": 4,
    "audit.measures": "example-gradient-uniqueness, cohort-gradient-uniqueness, update-norm",
    "audit.observers": "server, oracle",
}


@pytest.mark.slow
def test_flwr_run_in_a_checkout_gives_records_and_the_weights_of_the_in_process_engine(
    project: Path, tmp_path: Path
) -> None:
    pytest.importorskip("ray")
    place = {"output.directory": str(tmp_path), "output.name": "flwr"}
    (tmp_path / "run.toml").write_text(flat_toml({**CONFIG, **place}))
    ports = dict(zip(("HTTP_API", "SUPERLINK_CONTROL"), free_ports(2), strict=True))
    environment = flower_environment(tmp_path / "home") | {
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(ports["HTTP_API"]),
        "FLWR_LOCAL_CONTROL_API_PORT": str(ports["SUPERLINK_CONTROL"]),
        MARK: str(tmp_path),
    }
    with Processes(tmp_path / "logs", environment) as processes:
        submit = ["run", str(project), "--run-config", str(tmp_path / "run.toml"), "--format", "json"]
        processes.start("flwr", "flwr", *submit)
        while not processes.ended():  # it leaves a SuperLink behind, which must be seen before it ends
            processes.look()
            time.sleep(0.05)
        found = re.search(r'"run-id": "(\d+)"', processes.log("flwr").read_text())
        assert found, processes.log("flwr").read_text()
        deadline = time.monotonic() + 300
        status = ""
        while not status.startswith("finished"):
            assert time.monotonic() < deadline
            time.sleep(2)
            processes.look()
            status, _ = run_status(environment, found[1])
        assert status == "finished:completed", ask_flower(environment, "log", found[1], "--show")
    assert leftovers(str(tmp_path)) == []

    run = load_run(tmp_path / "flwr")
    assert run.info["run"]["engine"] == "ray"
    assert run.info["config"]["federation.clients"] == SUPERNODES
    assert set(run.records["status"]) == {"ok"}
    by_oracle = run.records[run.records["observer"] == "oracle"]
    assert by_oracle.groupby(["round", "client_id"]).size().to_dict() == {
        (number, client): 1 for number in (1, 2, 3) for client in range(SUPERNODES)
    }
    same = {"federation.clients": SUPERNODES, "output.directory": str(tmp_path), "output.name": "in-process"}
    here = execute(RunConfig.from_flat({**CONFIG, **same}))
    expected = load_file(here.path / "weights.safetensors")
    for name, values in load_file(run.path / "weights.safetensors").items():
        np.testing.assert_allclose(values, expected[name], rtol=0, atol=1e-5)
    oracle_here = here.records[here.records["observer"] == "oracle"]["value"].to_numpy()
    np.testing.assert_allclose(by_oracle["value"].to_numpy(), oracle_here, rtol=1e-5)
