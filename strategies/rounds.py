"""Round numbers and randomness of a run that may have been interrupted.

Flower samples clients with Python's global `random` and its DP wrappers draw noise from numpy's global
generator. `SeededRounds` seeds both from (seed, round) just before they are used, so that a round is a
function of the seed and the state before it, whether or not the process started at round 1.
"""

import random
from collections.abc import Iterable

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedaudit.training.local import client_seed

SAMPLING, NOISE = -1, -2  # stand where a client's number would: no client has these


class SeededRounds(Strategy):
    """Runs a strategy from round `done` + 1 on, with the global generators seeded for each round.

    Args:
        strategy: the strategy, wrappers included.
        seed: the run's seed.
        done: rounds completed before.
    """

    def __init__(self, strategy: Strategy, seed: int, done: int = 0) -> None:
        self.strategy, self.seed, self.done = strategy, seed, done

    def _seed(self, purpose: int, server_round: int) -> None:
        mixed = client_seed(self.seed, purpose, server_round)
        random.seed(mixed)
        np.random.seed(mixed % 2**32)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Sample and configure this run's round."""
        number = server_round + self.done
        self._seed(SAMPLING, number)
        return self.strategy.configure_train(number, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Aggregate this run's round."""
        number = server_round + self.done
        self._seed(NOISE, number)
        return self.strategy.aggregate_train(number, replies)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Configure evaluation of this run's round."""
        return self.strategy.configure_evaluate(server_round + self.done, arrays, config, grid)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Aggregate evaluation of this run's round."""
        return self.strategy.aggregate_evaluate(server_round + self.done, replies)

    def summary(self) -> None:
        """Log the strategy."""
        self.strategy.summary()
