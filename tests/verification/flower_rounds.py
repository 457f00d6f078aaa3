"""A few rounds of a tiny federation under Flower's own privacy wrappers, in this process."""

import random
from dataclasses import dataclass, field

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import strategy as flower

from fedaudit.audit.auditor import Auditor
from fedaudit.flower.arrays import to_state_dict
from fedaudit.flower.strategy import AuditStrategy
from fedaudit.simulation.in_process import InProcessGrid

N = 8
COMMON = {"fraction_evaluate": 0.0, "min_train_nodes": N, "min_available_nodes": N, "min_evaluate_nodes": 0}


@dataclass
class Watched(Auditor):
    """Keeps each round's updates."""

    seen: dict = field(default_factory=dict)

    def __post_init__(self):
        super().__init__(None, "")

    def audit(self, round_number, updates, *rest):
        self.seen[round_number] = list(updates)
        return super().audit(round_number, updates, *rest)


def initial(counter=False):
    source = np.random.default_rng(0)
    arrays = {
        "w": source.normal(size=(40, 30)).astype(np.float32),
        "b": source.normal(size=30).astype(np.float32),
        "scale": np.asarray(1.5, np.float32),
    }
    if counter:
        arrays["steps"] = np.asarray(3, np.int64)
    return ArrayRecord({name: Array(values) for name, values in arrays.items()})


def learnt(partition, number, values, length):
    source = np.random.default_rng([partition, number, values.size])
    return np.asarray(
        length * source.normal(size=values.shape) / 35, values.dtype
    )  # 1231 entries: norm = length


def client_app(mods=(), *, length=1.0, scale=None, examples=lambda partition: 10, metrics=None, order=False):
    """Clients that move every entry; `scale` is what the scalar moves by, `order` reverses one's keys."""
    app = ClientApp()

    @app.train(mods=list(mods))
    def train(message: Message, context: Context) -> Message:
        partition = int(context.node_config["partition-id"])
        number = int(message.content["config"]["server-round"])
        arrays = {}
        for name, array in message.content["arrays"].items():
            values = array.numpy()
            if name == "steps":
                values = np.asarray(values + 10)
            elif name == "scale" and scale is not None:
                values = np.asarray(values + np.float32(scale))
            else:
                values = np.asarray(values + learnt(partition, number, values, length))
            arrays[name] = Array(values)
        if order and partition == 0:
            arrays = dict(reversed(arrays.items()))
        content = {
            "arrays": ArrayRecord(arrays),
            "metrics": MetricRecord({"num-examples": examples(partition), **(metrics or {})}),
        }
        return Message(RecordDict(content), reply_to=message)

    return app


def run(strategy, app, *, rounds=2, seed=0, arrays=None, before_round=None):
    """Updates and weights of each round: {round: updates}, [weights before round 1, after round 1, ...]."""
    watched, weights = Watched(), []

    def note(number, current):
        weights.append({name: tensor.clone() for name, tensor in to_state_dict(current).items()})
        if before_round is not None:
            before_round(number + 1)

    random.seed(0)
    np.random.seed(seed)
    with InProcessGrid(app, N, seed=1) as grid:
        AuditStrategy(strategy, watched).start(
            grid, arrays if arrays is not None else initial(), num_rounds=rounds, evaluate_fn=note
        )
    return watched.seen, weights


def fixed(multiplier, norm, side="Server", inner=None):
    kind = getattr(flower, f"DifferentialPrivacy{side}SideFixedClipping")
    return kind(inner if inner is not None else flower.FedAvg(**COMMON), multiplier, norm, N)


def adaptive(multiplier, norm, side="Server", count_std=4.0, lr=0.2):
    kind = getattr(flower, f"DifferentialPrivacy{side}SideAdaptiveClipping")
    return kind(flower.FedAvg(**COMMON), multiplier, N, norm, clip_norm_lr=lr, clipped_count_stddev=count_std)


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)
