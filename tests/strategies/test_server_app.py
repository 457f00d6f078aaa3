"""The ServerApp meets its nodes before it starts, and refuses what cannot be right."""

import pytest
from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from clients.client_app import app as reference_client
from fedaudit.config import RunConfig
from fedaudit.errors import ConfigError, RunFailedError
from fedaudit.simulation.in_process import InProcessGrid
from strategies import server_app


def claiming(*partitions: int, of: int) -> ClientApp:
    """An app whose nodes claim these partitions, whatever the engine gave them."""
    app = ClientApp()

    @app.query("whoami")
    def whoami(message: Message, context: Context) -> Message:
        claimed = partitions[int(context.node_config["partition-id"])]
        place = MetricRecord({"partition-id": claimed, "num-partitions": of})
        return Message(RecordDict({"whoami": place}), reply_to=message)

    return app


def test_nodes_are_met_with_their_partitions():
    with InProcessGrid(claiming(2, 0, 1, of=3), 3, seed=1) as grid:
        nodes = grid.get_node_ids()
        assert server_app.meet(grid, 3) == dict(zip(nodes, (2, 0, 1), strict=True))


@pytest.mark.parametrize("claims", [(0, 0, 1), (0, 1, 3)], ids=["twice", "gap"])
def test_nodes_that_do_not_share_the_partitions_are_refused(claims):
    with (
        InProcessGrid(claiming(*claims, of=3), 3, seed=1) as grid,
        pytest.raises(RunFailedError, match=rf"one partition from 0 to 2, got \[{claims[0]}, .*partition-id"),
    ):
        server_app.meet(grid, 3)


def test_a_node_that_does_not_know_its_partition_is_refused_at_once():
    class Misconfigured(InProcessGrid):
        def _reply(self, message, context):
            context.node_config["partition-id"] = 7
            return super()._reply(message, context)

    with (
        Misconfigured(reference_client, 2, seed=1) as grid,
        pytest.raises(RunFailedError, match=r"partition-id is a number from 0 .* = 1, got 7"),
    ):
        server_app.meet(grid, 2)


def test_the_server_waits_for_missing_nodes_and_then_says_how_many_came(monkeypatch):
    clock = iter(range(0, 10**6, 100))
    monkeypatch.setattr(server_app.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(server_app.time, "sleep", lambda _: None)
    with (
        InProcessGrid(claiming(0, 1, of=3), 2, seed=1) as grid,
        pytest.raises(RunFailedError, match="nodes must join within 600 s, got 2: start more"),
    ):
        server_app.meet(grid, 3)


class Deployed(InProcessGrid):
    """Not one of the simulation's grids by name: the server takes it for a deployment."""


def served(grid, **changes):
    config = RunConfig.from_flat({"federation.clients": 2, "data.max-examples": 100, **changes}).flat()
    server_app.app(grid, Context(grid.run.run_id, 0, {}, RecordDict(), config))


def test_a_deployment_has_no_oracle(tmp_path):
    changes = {"audit.observers": "server, oracle", "output.directory": str(tmp_path)}
    with (
        Deployed(reference_client, 2, RunConfig.from_flat(changes).flat(), seed=1) as grid,
        pytest.raises(ConfigError, match="'oracle' exists in simulation only, got a deployment"),
    ):
        served(grid, **changes)
    assert not list(tmp_path.iterdir())
