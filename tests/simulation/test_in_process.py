import gc
import random
import threading
import weakref

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg

from fedaudit.errors import ConfigError, RecordError
from fedaudit.progress import listen
from fedaudit.simulation import flower_internals as internals
from fedaudit.simulation.in_process import InProcessGrid
from tests.simulation.apps import client_app, initial, train_message


@pytest.fixture
def grid():
    with InProcessGrid(client_app, num_clients=4, run_config={"rate": 1.0}) as grid:
        yield grid


def calls(replies):
    return [int(reply.content["metrics"]["calls"]) for reply in replies]


def test_node_ids_follow_from_the_seed():
    ids = [list(InProcessGrid(client_app, 20, seed=seed).get_node_ids()) for seed in (3, 3, 4)]
    assert ids[0] == ids[1] != ids[2]
    assert len(set(ids[0])) == 20 and min(ids[0]) > 1


def test_a_node_finds_its_partition_and_the_run_configuration(grid):
    replies = grid.send_and_receive([Message(RecordDict(), n, "query.config") for n in grid.get_node_ids()])
    assert [dict(reply.content["c"]) for reply in replies] == [
        {"rate": 1.0, "partition-id": i, "num-partitions": 4} for i in range(4)
    ]


def test_replies_name_their_node_their_message_and_the_run(grid):
    messages = [train_message(node) for node in grid.get_node_ids()]
    replies = grid.send_and_receive(messages)
    assert [r.metadata.src_node_id for r in replies] == grid.get_node_ids()
    assert [r.metadata.reply_to_message_id for r in replies] == [m.metadata.message_id for m in messages]
    assert {r.metadata.run_id for r in replies} == {grid.run.run_id}
    ids = [m.metadata.message_id for m in (*messages, *replies)]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("workers", [1, 3])
def test_replies_come_in_the_order_of_their_messages(workers):
    with InProcessGrid(client_app, 6, workers=workers) as grid:
        nodes = random.Random(0).sample(grid.get_node_ids(), 6)
        ids = grid.push_messages([train_message(node) for node in nodes])
        assert [r.metadata.src_node_id for r in grid.pull_messages(set(ids))] == nodes


def test_a_reply_is_handed_out_once(grid):
    ids = grid.push_messages([train_message(grid.get_node_ids()[0])])
    assert len(grid.pull_messages(ids)) == 1
    assert grid.pull_messages(ids) == []


def test_clients_run_in_the_callers_thread_unless_there_are_workers():
    def threads(workers):
        with InProcessGrid(client_app, 3, workers=workers) as grid:
            replies = grid.send_and_receive(
                [Message(RecordDict(), n, "query.thread") for n in grid.get_node_ids()]
            )
            return {reply.content["m"]["thread"] for reply in replies}

    here = threading.get_ident() % 2**62
    assert threads(1) == {here}
    assert here not in threads(2)


def test_a_client_that_spoils_its_message_does_not_affect_the_next_one(grid):
    config = ConfigRecord({"server-round": 1, "list": [1, 2, 3]})
    content = RecordDict({"arrays": initial(), "config": config})  # one for all, as Flower's strategies do
    replies = grid.send_and_receive([Message(content, node, "train.mutates") for node in grid.get_node_ids()])
    seen = [dict(reply.content["metrics"]) for reply in replies]
    assert seen == [{"num-examples": 1, "sum": 0.0, "keys": 4, "list": 3}] * 4
    assert content == RecordDict({"arrays": initial(), "config": config})
    assert dict(config) == {"server-round": 1, "list": [1, 2, 3]}


def test_a_server_that_changes_a_reply_does_not_reach_into_the_clients_state():
    app = ClientApp()

    @app.train()
    def train(message, context):
        record = context.state.setdefault("kept", ArrayRecord({"w": Array(np.ones(1))}))
        return Message(RecordDict({"arrays": record}), reply_to=message)

    with InProcessGrid(app, 1) as grid:
        (reply,) = grid.send_and_receive([train_message(grid.get_node_ids()[0])])
        reply.content["arrays"]["w"] = Array(np.zeros(1))
        (reply,) = grid.send_and_receive([train_message(grid.get_node_ids()[0])])
        assert reply.content["arrays"]["w"].numpy() == 1.0


def test_the_bytes_of_a_broadcast_are_shared_and_not_copied():
    app, seen = ClientApp(), []

    @app.train()
    def train(message, context):
        seen.append(message.content["arrays"]["w"].data)
        return Message(RecordDict(), reply_to=message)

    message = train_message(0)
    with InProcessGrid(app, 3) as grid:
        grid.send_and_receive([Message(message.content, node, "train") for node in grid.get_node_ids()])
    assert len(seen) == 3
    assert all(data is message.content["arrays"]["w"].data for data in seen)


def test_state_lasts_across_rounds(grid):
    nodes = grid.get_node_ids()
    first, second = (grid.send_and_receive([train_message(n) for n in nodes]) for _ in range(2))
    assert (calls(first), calls(second)) == ([1] * 4, [2] * 4)


def test_restored_states_continue_where_they_were_taken(grid):
    nodes = grid.get_node_ids()
    grid.send_and_receive([train_message(n) for n in nodes])
    states = grid.node_states()
    assert set(states) == set(nodes)
    grid.send_and_receive([train_message(n) for n in nodes])
    assert states[nodes[0]]["calls"]["n"] == 1  # a copy
    with InProcessGrid(client_app, 4) as resumed:
        resumed.restore_node_states(states)
        states[nodes[0]]["calls"]["n"] = 50
        assert calls(resumed.send_and_receive([train_message(n) for n in nodes])) == [2] * 4


def test_changed_states_are_those_of_clients_that_kept_something_since_the_last_look(grid):
    first, second, *_ = grid.get_node_ids()
    grid.send_and_receive([train_message(first)])
    assert {n: state["calls"]["n"] for n, state in grid.changed_node_states().items()} == {first: 1}
    assert grid.changed_node_states() == {}
    grid.send_and_receive([train_message(second)])
    grid.restore_node_states({first: RecordDict({"calls": MetricRecord({"n": 7})})})
    changed = grid.changed_node_states()
    assert {n: state["calls"]["n"] for n, state in changed.items()} == {first: 7, second: 1}
    changed[second]["calls"]["n"] = 50  # a copy
    assert grid.node_states()[second]["calls"]["n"] == 1


def test_states_of_another_federation_are_refused_whole(grid):
    node = grid.get_node_ids()[0]
    states = {node: RecordDict({"calls": MetricRecord({"n": 7})}), 12345: RecordDict()}
    with pytest.raises(RecordError, match="got node 12345: resume with the seed and the number of clients"):
        grid.restore_node_states(states)
    assert len(grid.node_states()[node]) == 0


@pytest.mark.parametrize(
    ("action", "code", "reason"),
    [
        (
            "fail",
            2,
            "<class 'flwr.clientapp.client_app.ClientAppException'>:<'\n"
            "Exception ClientAppException occurred. Message: 'no such layer''>",
        ),
        ("returns_nothing", 2, "a ClientApp must return a Message, got NoneType"),
        ("echoes", 2, "a ClientApp must reply to the message it got"),
        ("unknown", 2, "No train function registered with name 'unknown'"),
        (
            "changes_config",
            0,
            "<class 'ValueError'>:<'The `run_config` field of the `Context` object cannot be modified",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) and value.isidentifier() else "",
)
def test_a_failing_client_becomes_an_error_reply(grid, action, code, reason):
    bad, good = grid.get_node_ids()[:2]
    message = train_message(bad, action)
    failed, fine = grid.send_and_receive([message, train_message(good)])
    assert failed.has_error() and not failed.has_content()
    assert failed.error.code == code
    assert reason in failed.error.reason
    assert failed.metadata.src_node_id == bad
    assert failed.metadata.reply_to_message_id == message.metadata.message_id
    assert fine.has_content()


def test_an_app_that_cannot_be_loaded_has_its_own_error_code():
    def unloadable(message, context):
        raise internals.LoadClientAppError("no module")

    with InProcessGrid(unloadable, 1) as grid:
        (reply,) = grid.send_and_receive([train_message(grid.get_node_ids()[0])])
    assert reply.error.code == internals.ErrorCode.LOAD_CLIENT_APP_EXCEPTION


def test_a_client_that_exits_does_not_end_the_federation():
    def leaving(message, context):
        raise SystemExit(3)

    with InProcessGrid(leaving, 1) as grid:
        (reply,) = grid.send_and_receive([train_message(grid.get_node_ids()[0])])
    assert reply.error.code == internals.ErrorCode.UNKNOWN


@pytest.mark.parametrize("workers", [1, 2])
def test_an_interrupt_in_a_client_ends_the_federation(workers):
    def interrupted(message, context):
        raise KeyboardInterrupt

    with InProcessGrid(interrupted, 2, workers=workers) as grid, pytest.raises(KeyboardInterrupt):
        grid.send_and_receive([train_message(node) for node in grid.get_node_ids()])


@pytest.mark.parametrize("action", ["fail", "changes_config"])
def test_a_failed_call_leaves_the_clients_state_as_it_was(grid, action):
    node = grid.get_node_ids()[0]
    grid.send_and_receive([train_message(node)])
    grid.send_and_receive([train_message(node, action)])
    assert calls(grid.send_and_receive([train_message(node)])) == [2]


def test_a_changed_run_configuration_does_not_last(grid):
    node = grid.get_node_ids()[0]
    grid.send_and_receive([train_message(node, "changes_config")])
    (reply,) = grid.send_and_receive([Message(RecordDict(), node, "query.config")])
    assert reply.content["c"]["rate"] == 1.0


@pytest.mark.parametrize("workers", [1, 3])
def test_two_messages_to_one_node_are_answered_one_after_the_other(workers):
    with InProcessGrid(client_app, 2, workers=workers) as grid:
        nodes = grid.get_node_ids()
        replies = grid.send_and_receive([train_message(nodes[i % 2]) for i in range(8)])
    assert calls(replies) == [1, 1, 2, 2, 3, 3, 4, 4]


def test_a_message_to_a_stranger_is_logged_and_not_sent(grid, caplog):
    replies = grid.send_and_receive([train_message(12345), train_message(grid.get_node_ids()[0])])
    assert len(replies) == 1
    assert "no node has the id 12345" in caplog.text


def test_training_announces_every_reply_with_its_round():
    events = []
    with InProcessGrid(client_app, 3, workers=2) as grid, listen(events.append):
        grid.send_and_receive([train_message(node, server_round=4) for node in grid.get_node_ids()])
        grid.send_and_receive([Message(RecordDict(), node, "query.config") for node in grid.get_node_ids()])
    assert [(e.stage, e.done, e.total, e.round) for e in events] == [("client", i, 3, 4) for i in (1, 2, 3)]


def test_a_train_message_without_a_round_is_announced_as_round_zero(grid):
    events = []
    with listen(events.append):
        grid.send_and_receive([Message(RecordDict({"arrays": initial()}), grid.get_node_ids()[0], "train")])
    assert [(e.done, e.total, e.round) for e in events] == [(1, 1, 0)]


def federation(seed=0, workers=1):
    random.seed(11)
    with InProcessGrid(client_app, 8, {"rate": 0.25}, seed, workers) as grid:
        result = FedAvg(fraction_train=0.5, min_available_nodes=8).start(grid, initial(5), num_rounds=3)
    return {key: array.numpy() for key, array in result.arrays.items()}, result.train_metrics_clientapp


def test_the_same_seed_gives_the_same_result():
    (first, metrics), (second, metrics_again) = federation(seed=1), federation(seed=1)
    for key, values in first.items():
        np.testing.assert_array_equal(values, second[key])
    assert metrics == metrics_again


def test_threads_give_the_result_of_one_worker():
    (one, metrics), (several, metrics_of_several) = federation(workers=1), federation(workers=3)
    for key, values in one.items():
        np.testing.assert_array_equal(values, several[key])
    assert metrics == metrics_of_several


def test_grids_in_one_process_do_not_disturb_each_other():
    before = internals.current_run()
    first, second = InProcessGrid(client_app, 2, seed=1), InProcessGrid(client_app, 2, seed=2)
    for grid in (first, second, first):  # messages are built while the second grid's identity is set
        (reply,) = grid.send_and_receive([train_message(grid.get_node_ids()[0])])
        assert reply.metadata.run_id == grid.run.run_id and reply.has_content()
    second.close()
    first.close()
    assert internals.current_run() == before
    with InProcessGrid(client_app, 2, seed=1) as third:
        assert calls(third.send_and_receive([train_message(third.get_node_ids()[0])])) == [1]


def test_replies_are_dropped_after_they_were_pulled(grid):
    (reply,) = grid.send_and_receive([train_message(grid.get_node_ids()[0])])
    content = weakref.ref(reply.content)
    del reply
    gc.collect()
    assert content() is None


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"num_clients": 0}, "federation.clients must be at least 1, got 0"),
        ({"num_clients": 2, "workers": 0}, "federation.workers must be at least 1, got 0"),
    ],
    ids=["no clients", "no workers"],
)
def test_a_federation_needs_clients_and_workers(arguments, match):
    with pytest.raises(ConfigError, match=match):
        InProcessGrid(client_app, **arguments)
