"""AuditStrategy: wrap any Flower strategy and see, before it aggregates, what every update gives away.

    auditor = Auditor("runs/mine")
    strategy = AuditStrategy(FedAvg(), auditor)
    strategy.start(grid, arrays, num_rounds=10)

Order matters: AuditStrategy(DP(FedAvg)) sees what clients sent (an honest-but-curious server);
DP(AuditStrategy(FedAvg)) sees what the DP wrapper made of it.

`Auditor(..., verify=claims)` tests claims in every audited round. What they say of the aggregate is tested on
what the WRAPPED strategy returns: AuditStrategy goes outside of whatever adds the noise.
"""

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from torch import Tensor

from fedaudit.audit.auditor import Auditor
from fedaudit.audit.rows import ClientFinding, Rejection
from fedaudit.audit.secure_sum import SecureSum
from fedaudit.defenses.secure_aggregation import TooFewClientsError
from fedaudit.errors import BadUpdateError, ConfigError
from fedaudit.flower.arrays import from_state_dict, to_state_dict
from fedaudit.flower.messages import (
    DECLINED,
    MEASURE_PREFIX,
    audit_record,
    decode_finding,
    metric_keys,
    read_reply,
)
from fedaudit.types import ClientUpdate, Guarantee

logger = logging.getLogger(__name__)
REJECTED = 0  # Flower's error code for an unknown error


class AuditStrategy(Strategy):
    """A strategy that audits each reply and leaves the wrapped strategy's result bit for bit unchanged.

    Args:
        strategy: the strategy that samples nodes and aggregates.
        auditor: measures, attacks and records.
        client_ids: node id to client id, where it is known; otherwise node ids are recorded.
        reject_bad_updates: hand a reply that breaks a rule on as a failed client, which is what Flower's
            strategies know how to handle (FedAvg and CentralDP go on without it; a DP wrapper of
            Flower's, whose noise is calibrated to the number of clients, gives up the round). If False it
            is handed on untouched.
        weight_key: the metric that weights a client.
        announce: numbers to add to the train configuration of a round, given its number; None adds none and
            hands the wrapped strategy the very configuration that came in. What is announced must come
            from what clients released and from the server's own data: clients choose noise by it.
        secure: secure aggregation: audit and wrapped strategy are handed the sum of the valid updates as if
            one client had sent it, beside failures, and single updates never; None hands on single ones.

    Raises:
        ConfigError: if the wrapped strategy overrides `start`, which would bypass the audit.
    """

    def __init__(
        self,
        strategy: Strategy,
        auditor: Auditor,
        *,
        client_ids: Mapping[int, int] | None = None,
        reject_bad_updates: bool = True,
        weight_key: str = "num-examples",
        announce: Callable[[int], Mapping[str, float]] | None = None,
        secure: SecureSum | None = None,
    ) -> None:
        if type(strategy).start is not Strategy.start:
            raise ConfigError(
                f"a wrapped strategy must not override start(), got {type(strategy).__name__}: "
                "call its pieces from configure_train and aggregate_train instead"
            )
        self.strategy = strategy
        self.auditor = auditor
        self.client_ids = dict(client_ids or {})
        self.reject_bad_updates = reject_bad_updates
        self.weight_key = weight_key
        self.announce = announce
        self.secure = secure
        self._broadcast: dict[str, Tensor] = {}
        self._sent: list[Message] = []

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Configure training as the wrapped strategy does, and remember what is sent to whom."""
        self._broadcast = dict(to_state_dict(arrays))
        announced = self.announce(server_round) if self.announce is not None else {}
        if announced:
            config = ConfigRecord({**config, **announced})
        self._sent = list(self.strategy.configure_train(server_round, arrays, config, grid))
        return self._sent

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Audit the replies, then let the wrapped strategy aggregate them."""
        received = list(replies)
        sent = {message.metadata.message_id: message for message in self._sent}
        updates: list[ClientUpdate] = []
        rejected: list[Rejection] = []
        findings: list[ClientFinding] = []
        guarantees: dict[int, Guarantee] = {}
        handed_on: list[Message] = []
        usual_keys = _usual_metric_keys(received)
        # a vote among clients would let one decide about others, which client-level privacy cannot bear
        alone = bool(getattr(self.strategy, "judges_replies_alone", False))
        for message in received:
            asked = sent.pop(message.metadata.reply_to_message_id, None)
            # an error that the SuperLink made carries its own id, not the lost node's
            node = int(asked.metadata.dst_node_id if asked else message.metadata.src_node_id)
            client = self.client_ids.get(node, node)
            try:
                if message.has_error():
                    reason = str(message.error.reason)
                    declined = reason.startswith(DECLINED)
                    raise BadUpdateError(f"the client {reason if declined else f'failed: {reason}'}")
                update = read_reply(
                    message,
                    self._broadcast,
                    round_number=server_round,
                    client_ids=self.client_ids,
                    weight_key=self.weight_key,
                )
                if not alone and metric_keys(message) != usual_keys:
                    raise BadUpdateError(
                        f"clients report the same metrics, got {sorted(metric_keys(message))} "
                        f"instead of {sorted(usual_keys)}"
                    )
                self._check_weight(update)
                beside = audit_record(message)
                guarantee = _guarantee(beside)
                if guarantee is not None:
                    guarantees[client] = guarantee
                findings += _findings(client, node, beside)
                updates.append(update)
                handed_on.append(message)
            except Exception as error:  # anything a client can send ends here, never in the federation
                reason = (
                    str(error) if isinstance(error, BadUpdateError) else f"the reply is unreadable: {error!r}"
                )
                rejected.append(Rejection(client, node, reason))
                refused = self.reject_bad_updates or self.secure is not None
                replace = refused and not message.has_error() and asked is not None
                handed_on.append(_as_failure(asked, reason) if replace and asked is not None else message)
        for message in sent.values():
            node = int(message.metadata.dst_node_id)
            rejected.append(
                Rejection(self.client_ids.get(node, node), node, "no reply within the round's timeout")
            )
        behind: list[ClientUpdate] = []
        if self.secure is not None:
            failures = [message for message in handed_on if message.has_error()]
            names = next((message.content for message in handed_on if not message.has_error()), None)
            summed = self._summed(self.secure, updates, rejected)
            behind, updates, handed_on = (updates if summed else []), [summed] if summed else [], failures
            if summed is not None and names is not None:
                content = _as_one_client(summed, names, self.weight_key)
                handed_on = [Message(content, reply_to=self._sent[0]), *failures]
        self.auditor.audit(server_round, updates, rejected, findings, guarantees, behind)
        norm = clip_norm(self.strategy)
        arrays, metrics = self.strategy.aggregate_train(server_round, handed_on)
        following = clip_norm(self.strategy)
        norms = (norm, following) if norm is not None and following is not None else None
        if norms is not None:
            self.auditor.note(server_round, "clip-norm", norms[0], "1", extra={"next": norms[1]})
        self.auditor.check_claims(
            server_round,
            updates,
            broadcast=self._broadcast,
            aggregate=self._after(arrays),
            clip_norms=norms,
        )
        return arrays, metrics

    def _after(self, arrays: ArrayRecord | None) -> Mapping[str, Tensor] | None:
        """The weights after a round, which stay as they were if it was given up; None if unreadable."""
        if arrays is None or self.auditor.verifier is None:
            return self._broadcast
        try:
            return to_state_dict(arrays)
        except Exception as error:  # the federation may know what to do with them
            logger.warning("the weights after the round cannot be read: %s", error)
            return None

    def _summed(
        self, secure: SecureSum, updates: list[ClientUpdate], rejected: list[Rejection]
    ) -> ClientUpdate | None:
        """The sum of a round; None, and every update rejected, if too few clients sent one."""
        nodes = [int(message.metadata.dst_node_id) for message in self._sent]
        try:
            return secure(updates, [self.client_ids.get(node, node) for node in nodes]) if updates else None
        except TooFewClientsError as error:
            rejected += [Rejection(update.client_id, update.node_id, str(error)) for update in updates]
            return None

    def _check_weight(self, update: ClientUpdate) -> None:
        """Raise where secure aggregation has no room for a client's examples."""
        most = self.secure.most_examples(len(self._sent)) if self.secure is not None else update.num_examples
        if update.num_examples > most:
            raise BadUpdateError(
                f"secure aggregation of {len(self._sent)} clients takes at most {most} examples of each, got "
                f"{update.num_examples}"
            )

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Configure evaluation as the wrapped strategy does."""
        return self.strategy.configure_evaluate(server_round, arrays, config, grid)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Aggregate evaluation as the wrapped strategy does."""
        return self.strategy.aggregate_evaluate(server_round, replies)

    def summary(self) -> None:
        """Log this wrapper and the strategy inside it."""
        logger.info("\t├──> AuditStrategy: %s", ", ".join(self.auditor.measure_names) or "no measures")
        self.strategy.summary()

    def start(self, *args: Any, **kwargs: Any) -> Result:
        """Run the federation; records of completed rounds survive whatever ends it."""
        return super().start(*args, **kwargs)


def clip_norm(strategy: Strategy) -> float | None:
    """The clip norm that a strategy, or one it wraps, applies now; None if none of them has one.

    It is read from `clipping_norm`, as Flower's privacy wrappers name it.
    """
    layer: object = strategy
    while isinstance(layer, Strategy):
        norm = getattr(layer, "clipping_norm", None)
        if isinstance(norm, (int, float)) and norm > 0 and math.isfinite(norm):
            return float(norm)
        layer = getattr(layer, "strategy", None)
    return None


def _usual_metric_keys(replies: Iterable[Message]) -> frozenset[str]:
    counts = Counter(metric_keys(message) for message in replies if not message.has_error())
    return counts.most_common(1)[0][0] if counts else frozenset()


def _as_failure(asked: Message, reason: str) -> Message:
    return Message(Error(code=REJECTED, reason=f"rejected: {reason}"), reply_to=asked)


def _as_one_client(summed: ClientUpdate, like: RecordDict, weight_key: str) -> RecordDict:
    """A sum as the reply of one client that holds all examples, with records named as in another reply."""
    state = {
        name: sent + summed.delta[name] if name in summed.delta else sent
        for name, sent in summed.before.items()
    }
    records: dict[str, ArrayRecord | MetricRecord] = {}
    for name, record in like.items():
        if isinstance(record, ArrayRecord):
            records[name] = from_state_dict(state)
        elif isinstance(record, MetricRecord):
            records[name] = MetricRecord({weight_key: summed.num_examples})
    return RecordDict(dict(records))


def _guarantee(beside: Mapping[str, Any]) -> Guarantee | None:
    if "epsilon" not in beside:
        return None
    unit: Literal["client", "example"] = "client" if beside["privacy-unit"] == "client" else "example"
    return Guarantee(float(beside["epsilon"]), float(beside["delta"]), unit, str(beside["accountant"]))


def _findings(client: int, node: int, beside: Mapping[str, Any]) -> list[ClientFinding]:
    found = []
    for key, text in beside.items():
        if key.startswith(MEASURE_PREFIX):
            finding, seconds = decode_finding(str(text))
            found.append(ClientFinding(client, node, key.removeprefix(MEASURE_PREFIX), finding, seconds))
    return found
