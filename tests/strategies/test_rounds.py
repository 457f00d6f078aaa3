"""A round's random choices depend on the seed and the round's number alone."""

import random

import numpy as np
import pytest
from flwr.app import ConfigRecord
from flwr.serverapp import strategy as flower

from fedaudit.simulation.in_process import InProcessGrid
from fedaudit.training.local import client_seed
from strategies.rounds import NOISE, SAMPLING, SeededRounds
from tests.strategies.federation import N, app, initial, strategy


class Spy(flower.FedAvg):
    """Remembers what was sampled, and draws noise as Flower's DP wrappers do."""

    def __init__(self):
        super().__init__(fraction_train=0.5, fraction_evaluate=0.0, min_train_nodes=3)
        self.sampled, self.noise, self.rounds = {}, {}, []

    def configure_train(self, server_round, arrays, config, grid):
        messages = list(super().configure_train(server_round, arrays, config, grid))
        self.sampled[server_round] = [message.metadata.dst_node_id for message in messages]
        return messages

    def aggregate_train(self, server_round, replies):
        self.noise[server_round] = np.random.normal(size=4).tolist()
        self.rounds.append(server_round)
        return super().aggregate_train(server_round, replies)


def run(rounds, done=0, seed=0, before=lambda: None):
    spy = Spy()
    with InProcessGrid(app, N, seed=1) as grid:
        before()
        SeededRounds(spy, seed, done).start(grid, initial(), num_rounds=rounds)
    return spy


def disturb():
    random.seed(99)
    np.random.seed(99)
    random.random()


def test_a_round_samples_the_same_nodes_whether_or_not_earlier_rounds_ran():
    whole, rest = run(4), run(2, done=2, before=disturb)
    assert rest.rounds == [3, 4]
    for number in (3, 4):
        assert rest.sampled[number] == whole.sampled[number]
        assert rest.noise[number] == whole.noise[number]


def test_rounds_and_seeds_sample_different_nodes():
    one, other = run(6), run(6, seed=1)
    assert len({tuple(nodes) for nodes in one.sampled.values()}) > 1
    assert one.sampled != other.sampled
    assert len({tuple(noise) for noise in one.noise.values()}) == 6


@pytest.mark.parametrize("purpose", [SAMPLING, NOISE])
def test_the_servers_draws_share_no_seed_with_a_client(purpose):
    assert client_seed(0, purpose, 1) not in {client_seed(0, client, 1) for client in range(1000)}
    assert client_seed(0, SAMPLING, 1) != client_seed(0, NOISE, 1)


def test_clients_and_the_wrapped_strategy_see_the_number_of_the_whole_run():
    inner = strategy("FedAvg")
    rounds = SeededRounds(inner, seed=0, done=5)
    with InProcessGrid(app, N, seed=1) as grid:
        messages = list(rounds.configure_train(1, initial(), ConfigRecord(), grid))
    assert {int(message.content["config"]["server-round"]) for message in messages} == {6}
