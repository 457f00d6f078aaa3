"""CentralDP: client-level differential privacy around a Flower strategy that averages.

    from fedaudit.flower import CentralDP
    strategy = CentralDP(FedAvg(), noise_multiplier=1.0, clipping_norm=1.0, num_sampled_clients=100)
    strategy.start(grid, arrays, num_rounds=10)

The wrapped strategy asks clients and receives one reply in their place, the noised mean, so that its log
speaks of one result. What it makes of it (FedAvgM's momentum, FedAdam's step) is post-processing and costs no
privacy.
"""

import logging
import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import flwr.serverapp.strategy as flower
import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from fedaudit.accounting import Accountant, FederationLedger
from fedaudit.defenses.central_dp import ADVERSARY, CentralPlan, CentralPrivacy, Sampling, Weighting
from fedaudit.defenses.central_mechanism import CentralRelease
from fedaudit.errors import BadUpdateError, ConfigError, RecordError
from fedaudit.flower.arrays import from_state_dict, to_state_dict
from fedaudit.flower.messages import read_reply
from fedaudit.types import ClientUpdate, Guarantee

logger = logging.getLogger(__name__)
AVERAGING: tuple[type[Strategy], ...] = (
    *(flower.FedAvg, flower.FedProx, flower.FedAvgM),
    *(flower.FedAdam, flower.FedAdagrad, flower.FedYogi),
)
"""Strategies of Flower's whose step is a function of the plain mean; a class derived from one counts too."""
_SAMPLING, _NOISE = 0, 1


@dataclass(frozen=True, eq=False)
class CentralRound:
    """What CentralDP did in a round.

    Attributes:
        round: server round.
        replies: updates that entered; known to the server only.
        release: clip norm, noise and change.
        plan: mechanism and accounting.
        releases: rounds released so far, this one included.
        guarantee: of all of them, against `adversary`; None if epsilon has no bound.
        adversary: who sees the released models and nothing else.
    """

    round: int
    replies: int
    release: CentralRelease
    plan: CentralPlan
    releases: int
    guarantee: Guarantee | None
    adversary: Literal["outsider"] = ADVERSARY


class CentralDP(Strategy):
    """Clips whole updates, adds them up with bounded weights, adds noise to every coordinate, averages.

    What it guarantees, against whom, and what becomes of failed clients, empty rounds and integer entries is
    said in `fedaudit.defenses.central_dp.CentralPrivacy`. Replies are paired with the broadcast by name and
    judged one by one; a client counts once in a round. AuditStrategy goes outside: it sees raw updates.

    Args:
        strategy: FedAvg, FedProx, FedAvgM, FedAdam, FedAdagrad, FedYogi or a class derived from one.
        noise_multiplier: z, noise over sensitivity of a round; 0 means from epsilon and rounds.
        clipping_norm: C over all floating-point entries; the first round's if adaptive.
        num_sampled_clients: the (expected) number of clients that a round asks, and the divisor of their sum.
        clients: how many there are; 0 means num_sampled_clients. Under Poisson sampling each is asked with
            probability num_sampled_clients / clients.
        epsilon: budget; a round that would exceed it asks nobody and leaves the model as it is. 0 is none.
        rounds: that epsilon is divided over if noise_multiplier is 0.
        delta: probability that epsilon is stated at, under 1 / clients.
        accountant: "rdp", "prv" or "pld".
        adaptive: whether C follows a quantile of the update norms.
        quantile: share of updates that shall not be clipped.
        clip_lr: step size of the logarithm of C.
        count_noise: standard deviation of the noise on the count of unclipped updates; 0 means
            max(num_sampled_clients / 20, 1.5 z).
        weights: "uniform", or "capped": min(examples, cap) over a fixed denominator.
        cap: examples that a client counts with at most.
        denominator: of capped weights; 0 means num_sampled_clients times cap.
        sampling: "fixed": as the strategy asks clients. "poisson": each independently; the strategy must then
            ask all of them.
        seed: of noise and sampling, for simulations; None takes 128 bits from the operating system. Two
            federations with one seed share their noise, and whoever knows it removes it.
        evaluate_on_clients: let clients evaluate; what they report is not covered by the guarantee.
        on_release: called after each release.
        on_hold: called with the round and the reason when a round is not run.

    Raises:
        ConfigError: for a strategy whose aggregate is no function of the plain mean, or one that releases
            clients' metrics.
        ValueError: for an option out of range.
    """

    judges_replies_alone = True
    """Whether one client's reply never decides about another's; AuditStrategy then compares no metrics."""

    def __init__(
        self,
        strategy: Strategy,
        noise_multiplier: float = 0.0,
        clipping_norm: float = 1.0,
        num_sampled_clients: int = 0,
        *,
        clients: int = 0,
        epsilon: float = 0.0,
        rounds: int = 0,
        delta: float = 1e-5,
        accountant: Accountant = "rdp",
        adaptive: bool = False,
        quantile: float = 0.5,
        clip_lr: float = 0.2,
        count_noise: float = 0.0,
        weights: Weighting = "uniform",
        cap: int = 0,
        denominator: float = 0.0,
        sampling: Sampling = "fixed",
        seed: int | None = None,
        evaluate_on_clients: bool = False,
        on_release: Callable[[CentralRound], None] | None = None,
        on_hold: Callable[[int, str], None] | None = None,
    ) -> None:
        if num_sampled_clients < 1:
            raise ValueError(
                f"num_sampled_clients is the fixed divisor of the sum of updates, got {num_sampled_clients}: "
                "state how many clients a round asks"
            )
        settings = CentralPrivacy(
            epsilon=epsilon,
            noise_multiplier=noise_multiplier,
            clip=clipping_norm,
            delta=delta,
            accountant=accountant,
            adaptive=adaptive,
            quantile=quantile,
            clip_lr=clip_lr,
            count_noise=count_noise,
            weights=weights,
            cap=cap,
            denominator=denominator,
            sampling=sampling,
            rounds=rounds,
        )
        plan = settings.central_plan(clients or num_sampled_clients, num_sampled_clients)
        self._begin(strategy, plan, seed, evaluate_on_clients, on_release, on_hold)

    @classmethod
    def planned(
        cls,
        strategy: Strategy,
        plan: CentralPlan,
        *,
        seed: int | None = None,
        on_release: Callable[[CentralRound], None] | None = None,
        on_hold: Callable[[int, str], None] | None = None,
    ) -> "CentralDP":
        """The wrapper for a plan made elsewhere, such as that of a defense chosen by name."""
        made = cls.__new__(cls)
        made._begin(strategy, plan, seed, False, on_release, on_hold)
        return made

    def _begin(
        self,
        strategy: Strategy,
        plan: CentralPlan,
        seed: int | None,
        evaluate_on_clients: bool,
        on_release: Callable[[CentralRound], None] | None,
        on_hold: Callable[[int, str], None] | None,
    ) -> None:
        _check_inner(strategy, plan)
        self.strategy, self.plan = strategy, plan
        self.evaluate_on_clients = evaluate_on_clients
        self.on_release, self.on_hold = on_release, on_hold
        self.clip_norm = plan.mechanism.clip_norm
        self.ledger: FederationLedger = plan.ledger()
        self._entropy = secrets.randbits(128) if seed is None else seed
        self._held = False
        self._arrays = ArrayRecord()
        self._broadcast: dict[str, Tensor] = {}
        self._asked: frozenset[int] = frozenset()

    @property
    def guarantee(self) -> Guarantee | None:
        """Of all rounds so far, against those who see the released models; None if epsilon has no bound."""
        return self.plan.guarantee(self.ledger)

    def state_to_keep(self) -> dict[str, Any]:
        """What the next round depends on, as plain numbers, for a checkpoint."""
        return {"clip-norm": self.clip_norm, "ledger": self.ledger.to_lists()}

    def take_state(self, kept: Mapping[str, Any]) -> None:
        """Continue from what `state_to_keep` returned.

        Raises:
            RecordError: if it is damaged, or of another federation.
        """
        try:
            ledger, clip_norm = FederationLedger.from_lists(kept["ledger"]), float(kept["clip-norm"])
        except (KeyError, TypeError, ValueError) as error:
            raise RecordError(f"what CentralDP kept is damaged ({error}): start the run anew") from error
        if (ledger.clients, ledger.sampling) != (self.ledger.clients, self.ledger.sampling):
            raise RecordError(
                f"a ledger is continued with the clients and the sampling it began with, got "
                f"{self.ledger.clients}, {self.ledger.sampling} after {ledger.clients}, {ledger.sampling}"
            )
        self.ledger, self.clip_norm = ledger, clip_norm

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask whom the wrapped strategy asks, or a Poisson sample; nobody once the budget is spent."""
        self._arrays, self._broadcast = arrays, dict(to_state_dict(arrays))
        self._asked = frozenset()
        self._held = not self.plan.admits(self.ledger)
        if self._held:
            reached = self.guarantee
            reason = (
                f"one more round would exceed the budget of epsilon = {self.plan.budget:.4g} "
                f"(now {reached.epsilon if reached else float('inf'):.4g}): the model is held"
            )
            logger.warning("round %d: %s", server_round, reason)
            if self.on_hold is not None:
                self.on_hold(server_round, reason)
            return []
        poisson = self.plan.sampling == "poisson"
        nodes = len(list(grid.get_node_ids())) if poisson else 0
        messages = list(self.strategy.configure_train(server_round, arrays, config, grid))
        if poisson:
            messages = self._thinned(messages, min(nodes, len(list(grid.get_node_ids()))))
        self._asked = frozenset(int(message.metadata.dst_node_id) for message in messages)
        return messages

    def _thinned(self, messages: list[Message], nodes: int) -> list[Message]:
        if len(messages) < nodes:
            raise ConfigError(
                f"Poisson sampling draws from all clients, got a strategy that asks {len(messages)} of "
                f"{nodes}: let it ask all (fraction_train=1.0)"
            )
        ordered = sorted(messages, key=lambda message: int(message.metadata.dst_node_id))
        drawn = self._source(_SAMPLING).random(len(ordered)) < self.plan.sample_rate
        return [message for message, chosen in zip(ordered, drawn, strict=True) if chosen]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Release the noised mean of what came in, through the wrapped strategy; no metrics."""
        if self._held:
            return None, None
        received = self._read(server_round, replies)
        release = self.plan.mechanism.release(
            [received[node].delta for node in sorted(received)],
            [received[node].num_examples for node in sorted(received)],
            self._broadcast,
            self.clip_norm,
            self._source(_NOISE),
        )
        self.ledger = self.plan.after(self.ledger)
        noised = {
            name: (sent.double() + release.change[name]).to(sent.dtype) if name in release.change else sent
            for name, sent in self._broadcast.items()
        }
        arrays = self._through(server_round, from_state_dict(noised))
        self.clip_norm = release.next_clip_norm
        stated = self.guarantee
        logger.info("round %d: %d updates released with noise, %s", server_round, len(received), stated)
        if self.on_release is not None:
            self.on_release(
                CentralRound(server_round, len(received), release, self.plan, self.ledger.rounds, stated)
            )
        return arrays, None

    def _read(self, server_round: int, replies: Iterable[Message]) -> dict[int, ClientUpdate]:
        """Usable updates by node: each judged by itself, one for each node that was asked."""
        found: dict[int, ClientUpdate] = {}
        for message in replies:
            node = int(message.metadata.src_node_id)
            if message.has_error():
                logger.info("round %d: a client failed: %s", server_round, message.error.reason)
                continue
            try:
                if node not in self._asked or node in found:
                    raise BadUpdateError("a client answers once, and only if it was asked")
                found[node] = read_reply(
                    message,
                    self._broadcast,
                    round_number=server_round,
                    client_ids={},
                    weight_key=getattr(self.strategy, "weighted_by_key", "num-examples"),
                )
            except Exception as error:  # anything a client can send counts as a missing update
                logger.warning("round %d: the reply of node %d is not used: %s", server_round, node, error)
        return found

    def _through(self, server_round: int, noised: ArrayRecord) -> ArrayRecord | None:
        """What the wrapped strategy makes of the noised mean; integer entries stay as they were sent."""
        key = getattr(self.strategy, "weighted_by_key", "num-examples")
        content = RecordDict({"arrays": noised, "metrics": MetricRecord({key: 1})})
        made, _ = self.strategy.aggregate_train(
            server_round, [Message(content, dst_node_id=0, message_type=MessageType.TRAIN)]
        )
        if made is None:
            return None
        return ArrayRecord(
            {
                name: made[name] if sent.is_floating_point() else self._arrays[name]
                for name, sent in self._broadcast.items()
            }
        )

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Nobody is asked unless `evaluate_on_clients`: what clients measure on their data holds no noise."""
        if not self.evaluate_on_clients:
            return []
        return self.strategy.configure_evaluate(server_round, arrays, config, grid)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Aggregate evaluation as the wrapped strategy does, where clients evaluate at all."""
        if not self.evaluate_on_clients:
            return None
        return self.strategy.aggregate_evaluate(server_round, replies)

    def summary(self) -> None:
        """Log this wrapper and the strategy inside it."""
        mechanism = self.plan.mechanism
        logger.info(
            "\t├──> CentralDP: clip norm %.4g%s, noise multiplier %.4g, divisor %.4g, %s sampling",
            self.clip_norm,
            " (adaptive)" if mechanism.adaptive else "",
            mechanism.noise_multiplier,
            mechanism.divisor,
            self.plan.sampling,
        )
        self.strategy.summary()

    def _source(self, purpose: int) -> np.random.Generator:
        """A generator for one purpose in one release; releases are counted, so that none is drawn twice."""
        mixed = np.random.SeedSequence(self._entropy, spawn_key=(purpose, self.ledger.rounds))
        return np.random.default_rng(mixed)


def _check_inner(strategy: Strategy, plan: CentralPlan) -> None:
    """Raise a ConfigError unless the strategy's step is a function of the plain mean."""
    name = type(strategy).__name__
    if isinstance(getattr(strategy, "strategy", None), Strategy):
        raise ConfigError(
            f"CentralDP holds the averaging strategy itself, got the wrapper {name}: put it outside"
        )
    flowers = next((kind for kind in type(strategy).__mro__ if kind.__module__.startswith("flwr.")), None)
    if flowers not in AVERAGING:
        allowed = ", ".join(kind.__name__ for kind in AVERAGING)
        raise ConfigError(
            f"noise for the mean of clipped updates fits strategies that take a plain mean, got {name}: "
            f"use {allowed}"
        )
    if type(strategy).start is not Strategy.start:
        raise ConfigError(
            f"a wrapped strategy must not override start(), got {name}: it would pass CentralDP by"
        )
    averaging = getattr(strategy, "train_metrics_aggr_fn", None)
    if getattr(averaging, "__module__", "flwr.").split(".")[0] != "flwr":
        raise ConfigError(
            f"clients' metrics are not released under the guarantee, got {name} with train_metrics_aggr_fn: "
            "leave it out"
        )
    if plan.sampling == "poisson" and getattr(strategy, "fraction_train", 1.0) != 1.0:
        raise ConfigError(
            f"Poisson sampling draws from all clients, got fraction_train="
            f"{getattr(strategy, 'fraction_train', None)} in {name}: set it to 1.0; num_sampled_clients says "
            "how many are expected"
        )
