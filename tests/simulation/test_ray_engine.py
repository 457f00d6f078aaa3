"""The Ray engine against the in-process one; slow, because every run starts Ray."""

import os

import numpy as np
import pytest

from fedaudit.errors import ConfigError, RunFailedError
from fedaudit.progress import listen
from fedaudit.simulation import flower_internals as internals
from fedaudit.simulation import ray_engine
from fedaudit.simulation.run import run_federation
from tests.simulation import apps

CONFIG = {"rate": 0.3, "name": "x"}


@pytest.mark.slow
def test_ray_and_in_process_agree_on_weights_configuration_and_errors(capfd):
    ray = pytest.importorskip("ray")
    environment, identity = dict(os.environ), internals.current_run()
    events = []
    run_federation(apps.server_app, apps.client_app, num_clients=4, run_config=CONFIG)
    in_process = dict(apps.outcome)
    with listen(events.append):
        run_federation(
            apps.server_app, apps.client_app, num_clients=4, run_config=CONFIG, engine="ray", workers=2
        )
    on_ray = dict(apps.outcome)

    assert on_ray["config"] == in_process["config"] == CONFIG
    by_partition = sorted(on_ray["client configs"], key=lambda config: config["partition-id"])
    assert by_partition == in_process["client configs"]
    for key, values in in_process["weights"].items():
        np.testing.assert_allclose(on_ray["weights"][key], values, atol=1e-6)
    assert on_ray["calls"] == in_process["calls"]

    for kind in ("train.fail", "train.changes_config", "train.returns_nothing"):
        (code, reason), (ray_code, ray_reason) = in_process[kind], on_ray[kind]
        assert code == ray_code, kind
        start, _, text = reason.partition(":<'")
        assert ray_reason.startswith("<class '") and ray_reason.endswith("'>")
        assert start.rpartition(".")[2].strip("'>").removeprefix("<class '") in ray_reason
        words = text.partition("(run_id")[0].removesuffix("'>")  # Flower draws the run's number
        assert words in ray_reason, kind

    rounds = [(e.round, e.done, e.total) for e in events if e.stage == "client"]
    assert rounds[3:] == [(r, i, 4) for r in (1, 2) for i in (1, 2, 3, 4)]
    assert capfd.readouterr() == ("", "")
    assert not ray.is_initialized()
    assert dict(os.environ) == environment
    assert internals.current_run() == identity


@pytest.mark.slow
def test_a_failing_server_app_on_ray_is_a_failed_run_and_not_a_hang():
    ray = pytest.importorskip("ray")
    with pytest.raises(RunFailedError, match="the ServerApp raised ZeroDivisionError: in the ServerApp"):
        run_federation(apps.failing_server_app, apps.client_app, num_clients=2, run_config={}, engine="ray")
    assert not ray.is_initialized()


@pytest.mark.slow
def test_actors_that_do_not_fit_end_the_run_and_its_server_thread(monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setattr(ray_engine.torch.cuda, "is_available", lambda: True)
    with pytest.raises(
        RunFailedError, match=r"engine stopped before the ServerApp had finished: .*ActorPool is empty"
    ):
        run_federation(
            apps.waiting_server_app,
            apps.client_app,
            num_clients=2,
            run_config={},
            engine="ray",
            gpu_share=1.0,
        )
    thread = apps.outcome["thread"]
    thread.join(timeout=10)
    assert not thread.is_alive()


def test_a_share_of_a_gpu_needs_a_gpu(monkeypatch):
    monkeypatch.setattr(ray_engine.torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"gpu-share=0.5 needs a CUDA device"):
        run_federation(
            apps.server_app, apps.client_app, num_clients=2, run_config={}, engine="ray", gpu_share=0.5
        )


def test_ray_must_be_installed(monkeypatch):
    monkeypatch.setattr(ray_engine.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="needs Ray, which is not installed"):
        run_federation(apps.server_app, apps.client_app, num_clients=2, run_config={}, engine="ray")


def test_the_environment_is_set_for_the_run_and_restored(monkeypatch):
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "1")
    monkeypatch.delenv("FLWR_DISABLE_UPDATE_CHECK", raising=False)
    before = dict(os.environ)
    with ray_engine._environment():
        assert os.environ["RAY_USAGE_STATS_ENABLED"] == "1"  # the user's word stands
        assert os.environ["FLWR_DISABLE_UPDATE_CHECK"] == "1"
        assert os.getcwd() in os.environ["PYTHONPATH"].split(os.pathsep)
    assert dict(os.environ) == before
