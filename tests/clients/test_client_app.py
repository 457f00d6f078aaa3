"""The reference client: what it trains, what it says of itself, and what it never sends."""

import dataclasses
import json
import math
from typing import ClassVar

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg
from torch.nn import functional

from clients.client_app import app
from fedaudit.config import RunConfig
from fedaudit.federation.execution import execute
from fedaudit.federation.setup import setup
from fedaudit.flower.arrays import from_state_dict, to_state_dict
from fedaudit.flower.messages import AUDIT_RECORD, decode_finding
from fedaudit.records import load_run
from fedaudit.simulation.in_process import InProcessGrid
from fedaudit.training.local import evaluate
from fedaudit.types import Estimate
from strategies.flower_strategies import build_strategy

N = 3
SMALL = {
    "data.max-examples": 300,
    "model.name": "mlp(hidden=8)",
    "federation.clients": N,
    "federation.rounds": 2,
    "train.batch-size": 8,
    "train.local-steps": 2,
    "train.lr": 0.5,
}
MEASURES = "example-gradient-uniqueness, mutual-information(steps=10)"


def flat(**changes):
    dotted = {key.replace("__", ".").replace("_", "-"): value for key, value in changes.items()}
    return RunConfig.from_flat({**SMALL, **dotted}).flat()


def ask(config, round_number=1, kind="train", partition=0, grid_type=InProcessGrid, **sent):
    """The reply of one client that holds `partition` to a message with the run's initial weights."""
    with grid_type(app, N, config, seed=1) as grid:
        settings = ConfigRecord({"server-round": round_number, **sent})
        arrays = from_state_dict(setup(config).build_model().state_dict())
        content = RecordDict({"arrays": arrays, "config": settings})
        node = grid.get_node_ids()[partition]
        (reply,) = grid.send_and_receive([Message(content, node, kind)])
    return reply


@pytest.fixture(scope="module")
def both_observers(tmp_path_factory):
    """A run in which a client and the oracle measure the same."""
    folder = tmp_path_factory.mktemp("runs")
    config = flat(audit__measures=MEASURES, audit__observers="client, oracle", output__directory=str(folder))
    return execute(RunConfig.from_flat(config)).records


def test_a_client_finds_what_the_oracle_finds(both_observers):
    for quantity in ("example-gradient-uniqueness", "mutual-information"):
        rows = both_observers[both_observers["quantity"] == quantity]
        found = rows.pivot(index=["round", "client_id"], columns="observer", values="value")
        assert set(found.columns) == {"client", "oracle"} and len(found) == 2 * N
        assert found.notna().all(axis=None)
        if quantity == "example-gradient-uniqueness":
            assert (found["client"] == found["oracle"]).all()
        else:  # a client trains a critic on its own examples, the oracle one on those of all clients
            assert found["client"].tolist() == pytest.approx(found["oracle"].tolist(), rel=0.05)


def test_a_clients_rows_carry_unit_kind_and_time_like_the_oracles(both_observers):
    rows = both_observers[both_observers["quantity"] == "example-gradient-uniqueness"]
    rows = rows.sort_values(["round", "client_id"])
    client, oracle = (rows[rows["observer"] == name] for name in ("client", "oracle"))
    for column in ("unit", "kind", "extra"):
        assert client[column].tolist() == oracle[column].tolist(), column
    assert (client["seconds"] > 0).all() and (client["status"] == "ok").all()


def test_a_client_sends_weights_metrics_and_short_scalars_and_nothing_else():
    config = flat(audit__measures=MEASURES, audit__observers="client", defense__name="dp-sgd")
    content = ask(config).content
    assert set(content) == {"arrays", "metrics", AUDIT_RECORD}
    assert {name: array.shape for name, array in content["arrays"].items()} == {
        name: tuple(tensor.shape) for name, tensor in setup(config).build_model().state_dict().items()
    }
    assert set(content["metrics"]) == {"num-examples"}  # no noise protects a loss: it is not sent
    beside = content[AUDIT_RECORD]
    assert isinstance(beside, ConfigRecord)
    scalars = {"partition-id", "steps", "epsilon", "delta", "privacy-unit", "accountant"}
    findings = {f"measure.{name}" for name in ("example-gradient-uniqueness", "mutual-information")}
    assert set(beside) == scalars | findings
    assert all(isinstance(value, (int, float, str)) for value in beside.values())
    for name in findings:
        assert len(beside[name]) < 1500
        assert all(not isinstance(value, list) for value in leaves(json.loads(beside[name])))
        finding, seconds = decode_finding(beside[name])
        assert isinstance(finding, Estimate) and math.isfinite(finding.value) and seconds > 0


def leaves(value):
    if isinstance(value, dict):
        for item in value.values():
            yield from leaves(item)
    else:
        yield value


def test_a_client_without_a_guarantee_to_keep_reports_its_loss():
    metrics = ask(flat()).content["metrics"]
    assert set(metrics) == {"num-examples", "train-loss"} and metrics["train-loss"] > 0


def test_a_client_that_is_not_asked_to_measure_says_nothing_of_its_examples():
    beside = ask(flat(audit__measures=MEASURES, audit__observers="server, oracle")).content[AUDIT_RECORD]
    assert dict(beside) == {"partition-id": 0, "steps": 2}


def test_a_client_measures_in_the_rounds_that_are_due():
    config = flat(audit__measures=MEASURES, audit__observers="client", audit__every=3, federation__rounds=5)
    due = [
        number
        for number in range(1, 6)
        if any(key.startswith("measure.") for key in ask(config, number).content[AUDIT_RECORD])
    ]
    assert due == [1, 3, 5]


def test_a_measure_that_fails_on_a_client_is_a_failed_row_and_the_client_still_trains(tmp_path, monkeypatch):
    from fedaudit.measures.gradient_uniqueness import ExampleGradientUniqueness

    def broken(self, updates, ctx):
        raise RuntimeError("singular")

    monkeypatch.setattr(ExampleGradientUniqueness, "__call__", broken)
    config = flat(
        audit__measures="example-gradient-uniqueness, update-norm",
        audit__observers="server, client",
        output__directory=str(tmp_path),
    )
    records = execute(RunConfig.from_flat(config)).records
    failed = records[records["quantity"] == "example-gradient-uniqueness"]
    assert set(failed["status"]) == {"failed"} and failed["reason"].str.contains("singular").all()
    assert set(failed["observer"]) == {"client"} and len(failed) == 2 * N
    assert (records["quantity"] == "update-norm").sum() == 2 * N


def naive_round(config, client, round_number, mu):
    """Plain SGD on the planned batches, the proximal term added to the loss as FedProx writes it."""
    made = setup(config)
    model, start = made.build_model(), made.build_model()
    x, y = made.client_data(client)
    lr = made.config.train.lr * made.config.train.lr_decay ** (round_number - 1)
    for batch in made.batches(client, round_number):
        loss = functional.cross_entropy(model(x[batch]), y[batch])
        pairs = zip(model.parameters(), start.parameters(), strict=True)
        loss = loss + mu / 2 * sum(((w - w0.detach()) ** 2).sum() for w, w0 in pairs)
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= lr * parameter.grad
    return model.state_dict()


@pytest.mark.parametrize(
    ("round_number", "decay", "mu"),
    [(1, 1.0, 0.0), (1, 0.5, 0.0), (4, 0.5, 0.0), (1, 1.0, 0.9), (3, 0.7, 0.3)],
)
def test_learning_rate_decay_and_proximal_term_reach_training(round_number, decay, mu):
    config = flat(train__lr_decay=decay, train__local_steps=5)
    sent = {"proximal-mu": mu} if mu else {}
    trained = to_state_dict(ask(config, round_number, partition=1, **sent).content["arrays"])
    expected = naive_round(config, 1, round_number, mu)
    for name, tensor in expected.items():
        torch.testing.assert_close(trained[name], tensor, rtol=1e-5, atol=1e-6)
    other = naive_round(config, 1, round_number, mu + 0.5)
    assert not all(
        torch.allclose(trained[name], tensor, rtol=1e-5, atol=1e-6) for name, tensor in other.items()
    )


def test_fedprox_sends_its_proximal_term_to_the_clients():
    config = flat(train__local_steps=5)
    ends = {}
    for mu in (0.1, 2.0):
        strategy = build_strategy(
            f"FedProx(proximal-mu={mu})", clients=N, fraction_train=1.0, min_available=N
        )
        start = from_state_dict(setup(config).build_model().state_dict())
        with InProcessGrid(app, N, config, seed=1) as grid:
            end = to_state_dict(strategy.start(grid, start, num_rounds=1).arrays)
        clients = [naive_round(config, client, 1, mu) for client in range(N)]
        sizes = torch.tensor([len(rows) for rows in setup(config).partitions], dtype=torch.float32)
        for name, tensor in end.items():
            stacked = torch.stack([state[name] for state in clients])
            mean = torch.einsum("n,n...->...", sizes / sizes.sum(), stacked)
            torch.testing.assert_close(tensor, mean, rtol=1e-5, atol=1e-6)
        ends[mu] = end
    assert not all(torch.allclose(ends[0.1][name], ends[2.0][name]) for name in ends[0.1])


def test_clients_evaluate_the_global_weights_on_their_own_examples():
    config = flat()
    made = setup(config)
    strategy = FedAvg(fraction_train=0.0, fraction_evaluate=1.0, min_available_nodes=N, min_evaluate_nodes=N)
    model = made.build_model()
    with InProcessGrid(app, N, config, seed=1) as grid:
        result = strategy.start(grid, from_state_dict(model.state_dict()), num_rounds=1)
    own = [evaluate(model, *made.client_data(client)) for client in range(N)]
    sizes = [len(rows) for rows in made.partitions]
    for position, key in enumerate(("loss", "accuracy")):
        mean = sum(size * values[position] for size, values in zip(sizes, own, strict=True)) / sum(sizes)
        assert result.evaluate_metrics_clientapp[1][key] == pytest.approx(mean, rel=1e-6)


def test_training_leaves_the_message_it_came_with_unchanged():
    config = flat()
    made = setup(config)
    arrays = from_state_dict(made.build_model().state_dict())
    before = {name: array.data for name, array in arrays.items()}
    context = Context(1, 1, {"partition-id": 0, "num-partitions": N}, RecordDict(), config)
    with InProcessGrid(app, N, config, seed=1) as grid:
        content = RecordDict({"arrays": arrays, "config": ConfigRecord({"server-round": 1})})
        app(Message(content, grid.get_node_ids()[0], "train"), context)
    assert {name: array.data for name, array in arrays.items()} == before


class Placed(InProcessGrid):
    """Nodes whose operator wrote this into --node-config."""

    node_config: ClassVar[dict] = {}

    def _reply(self, message, context):
        return super()._reply(message, dataclasses.replace(context, node_config=dict(self.node_config)))


@pytest.mark.parametrize(
    ("node_config", "sentence"),
    [
        ({"partition-id": 7, "num-partitions": 3}, "number from 0 to num-partitions - 1 = 2, got 7"),
        ({"partition-id": -1, "num-partitions": 3}, "number from 0 to num-partitions - 1 = 2, got -1"),
        ({"num-partitions": 3}, "holds the whole numbers partition-id and num-partitions, got {'num-part"),
        ({"partition-id": "first", "num-partitions": 3}, "holds the whole numbers partition-id"),
    ],
    ids=["beyond", "negative", "missing", "text"],
)
@pytest.mark.parametrize("kind", ["train", "evaluate", "query.whoami"])
def test_a_node_without_a_partition_answers_with_a_clear_error(kind, node_config, sentence):
    placed = type("Misplaced", (Placed,), {"node_config": node_config})
    reply = ask(flat(), kind=kind, grid_type=placed)
    assert reply.has_error() and sentence in reply.error.reason and "--node-config" in reply.error.reason


def test_a_client_says_which_partition_it_holds():
    place = ask(flat(), kind="query.whoami", partition=2).content["whoami"]
    assert isinstance(place, MetricRecord) and dict(place) == {"partition-id": 2, "num-partitions": N}


def test_a_spent_budget_is_an_error_reply_without_weights():
    reply = ask(flat(defense__name="dp-sgd(epsilon=1, noise-multiplier=0.3)"))
    assert reply.has_error() and "it must not train again" in reply.error.reason


def test_the_ledger_of_a_client_lasts_from_round_to_round(tmp_path):
    config = flat(defense__name="dp-sgd(epsilon=8)", output__directory=str(tmp_path))
    execute(RunConfig.from_flat(config))
    records = load_run(tmp_path / "dp-sgd-epsilon=8-seed0").records
    epsilon = records[records["quantity"] == "epsilon"].pivot(
        index="client_id", columns="round", values="value"
    )
    assert (epsilon[2] > epsilon[1]).all() and (epsilon[2] <= 8.0 * (1 + 1e-6)).all()


def test_arrays_keep_their_names_and_order():
    sent = from_state_dict(setup(flat()).build_model().state_dict())
    got = ask(flat()).content["arrays"]
    assert isinstance(got, ArrayRecord) and list(got) == list(sent)


def test_a_client_whose_budget_is_spent_declines_in_its_own_words():
    reply = ask(flat(defense__name="dp-sgd(epsilon=1, noise-multiplier=0.3)"))
    assert reply.error.reason.startswith("declined to train: ") and "Traceback" not in reply.error.reason
    assert "above its budget of 1 at delta" in reply.error.reason


def test_rounds_go_on_without_clients_that_spent_their_budget(tmp_path):
    changes = {
        "federation__rounds": 5,
        "data__partitioner": "dirichlet(alpha=1)",
        "defense__name": "dp-sgd(noise-multiplier=1, epsilon=3)",
        "output__directory": str(tmp_path),
        "output__name": "budget",
        "train__batch_size": 8,
    }
    records = execute(RunConfig.from_flat(flat(**changes))).records
    declined = records[records["status"] == "rejected"]
    assert declined["reason"].str.contains("the client declined to train: .* it must not train again").all()
    first = declined.groupby("client_id")["round"].min()
    assert len(first) and first.max() > first.min()  # the smallest client is the first to stop
    epsilon = records[records["quantity"] == "epsilon"]
    assert epsilon["value"].max() <= 3 * (1 + 1e-6)
    for client, number in first.items():
        mine = epsilon[epsilon["client_id"] == client]
        assert mine["round"].max() == number - 1  # and does not come back
        assert (declined[declined["client_id"] == client]["round"] == range(number, 6)).all()
    assert set(records.loc[records["quantity"] == "accuracy", "round"]) == set(range(6))
