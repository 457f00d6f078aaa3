"""The reference ClientApp: train locally under the run's defense, measure oneself if asked, answer."""

import math
from typing import Any

import torch
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedaudit.accounting import Ledger
from fedaudit.defenses.chain import central
from fedaudit.errors import BudgetExhaustedError, ConfigError
from fedaudit.federation.setup import Setup, setup
from fedaudit.flower.arrays import copy_into, from_state_dict, to_state_dict
from fedaudit.flower.messages import LEAKAGE, MEASURE_PREFIX, decline, encode_finding, reply
from fedaudit.training.local import client_seed, evaluate, steps_per_round, train_locally, weights_to_send
from fedaudit.training.round_release import stated_release

from .self_audit import self_audit

LEDGER = "fedaudit-ledger"
app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """One round of local training; a client whose budget does not allow it declines."""
    made, client = _whoami(context)
    config: dict[str, Any] = dict(message.content.config_records["config"].items())
    round_number = int(config["server-round"])
    settings = made.settings(round_number, proximal_mu=float(config.get("proximal-mu", 0.0)))
    arrays = message.content.array_records["arrays"]
    before = to_state_dict(arrays)
    x, y = (tensor.to(made.device) for tensor in made.training_data(client, before))
    steps = steps_per_round(len(y), settings)
    ledger = _ledger(context)
    release = made.release_in_round(len(y), round_number, ledger, _number(config.get(LEAKAGE)))
    try:
        ledger = made.defense.charge(ledger, release, steps, len(y))
    except BudgetExhaustedError as spent:  # not a failure: the round goes on without this client
        return decline(message, str(spent))

    model = made.worker_model()
    weights = model.state_dict()  # the model's own tensors, before and after training
    copy_into(weights, arrays)
    noise = torch.Generator(device=made.device)
    noise.manual_seed(client_seed(made.config.seed, client, round_number) ^ 1)
    result = train_locally(
        model,
        x,
        y,
        made.batches(client, round_number),
        settings,
        defense=made.defense,
        release=release,
        generator=noise,
        device=made.device,
    )
    trained = {name: tensor.detach().cpu() for name, tensor in weights.items()}
    chance = torch.Generator().manual_seed(client_seed(noise.initial_seed(), client, round_number))
    after = weights_to_send(made.defense, before, trained, chance)
    _keep(context, ledger)

    stated = stated_release(made.defense, release)
    beside: dict[str, Any] = {"partition-id": client, "steps": result.steps, **stated}
    guarantee = made.defense.guarantee(ledger, len(y))
    if guarantee is not None:
        beside |= {
            "epsilon": guarantee.epsilon,
            "delta": guarantee.delta,
            "privacy-unit": guarantee.unit,
            "accountant": guarantee.accountant,
        }
    for name, finding, seconds in self_audit(made, client, round_number, before, after, guarantee, stated):
        beside[f"{MEASURE_PREFIX}{name}"] = encode_finding(finding, seconds)
    metrics: dict[str, float | int] = {"num-examples": len(y)}
    # the loss is a function of the data that no noise protects, and no sum hides
    if guarantee is None and made.secure is None and central(made.defense) is None:
        metrics["train-loss"] = result.loss
    return reply(message, from_state_dict(after), metrics, beside)


@app.evaluate()
def test(message: Message, context: Context) -> Message:
    """Loss and accuracy of the global weights on the client's own examples."""
    made, client = _whoami(context)
    model = made.worker_model()
    copy_into(model.state_dict(), message.content.array_records["arrays"])
    x, y = (tensor.to(made.device) for tensor in made.client_data(client))
    loss, accuracy = evaluate(model, x, y)
    metrics = MetricRecord({"num-examples": len(y), "loss": loss, "accuracy": accuracy})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)


@app.query("whoami")
def whoami(message: Message, context: Context) -> Message:
    """Which partition this node holds, and of how many."""
    client, clients = _place(context)
    place = MetricRecord({"partition-id": client, "num-partitions": clients})
    return Message(RecordDict({"whoami": place}), reply_to=message)


def _whoami(context: Context) -> tuple[Setup, int]:
    client, clients = _place(context)
    return setup(context.run_config, clients), client


def _place(context: Context) -> tuple[int, int]:
    """This node's partition and how many there are, as its operator wrote them."""
    try:
        client, clients = (int(context.node_config[key]) for key in ("partition-id", "num-partitions"))
    except (KeyError, ValueError) as error:
        raise ConfigError(
            f"a node's --node-config holds the whole numbers partition-id and num-partitions, "
            f"got {dict(context.node_config)}: set both"
        ) from error
    if not 0 <= client < clients:
        raise ConfigError(
            f"partition-id is a number from 0 to num-partitions - 1 = {clients - 1}, "
            f"got {client}: correct the node's --node-config"
        )
    return client, clients


def _ledger(context: Context) -> Ledger:
    if LEDGER not in context.state:
        return Ledger()
    return Ledger.from_lists(dict(context.state[LEDGER].items()))


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def _keep(context: Context, ledger: Ledger) -> None:
    if ledger.history:
        context.state[LEDGER] = ConfigRecord(dict(ledger.to_lists()))
