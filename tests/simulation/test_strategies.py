"""Flower's own strategies on the in-process grid, against their formulas."""

import logging
import random

import numpy as np
import pytest
import torch
from flwr.app import Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import (
    DifferentialPrivacyServerSideFixedClipping,
    FedAdam,
    FedAvg,
    FedMedian,
    Krum,
)

from fedaudit.flower.arrays import from_state_dict, to_state_dict
from fedaudit.simulation.in_process import InProcessGrid
from tests.simulation.apps import client_app, initial

N = 4
ALL = {"min_train_nodes": N, "min_evaluate_nodes": N, "min_available_nodes": N}
MOVES = np.arange(1.0, N + 1)  # client i moves every weight by i + 1


def weights_after(strategy, rounds=1, workers=1):
    with InProcessGrid(client_app, N, workers=workers) as grid:
        result = strategy.start(grid, initial(3), num_rounds=rounds)
    assert result.train_metrics_clientapp[rounds]["calls"] == rounds
    assert result.evaluate_metrics_clientapp[rounds]["loss"] > 0
    return result.arrays["w"].numpy(), result.arrays["b"].numpy()


@pytest.fixture(autouse=True)
def quiet():
    flower = logging.getLogger("flwr")
    before = flower.level
    flower.setLevel(logging.ERROR)
    yield
    flower.setLevel(before)


def test_fedavg_moves_by_the_mean_of_the_clients():
    w, b = weights_after(FedAvg(**ALL), rounds=3)
    np.testing.assert_allclose(w, 3 * MOVES.mean(), rtol=1e-6)
    np.testing.assert_allclose(b, 0.5 + 3 * MOVES.mean(), rtol=1e-6)


def test_a_federation_is_bit_for_bit_the_loop_written_by_hand():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(10, 8, 5, generator=generator), torch.randn(10, 8, 1, generator=generator)
    start = {"weight": torch.randn(1, 5, generator=generator), "bias": torch.zeros(1)}
    model = torch.nn.Linear(5, 1)

    def trained(weights, client):
        model.load_state_dict(weights)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            torch.nn.functional.mse_loss(model(x[client]), y[client]).backward()
            optimizer.step()
        return {key: tensor.clone() for key, tensor in model.state_dict().items()}

    by_hand = start
    sampling = random.Random(7)
    for _ in range(4):
        updates = [trained(by_hand, client) for client in sampling.sample(range(10), 4)]
        by_hand = {key: sum(update[key] * 0.25 for update in updates) for key in start}

    app = ClientApp()

    @app.train()
    def train(message, context):
        weights = to_state_dict(message.content["arrays"])
        content = {
            "arrays": from_state_dict(trained(weights, context.node_config["partition-id"])),
            "metrics": MetricRecord({"num-examples": 8}),
        }
        return Message(RecordDict(content), reply_to=message)

    random.seed(7)
    with InProcessGrid(app, 10) as grid:
        strategy = FedAvg(fraction_train=0.4, fraction_evaluate=0.0, min_available_nodes=10)
        result = strategy.start(grid, from_state_dict(start), num_rounds=4)
    federated = to_state_dict(result.arrays)
    assert list(federated) == ["weight", "bias"]
    assert all(torch.equal(federated[key], by_hand[key]) for key in by_hand)


def test_fedmedian_moves_by_the_median_of_the_clients():
    w, _ = weights_after(FedMedian(**ALL), rounds=2)
    np.testing.assert_allclose(w, 2 * np.median(MOVES), rtol=1e-6)


def test_fedadam_takes_adams_first_step():
    eta, beta_1, beta_2, tau = 0.1, 0.9, 0.99, 1e-3
    w, _ = weights_after(FedAdam(**ALL, eta=eta, beta_1=beta_1, beta_2=beta_2, tau=tau))
    delta = MOVES.mean()
    m, v = (1 - beta_1) * delta, beta_2 * 0 + (1 - beta_2) * delta**2
    corrected = eta * np.sqrt(1 - beta_2**2) / (1 - beta_1**2)
    np.testing.assert_allclose(w, corrected * m / (np.sqrt(v) + tau), rtol=1e-5)


def test_krum_takes_the_weights_of_one_client_with_close_neighbours():
    nodes = {"min_train_nodes": 5, "min_evaluate_nodes": 5, "min_available_nodes": 5}
    with InProcessGrid(client_app, 5) as grid:
        w = Krum(**nodes, num_malicious_nodes=1).start(grid, initial(3), num_rounds=1).arrays["w"].numpy()
    # two neighbours count: squared distances 1 + 1 for the three inner clients, 1 + 4 for the outer two
    assert w[0] in (2.0, 3.0, 4.0)
    assert np.all(w == w[0])


def test_central_dp_without_noise_clips_every_update():
    dp = DifferentialPrivacyServerSideFixedClipping(
        FedAvg(**ALL), noise_multiplier=0.0, clipping_norm=0.5, num_sampled_clients=N
    )
    with InProcessGrid(client_app, N) as grid:
        w = dp.start(grid, initial(3), num_rounds=1).arrays["w"].numpy()
    # every client moves 3 weights and one bias by the same number: a direction of norm 2 per unit, so clipped
    # to 0.5 it moves each by 0.25
    np.testing.assert_allclose(w, 0.25, rtol=1e-5)


def test_central_dp_adds_noise_to_the_aggregate():
    np.random.seed(0)
    dp = DifferentialPrivacyServerSideFixedClipping(
        FedAvg(**ALL), noise_multiplier=1.0, clipping_norm=4.0, num_sampled_clients=N
    )
    with InProcessGrid(client_app, N) as grid:
        w = dp.start(grid, initial(4000), num_rounds=1).arrays["w"].numpy()
    # sigma = multiplier * clip / sampled = 1; the standard error of a deviation over 4000 draws is 1.1 %
    assert np.std(w) == pytest.approx(1.0, rel=0.05)
