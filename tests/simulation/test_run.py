import logging
import random

import numpy as np
import pytest
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg

from fedaudit.errors import BudgetExhaustedError, ConfigError, RunFailedError
from fedaudit.simulation import flower_internals as internals
from fedaudit.simulation.run import run_federation
from tests.simulation.apps import client_app, failing_server_app, initial, outcome, server_app, train_message


def test_the_run_configuration_arrives_at_both_apps():
    run_federation(server_app, client_app, num_clients=3, run_config={"rate": 0.5})
    assert outcome["config"] == {"rate": 0.5}
    assert outcome["client configs"] == [
        {"rate": 0.5, "partition-id": i, "num-partitions": 3} for i in range(3)
    ]
    np.testing.assert_allclose(outcome["weights"]["w"], 2 * 0.5 * 2.0, rtol=1e-6)


def test_an_exception_of_the_server_app_is_a_failed_run_with_its_cause():
    with pytest.raises(
        RunFailedError, match="the ServerApp raised ZeroDivisionError: in the ServerApp"
    ) as info:
        run_federation(failing_server_app, client_app, num_clients=2, run_config={})
    assert isinstance(info.value.__cause__, ZeroDivisionError)


def test_an_error_of_ours_comes_through_as_it_is():
    app = ServerApp()

    @app.main()
    def main(grid, context):
        raise BudgetExhaustedError("spent")

    with pytest.raises(BudgetExhaustedError, match="spent"):
        run_federation(app, client_app, num_clients=2, run_config={})


def test_the_process_speaks_for_nobody_after_a_run_even_a_failed_one():
    before = internals.current_run()
    with pytest.raises(RunFailedError):
        run_federation(failing_server_app, client_app, num_clients=2, run_config={})
    assert internals.current_run() == before


def test_the_grid_can_be_set_up_before_the_server_app():
    def ten_calls(grid):
        grid.send_and_receive([train_message(n) for n in grid.get_node_ids() for _ in range(10)])

    run_federation(server_app, client_app, num_clients=2, run_config={}, grid_setup=ten_calls)
    assert outcome["calls"] == 12


def test_an_unknown_engine_is_refused():
    with pytest.raises(ConfigError, match="engines on this machine are in-process, ray, got 'deployment'"):
        run_federation(server_app, client_app, num_clients=2, run_config={}, engine="deployment")


def test_the_global_generators_are_left_alone():
    random.seed(5)
    np.random.seed(5)
    before = random.getstate(), np.random.get_state()[1].copy()
    app = ServerApp()

    @app.main()
    def main(grid, context):
        grid.send_and_receive([train_message(n) for n in grid.get_node_ids()])

    run_federation(app, client_app, num_clients=3, run_config={}, seed=9)
    assert random.getstate() == before[0]
    np.testing.assert_array_equal(np.random.get_state()[1], before[1])


def test_flowers_commentary_is_held_back_during_the_run_only(caplog):
    app, seen = ServerApp(), []

    @app.main()
    def main(grid, context):
        seen.append(logging.getLogger("flwr").level)
        FedAvg(fraction_evaluate=0.0).start(grid, initial(), num_rounds=1)

    flower = logging.getLogger("flwr")
    before = flower.level
    flower.setLevel(logging.DEBUG)  # Flower's own default; its console handler asks for INFO
    curious = logging.NullHandler(level=logging.DEBUG)
    try:
        run_federation(app, client_app, num_clients=2, run_config={})
        assert (seen, flower.level) == ([logging.WARNING], logging.DEBUG)
        assert "Starting FedAvg" not in caplog.text
        flower.addHandler(curious)
        run_federation(app, client_app, num_clients=2, run_config={})
        assert seen == [logging.WARNING, logging.DEBUG]
        assert "Starting FedAvg" in caplog.text
    finally:
        flower.removeHandler(curious)
        flower.setLevel(before)


def test_a_client_state_is_private_to_its_run():
    run_federation(server_app, client_app, num_clients=2, run_config={})
    run_federation(server_app, client_app, num_clients=2, run_config={})
    assert outcome["calls"] == 2
