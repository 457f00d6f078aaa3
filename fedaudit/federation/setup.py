"""What the server and the client of a federation share: data, model, training and defense.

Both sides build the same `Setup` from the same configuration, once per process; nothing of it travels.
"""

import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedaudit.accounting import Ledger
from fedaudit.audit.secure_sum import SecureSum, context_of_sum
from fedaudit.config import RunConfig
from fedaudit.data.dataset import Split, load_dataset, split
from fedaudit.data.partition import partition
from fedaudit.defenses.base import BudgetedByRound, Defense, adaptive, removing
from fedaudit.defenses.chain import secure_part
from fedaudit.models.build import build_model
from fedaudit.registry import DEFENSES
from fedaudit.spec import parse_spec
from fedaudit.training.censorship import Censorship, Peeled
from fedaudit.training.local import (
    TrainSettings,
    client_seed,
    plan_batches,
    settings_in_round,
    steps_per_round,
)
from fedaudit.training.round_release import plan, release_behind
from fedaudit.types import ClientUpdate, LocalEvidence, RoundContext, StepRelease, Truth


def summed_cross_entropy(outputs: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy summed over the batch, in nats; labels are class indices or probabilities (B, C)."""
    return functional.cross_entropy(outputs, labels, reduction="sum")


@dataclass(frozen=True)
class Setup:
    """Everything one process needs of a federation, derived from its configuration.

    Attributes:
        config: the configuration.
        clients: number of partitions the training data is split into.
    """

    config: RunConfig
    clients: int

    @cached_property
    def data(self) -> Split:
        """Training, test and reference data."""
        return split(load_dataset(self.config.data, self.config.seed), self.config.data, self.config.seed)

    @cached_property
    def partitions(self) -> list[Tensor]:
        """Indices of each client's examples in the training data."""
        labels = self.data.train.y.numpy()
        found = partition(self.config.data.partitioner, labels, self.clients, self.config.seed)
        return [torch.as_tensor(indices, dtype=torch.int64) for indices in found]

    def client_data(self, client: int) -> tuple[Tensor, Tensor]:
        """A client's own examples and labels, those that its defense leaves out included."""
        rows = self.partitions[client]
        return self.data.train.x[rows], self.data.train.y[rows]

    @cached_property
    def censorship(self) -> Censorship | None:
        """Which examples clients leave out, if their defense says that they do."""
        defense = removing(self.defense)
        if defense is None:
            return None
        return Censorship(
            defense,
            lambda: self.build_model().to(self.device),
            summed_cross_entropy,
            self.settings(1),
            self.config.seed,
            remembered=2 * self.clients,
        )

    def num_examples(self, client: int) -> int:
        """How many of its examples a client trains on, in every round."""
        held = len(self.partitions[client])
        return self.censorship.left(held) if self.censorship is not None else held

    def rows(self, client: int, weights: Mapping[str, Tensor]) -> Tensor:
        """Positions, among a client's own, of the examples it trains on when it is sent these weights."""
        if self.censorship is None:
            return torch.arange(len(self.partitions[client]))
        return self.censorship.rows(client, *self.client_data(client), weights)

    def training_data(self, client: int, weights: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The examples and labels a client trains on when it is sent these weights."""
        x, y = self.client_data(client)
        if self.censorship is None:
            return x, y
        rows = self.censorship.rows(client, x, y, weights)
        return x[rows], y[rows]

    def peeled(self, client: int, weights: Mapping[str, Tensor]) -> Peeled | None:
        """How unique a client's examples are with and without those it leaves out; None if it leaves none."""
        if self.censorship is None:
            return None
        return self.censorship.peeled(client, *self.client_data(client), weights)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one example."""
        return tuple(self.data.train.x.shape[1:])

    def build_model(self) -> nn.Module:
        """A fresh model with the run's initial weights."""
        return build_model(
            self.config.model.name, self.input_shape, self.data.train.num_classes, self.config.seed
        )

    @cached_property
    def _worker(self) -> threading.local:
        return threading.local()

    def worker_model(self) -> nn.Module:
        """This thread's one model instance; its weights are whatever was loaded last."""
        if not hasattr(self._worker, "model"):
            self._worker.model = self.build_model().to(self.device)
        return self._worker.model  # type: ignore[no-any-return]

    @cached_property
    def device(self) -> torch.device:
        """Where clients train."""
        wanted = self.config.federation.device
        if wanted == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return torch.device(wanted)

    @cached_property
    def defense(self) -> Defense:
        """The defense in force, planned over the run's rounds where it divides a budget among them."""
        rounds = self.config.federation.rounds
        built: Defense = DEFENSES.build(parse_spec(self.config.defense.name))
        if isinstance(built, BudgetedByRound):
            return built.over_rounds(rounds)
        return plan(built, settings_in_round(self.config.train, built, 1), rounds)

    @cached_property
    def secure(self) -> SecureSum | None:
        """Secure aggregation, if it is in force."""
        part = secure_part(self.defense)
        return SecureSum(part, self.config.seed) if part is not None else None

    def settings(self, round_number: int, proximal_mu: float = 0.0) -> TrainSettings:
        """Local training in a round, under the defense in force."""
        return settings_in_round(self.config.train, self.defense, round_number, proximal_mu)

    def release(self, num_examples: int) -> StepRelease:
        """What one local step of a client that trains on this many examples makes visible."""
        settings = self.settings(1)
        planned = steps_per_round(num_examples, settings) * self.config.federation.rounds
        return self.defense.release(num_examples, settings.batch_size, planned)

    def release_in_round(
        self, num_examples: int, round_number: int, ledger: Ledger, leakage: float | None
    ) -> StepRelease:
        """The same in one round, for a client that knows its ledger and what the server last measured."""
        changing = adaptive(self.defense)
        if changing is None:
            return self.release(num_examples)
        return changing.release_in_round(num_examples, round_number, ledger, leakage)

    def release_of(self, update: ClientUpdate) -> StepRelease:
        """What one local step behind this update made visible: as its client states it, else as planned."""
        return release_behind(self.defense, update) or self.release(update.num_examples)

    def batches(self, client: int, round_number: int) -> list[Tensor]:
        """Indices, in its training data, of each local step; a function of seed, client and round alone."""
        return plan_batches(
            self.num_examples(client),
            self.settings(round_number),
            poisson=self.defense.poisson,
            seed=client_seed(self.config.seed, client, round_number),
        )

    def context(self, round_number: int) -> RoundContext:
        """What an honest-but-curious server knows of a round."""
        settings, data = self.settings(round_number), self.data
        reference = (data.reference.x, data.reference.y) if data.reference is not None else None
        plain = settings.optimizer == "sgd" and not settings.momentum and not settings.weight_decay
        return RoundContext(
            round=round_number,
            build_model=self.build_model,
            loss=summed_cross_entropy,
            lr=settings.lr if plain else None,
            optimizer=settings.optimizer + (" with momentum" if settings.momentum else ""),
            local_steps=settings.local_steps,
            local_epochs=settings.local_epochs,
            batch_size=settings.batch_size,
            input_shape=self.input_shape,
            num_classes=data.train.num_classes,
            value_range=data.train.value_range,
            reference=reference,
            release=self.release_of,
            seed=client_seed(self.config.seed, 0, round_number),
            device=str(self.device),
        )

    def evidence(self, update: ClientUpdate) -> LocalEvidence:
        """The examples a client trains on (an oracle's view); of a sum, all clients'."""
        if update.summed:
            parts = [self.evidence(replace(update, client_id=each, summed=())) for each in update.summed]
            release = context_of_sum(self.context(update.round), update).release
            assert release is not None  # a context made here knows it
            x, y = torch.cat([part.x for part in parts]), torch.cat([part.y for part in parts])
            return LocalEvidence(x, y, release(update))
        x, y = self.training_data(update.client_id, update.before)
        return LocalEvidence(x, y, self.release_of(update))

    def truth(self, update: ClientUpdate) -> Truth:
        """The examples a client used in this round, each once (an oracle's view); of a sum, all clients'."""
        if update.summed:
            parts = [self.truth(replace(update, client_id=each, summed=())) for each in update.summed]
            return Truth(torch.cat([part.x for part in parts]), torch.cat([part.y for part in parts]))
        x, y = self.training_data(update.client_id, update.before)
        used = torch.cat([*self.batches(update.client_id, update.round), torch.empty(0, dtype=torch.int64)])
        rows = torch.unique(used)
        unused = torch.ones(len(y), dtype=torch.bool)
        unused[rows] = False
        return Truth(x[rows], y[rows], x[unused])


@lru_cache(maxsize=4)
def _setup(items: tuple[tuple[str, Any], ...], clients: int) -> Setup:
    return Setup(RunConfig.from_flat(dict(items)), clients)


def setup(run_config: Mapping[str, Any], clients: int | None = None) -> Setup:
    """The process's one `Setup` for this configuration.

    Raises:
        ConfigError: if the configuration breaks the schema.
        DataError: if the data is missing or cannot be split among so many clients.
    """
    known = {key: value for key, value in run_config.items() if not key.startswith("flwr.")}
    count = clients or int(known.get("federation.clients", RunConfig().federation.clients))
    return _setup(tuple(sorted(known.items())), count)
