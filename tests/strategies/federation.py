"""A federation of numpy clients whose updates are a function of partition and round."""

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from strategies.flower_strategies import build_strategy

N = 7  # Bulyan wants 4 f + 3 clients
app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    partition = int(context.node_config["partition-id"])
    draws = np.random.default_rng([partition, int(message.content["config"]["server-round"])])
    arrays = {
        name: Array(np.asarray(array.numpy() + draws.normal(size=array.shape).astype(np.float32)))
        for name, array in message.content["arrays"].items()
    }
    metrics = MetricRecord({"num-examples": 10, "train-loss": 1.0 + partition})
    return Message(RecordDict({"arrays": ArrayRecord(arrays), "metrics": metrics}), reply_to=message)


def initial() -> ArrayRecord:
    """Names out of alphabetical order and an array of no dimension."""
    return ArrayRecord(
        {
            "w": Array(np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3)),
            "scale": Array(np.asarray(1.5, dtype=np.float32)),
            "b": Array(np.zeros(3, np.float32)),
        }
    )


def strategy(text: str, fraction_train: float = 1.0):
    return build_strategy(text, clients=N, fraction_train=fraction_train, min_available=N)
