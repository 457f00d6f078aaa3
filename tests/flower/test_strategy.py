"""AuditStrategy changes nothing, checks every reply, and never lets a client stop the federation."""

import random

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy import Strategy

from fedaudit.audit.auditor import Auditor
from fedaudit.errors import ConfigError
from fedaudit.flower.strategy import AuditStrategy
from fedaudit.records import load_run
from fedaudit.simulation.in_process import InProcessGrid

N, ROUNDS = 6, 3
COMMON = {"fraction_evaluate": 0.0, "min_train_nodes": N, "min_available_nodes": N, "min_evaluate_nodes": 0}


def initial() -> ArrayRecord:
    generator = np.random.default_rng(0)
    return ArrayRecord(
        {
            "w": Array(generator.normal(size=(4, 3)).astype(np.float32)),
            "scale": Array(np.asarray(1.5, dtype=np.float32)),
            "steps": Array(np.asarray([3], dtype=np.int64)),
        }
    )


def honest(arrays: ArrayRecord, partition: int, round_number: int) -> ArrayRecord:
    generator = np.random.default_rng([partition, round_number])
    changed = {}
    for name, array in arrays.items():
        values = array.numpy()
        if values.dtype == np.float32:
            values = np.asarray(values + generator.normal(size=values.shape).astype(np.float32))
        changed[name] = Array(values)
    return ArrayRecord(changed)


def make_app(spoil=None) -> ClientApp:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        partition = int(context.node_config["partition-id"])
        number = int(message.content["config"]["server-round"])
        content = RecordDict(
            {
                "arrays": honest(message.content["arrays"], partition, number),
                "metrics": MetricRecord({"num-examples": 10 + partition, "train-loss": 1.0}),
            }
        )
        if spoil is not None and partition == 0:
            content = spoil(content)
        return Message(content, reply_to=message)

    return app


def federate(strategy: Strategy, app: ClientApp):
    random.seed(0)
    np.random.seed(0)
    with InProcessGrid(app, N, seed=1) as grid:
        return strategy.start(grid, initial(), num_rounds=ROUNDS)


STRATEGIES = {
    "FedAvg": lambda: flower.FedAvg(**COMMON),
    "FedAdam": lambda: flower.FedAdam(**COMMON),
    "FedMedian": lambda: flower.FedMedian(**COMMON),
    "Krum": lambda: flower.Krum(num_malicious_nodes=1, **COMMON),
    "FedAvgM": lambda: flower.FedAvgM(server_momentum=0.9, **COMMON),
    "FedTrimmedAvg": lambda: flower.FedTrimmedAvg(beta=0.2, **COMMON),
}


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_wrapped_strategy_ends_in_the_same_bits(name, tmp_path):
    alone = federate(STRATEGIES[name](), make_app())
    auditor = Auditor(tmp_path / "run")
    audited = federate(AuditStrategy(STRATEGIES[name](), auditor), make_app())
    assert [a.data for a in alone.arrays.values()] == [a.data for a in audited.arrays.values()]
    assert alone.train_metrics_clientapp == audited.train_metrics_clientapp
    assert sum(row.quantity == "update-norm" for row in auditor.current) == N


def test_an_announced_number_reaches_clients_and_the_callers_configuration_stays_as_it_is(tmp_path):
    received = []
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        received.append(dict(message.content["config"].items()))
        content = RecordDict(
            {"arrays": message.content["arrays"], "metrics": MetricRecord({"num-examples": 1})}
        )
        return Message(content, reply_to=message)

    own = ConfigRecord({"lr": 0.5})
    told = {1: {}, 2: {"leakage": 0.75}}
    strategy = AuditStrategy(STRATEGIES["FedAvg"](), Auditor(tmp_path / "run"), announce=told.__getitem__)
    with InProcessGrid(app, N, seed=1) as grid:
        strategy.start(grid, initial(), num_rounds=2, train_config=own)
    assert received[:N] == [{"lr": 0.5, "server-round": 1}] * N
    assert received[N:] == [{"lr": 0.5, "leakage": 0.75, "server-round": 2}] * N
    assert "leakage" not in own


def test_without_an_announcement_the_wrapped_strategy_gets_the_very_configuration(tmp_path):
    seen = []

    class Spy(flower.FedAvg):
        def configure_train(self, server_round, arrays, config, grid):
            seen.append(config)
            return []

    own = ConfigRecord({})
    for announce in (None, lambda _: {}):
        strategy = AuditStrategy(Spy(), Auditor(tmp_path / "run"), announce=announce)
        list(strategy.configure_train(1, initial(), own, None))
    assert all(config is own for config in seen) and len(seen) == 2


def float_app() -> ClientApp:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        partition = int(context.node_config["partition-id"])
        arrays = {"w": Array(message.content["arrays"]["w"].numpy() + np.float32(partition + 1))}
        metrics = MetricRecord({"num-examples": 10})
        return Message(RecordDict({"arrays": ArrayRecord(arrays), "metrics": metrics}), reply_to=message)

    return app


def test_flowers_fixed_clipping_ends_in_the_same_bits(tmp_path):
    def private() -> Strategy:
        inner = flower.FedAvg(**COMMON)
        return flower.DifferentialPrivacyServerSideFixedClipping(inner, 1.0, 0.5, N)

    ends = []
    for strategy in (private(), AuditStrategy(private(), Auditor(tmp_path / "run"))):
        random.seed(7)  # the order of clients, and with it that of a sum of floats
        np.random.seed(7)
        with InProcessGrid(float_app(), N, seed=1) as grid:
            start = ArrayRecord({"w": Array(np.zeros(8, np.float32))})
            ends.append(strategy.start(grid, start, num_rounds=2).arrays["w"].data)
    assert ends[0] == ends[1]


def _replace(name, values):
    def spoil(content):
        arrays = dict(content["arrays"].items())
        arrays[name] = Array(values)
        content["arrays"] = ArrayRecord(arrays)
        return content

    return spoil


def _drop(content):
    content["arrays"] = ArrayRecord({k: v for k, v in content["arrays"].items() if k != "w"})
    return content


def _metric(**values):
    def spoil(content):
        content["metrics"] = MetricRecord({key.replace("_", "-"): value for key, value in values.items()})
        return content

    return spoil


def _raise(content):
    raise RuntimeError("out of memory")


def _no_arrays(content):
    return RecordDict({"metrics": content["metrics"]})


BAD = {
    "nan": (_replace("w", np.full((4, 3), np.nan, np.float32)), "finite"),
    "infinity": (_replace("w", np.full((4, 3), np.inf, np.float32)), "finite"),
    "shape": (_replace("w", np.zeros((3, 4), np.float32)), "shape"),
    "dtype": (_replace("w", np.zeros((4, 3), np.float64)), "dtype"),
    "extra key": (_replace("more", np.zeros(2, np.float32)), "extra"),
    "missing key": (_drop, "missing"),
    "no examples": (_metric(num_examples=0, train_loss=1.0), "num-examples"),
    "absurd examples": (_metric(num_examples=10**14, train_loss=1.0), "num-examples"),
    "nan examples": (_metric(num_examples=float("nan"), train_loss=1.0), "num-examples"),
    "no weight": (_metric(train_loss=1.0), "num-examples"),
    "other metrics": (_metric(num_examples=10, train_loss=1.0, more=2.0), "same metrics"),
    "no arrays": (_no_arrays, "ArrayRecord"),
    "exception": (_raise, "out of memory"),
}


@pytest.mark.parametrize("fault", BAD)
def test_a_bad_reply_is_a_rejected_row_and_the_federation_goes_on(fault, tmp_path):
    spoil, reason = BAD[fault]
    auditor = Auditor(tmp_path / "run")
    result = federate(AuditStrategy(STRATEGIES["FedAvg"](), auditor), make_app(spoil))
    rejected = [row for row in auditor.current if row.status == "rejected"]
    assert len(rejected) == 1 and reason in rejected[0].reason and rejected[0].node_id
    assert rejected[0].value is None
    measured = {row.node_id for row in auditor.current if row.quantity == "update-norm"}
    assert len(measured) == N - 1 and rejected[0].node_id not in measured
    assert np.isfinite(result.arrays["w"].numpy()).all()


def test_without_rejection_the_wrapped_strategy_sees_the_bad_reply(tmp_path):
    spoil, _ = BAD["nan"]
    strategy = AuditStrategy(STRATEGIES["FedAvg"](), Auditor(tmp_path / "run"), reject_bad_updates=False)
    assert np.isnan(federate(strategy, make_app(spoil)).arrays["w"].numpy()).all()
    records = load_run(tmp_path / "run").records
    assert ((records["round"] == 1) & (records["status"] == "rejected")).sum() == 1


def test_a_rejected_client_makes_a_dp_wrapper_give_up_the_round_instead_of_under_noising(tmp_path):
    """Dropping one of n clients silently would leave noise for n on an average over n - 1."""
    inner = flower.FedAvg(**COMMON)
    private = flower.DifferentialPrivacyServerSideFixedClipping(inner, 1.0, 0.5, N)
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        value = np.nan if int(context.node_config["partition-id"]) == 0 else 1.0
        arrays = ArrayRecord({"w": Array(np.full(8, value, np.float32))})
        metrics = MetricRecord({"num-examples": 10})
        return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

    auditor = Auditor(tmp_path / "run")
    with InProcessGrid(app, N, seed=1) as grid:
        start = ArrayRecord({"w": Array(np.zeros(8, np.float32))})
        result = AuditStrategy(private, auditor).start(grid, start, num_rounds=1)
    assert len(result.arrays) == 0
    assert sum(row.status == "rejected" for row in auditor.current) == 1


def test_a_missing_reply_is_a_rejected_row(tmp_path):
    class Lossy(InProcessGrid):
        def send_and_receive(self, messages, *, timeout=None):
            return super().send_and_receive(messages, timeout=timeout)[1:]

    auditor = Auditor(tmp_path / "run")
    with Lossy(make_app(), N, seed=1) as grid:
        AuditStrategy(STRATEGIES["FedAvg"](), auditor).start(grid, initial(), num_rounds=1)
    reasons = [row.reason for row in auditor.current if row.status == "rejected"]
    assert reasons == ["no reply within the round's timeout"]


def test_updates_are_differences_by_name_of_float_entries(tmp_path):
    seen = []

    class Spy(Auditor):
        def audit(self, round_number, updates, *rest):
            seen.extend(updates)
            return super().audit(round_number, updates, *rest)

    with InProcessGrid(make_app(), N, seed=1) as grid:
        AuditStrategy(STRATEGIES["FedAvg"](), Spy(tmp_path / "run")).start(grid, initial(), num_rounds=1)
    update = next(update for update in seen if update.num_examples == 12)  # partition 2
    noise = np.random.default_rng([2, 1]).normal(size=(4, 3)).astype(np.float32)
    start = initial()["w"].numpy()
    assert set(update.delta) == {"w", "scale"}
    torch.testing.assert_close(update.delta["w"], torch.from_numpy((start + noise) - start))


def test_a_strategy_that_overrides_start_is_refused(tmp_path):
    class Own(flower.FedAvg):
        def start(self, *args, **kwargs):
            return None

    with pytest.raises(ConfigError, match=r"must not override start\(\), got Own"):
        AuditStrategy(Own(), Auditor(tmp_path / "run"))
