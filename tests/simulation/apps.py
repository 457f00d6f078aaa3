"""Tiny apps on numpy arrays for tests of the engines: a client moves the weights by its partition's index."""

import threading

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

client_app = ClientApp()


def answer(arrays: dict[str, np.ndarray], metrics: dict[str, float], message: Message) -> Message:
    record = ArrayRecord({k: Array(np.asarray(v)) for k, v in arrays.items()})
    return Message(RecordDict({"arrays": record, "metrics": MetricRecord(metrics)}), reply_to=message)


def step(message: Message, context: Context) -> dict[str, np.ndarray]:
    """The received arrays, moved by (partition + 1) * rate."""
    move = np.float32((context.node_config["partition-id"] + 1) * context.run_config.get("rate", 1.0))
    return {k: np.asarray(a.numpy() + move) for k, a in message.content["arrays"].items()}


@client_app.train()
def train(message: Message, context: Context) -> Message:
    """Move the weights, and count the calls in the state."""
    calls = int(context.state["calls"]["n"]) + 1 if "calls" in context.state else 1
    context.state["calls"] = MetricRecord({"n": calls})
    return answer(step(message, context), {"num-examples": 1, "calls": calls}, message)


@client_app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    loss = float(abs(message.content["arrays"]["w"].numpy()).sum())
    return Message(RecordDict({"m": MetricRecord({"loss": loss, "num-examples": 1})}), reply_to=message)


@client_app.train("fail")
def fail(message: Message, context: Context) -> Message:
    context.state["calls"] = MetricRecord({"n": 99})
    raise KeyError("no such layer")


@client_app.train("changes_config")
def changes_config(message: Message, context: Context) -> Message:
    context.run_config["rate"] = 100.0
    return answer(step(message, context), {"num-examples": 1}, message)


@client_app.train("returns_nothing")
def returns_nothing(message: Message, context: Context) -> None:
    return None


@client_app.train("echoes")
def echoes(message: Message, context: Context) -> Message:
    return message


@client_app.train("mutates")
def mutates(message: Message, context: Context) -> Message:
    """Report what arrived, then spoil everything that was received."""
    arrays, config = message.content["arrays"], message.content["config"]
    metrics = {
        "num-examples": 1,
        "sum": float(arrays["w"].numpy().sum()),
        "keys": len(arrays) + len(config),
        "list": len(config["list"]),
    }
    received = {k: a.numpy() for k, a in arrays.items()}
    arrays["w"].data = Array(np.full(2, 99.0)).data
    arrays["extra"] = Array(np.ones(1))
    config["list"].append(4)
    del config["server-round"]
    del message.content["arrays"]
    return answer(received, metrics, message)


@client_app.query("thread")
def thread(message: Message, context: Context) -> Message:
    return Message(
        RecordDict({"m": MetricRecord({"thread": threading.get_ident() % 2**62})}), reply_to=message
    )


@client_app.query("config")
def config(message: Message, context: Context) -> Message:
    return Message(
        RecordDict({"c": ConfigRecord({**context.run_config, **context.node_config})}), reply_to=message
    )


def initial(*shape: int) -> ArrayRecord:
    return ArrayRecord(
        {"w": Array(np.zeros(shape or (2,), np.float32)), "b": Array(np.array(0.5, np.float32))}
    )


def train_message(node: int, action: str = "", server_round: int = 1) -> Message:
    content = RecordDict({"arrays": initial(), "config": ConfigRecord({"server-round": server_round})})
    return Message(content, node, f"train.{action}" if action else "train")


server_app = ServerApp()
outcome: dict[str, object] = {}


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    """FedAvg over all clients; leaves what it saw in `outcome`, which lives in the test's process."""
    outcome.clear()
    outcome["config"] = dict(context.run_config)
    nodes = list(grid.get_node_ids())
    queries = [Message(RecordDict(), node, "query.config") for node in nodes]
    outcome["client configs"] = [dict(r.content["c"]) for r in grid.send_and_receive(queries, timeout=60)]
    wrong = [train_message(nodes[0], action) for action in ("fail", "changes_config", "returns_nothing")]
    for message in wrong:
        (reply,) = grid.send_and_receive([message], timeout=60)
        outcome[message.metadata.message_type] = (reply.error.code, reply.error.reason)
    n = len(nodes)
    strategy = FedAvg(min_train_nodes=n, min_evaluate_nodes=n, min_available_nodes=n)
    result = strategy.start(grid, initial(), num_rounds=2, timeout=60)
    outcome["weights"] = {k: a.numpy() for k, a in result.arrays.items()}
    outcome["calls"] = result.train_metrics_clientapp[2]["calls"]


failing_server_app = ServerApp()


@failing_server_app.main()
def main_that_fails(grid: Grid, context: Context) -> None:
    raise ZeroDivisionError("in the ServerApp")


waiting_server_app = ServerApp()


@waiting_server_app.main()
def main_that_waits(grid: Grid, context: Context) -> None:
    """Wait for replies that an engine without actors never sends."""
    outcome["thread"] = threading.current_thread()
    nodes: list[int] = []
    while not nodes:
        nodes = list(grid.get_node_ids())
    grid.send_and_receive([train_message(nodes[0])], timeout=600)
