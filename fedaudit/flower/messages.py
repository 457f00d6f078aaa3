"""Flower messages to client updates and back: what is checked before use, and what travels beside an update.

A client's audit scalars travel in one ConfigRecord named "fedaudit"; Flower's strategies ignore it, and
the one ArrayRecord and the one MetricRecord they insist on stay as they are.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

import torch
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from torch import Tensor

from fedaudit.errors import BadUpdateError
from fedaudit.flower.arrays import to_state_dict
from fedaudit.types import ClientUpdate, Estimate, Skip

_Record = TypeVar("_Record", ArrayRecord, MetricRecord)
AUDIT_RECORD = "fedaudit"
MEASURE_PREFIX = "measure."
LEAKAGE = "leakage"
"""Key of the train configuration under which a server tells what it measured last, relative to a target."""
DECLINED = "declined to train: "
"""Start of the reason of a client that does not train, and says why."""
_UNKNOWN = 0  # Flower's error code for anything that is not one of its own
MOST_EXAMPLES = 10_000_000_000


def read_reply(
    message: Message,
    broadcast: Mapping[str, Tensor],
    *,
    round_number: int,
    client_ids: Mapping[int, int],
    weight_key: str = "num-examples",
) -> ClientUpdate:
    """The update in a train reply, after every check.

    Args:
        message: a reply without error.
        broadcast: what was sent, by name.
        round_number: server round.
        client_ids: node id to client id; a node that is not listed keeps its node id.
        weight_key: the metric that weights the client in aggregation.

    Raises:
        BadUpdateError: naming the first rule that the reply breaks.
    """
    content = message.content
    state = to_state_dict(_only(content, ArrayRecord))
    metrics = _only(content, MetricRecord)
    _check_keys(state, broadcast)
    delta: dict[str, Tensor] = {}
    integers: dict[str, Tensor] = {}
    for name, sent in broadcast.items():
        got = state[name]
        if got.shape != sent.shape:
            raise BadUpdateError(
                f"an array keeps its shape, got {tuple(got.shape)} for {name!r}, sent {tuple(sent.shape)}"
            )
        if got.dtype != sent.dtype:
            raise BadUpdateError(
                f"an array keeps its dtype, got {got.dtype} for {name!r} instead of {sent.dtype}"
            )
        if sent.is_floating_point():
            difference = got - sent
            if not _finite(difference):
                raise BadUpdateError(f"an update is finite, got NaN or infinity in {name!r}")
            delta[name] = difference
        else:
            integers[name] = got
    node = int(message.metadata.src_node_id)
    return ClientUpdate(
        client_id=client_ids.get(node, node),
        node_id=node,
        round=round_number,
        before=broadcast,
        delta=delta,
        num_examples=_examples(metrics, weight_key),
        reported=_reported(content, metrics),
        integers=integers,
    )


def metric_keys(message: Message) -> frozenset[str]:
    """Names of the metrics in a reply; Flower demands the same from every client."""
    return frozenset(key for record in _records(message.content, MetricRecord) for key in record)


def audit_record(message: Message) -> Mapping[str, Any]:
    """The audit scalars a client sent beside its update; empty if it sent none."""
    if message.has_error():
        return {}
    record = message.content.get(AUDIT_RECORD)
    return dict(record.items()) if isinstance(record, ConfigRecord) else {}


def reply(
    message: Message, arrays: ArrayRecord, metrics: Mapping[str, float | int], audit: Mapping[str, Any]
) -> Message:
    """A client's answer: arrays, metrics and, beside them, its audit scalars."""
    content = RecordDict(
        {
            "arrays": arrays,
            "metrics": MetricRecord(dict(metrics)),
            AUDIT_RECORD: ConfigRecord(dict(audit)),
        }
    )
    return Message(content, reply_to=message)


def decline(message: Message, why: str) -> Message:
    """A client's answer that it does not train in this round; to Flower's strategies it has failed."""
    return Message(Error(code=_UNKNOWN, reason=DECLINED + why), reply_to=message)


def encode_finding(finding: Estimate | Skip | Exception, seconds: float) -> str:
    """What a client-side measure found, as text that fits a ConfigRecord."""
    if isinstance(finding, Estimate):
        plain = {**vars(finding), "extra": dict(finding.extra), "layers": dict(finding.layers)}
        return json.dumps({"estimate": plain, "seconds": seconds})
    if isinstance(finding, Skip):
        return json.dumps({"skip": finding.reason, "seconds": seconds})
    return json.dumps({"failed": f"{type(finding).__name__}: {finding}", "seconds": seconds})


def decode_finding(text: str) -> tuple[Estimate | Skip | Exception, float]:
    """The finding and its seconds; anything malformed becomes an exception to record."""
    try:
        found = json.loads(text)
        seconds = float(found["seconds"])
        if "estimate" in found:
            estimate = Estimate(**found["estimate"])
            layers = {str(layer): float(value) for layer, value in estimate.layers.items()}
            return replace(estimate, value=float(estimate.value), layers=layers), seconds
        if "skip" in found:
            return Skip(str(found["skip"])), seconds
        return RuntimeError(str(found["failed"])), seconds
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return BadUpdateError(f"a client's finding is JSON as this version writes it, got {error}"), 0.0


def _records(content: RecordDict, kind: type[_Record]) -> list[_Record]:
    """The records of one kind; Flower's own properties check every record again at each look."""
    return [record for record in content.values() if isinstance(record, kind)]


def _only(content: RecordDict, kind: type[_Record]) -> _Record:
    records = _records(content, kind)
    if len(records) != 1:
        raise BadUpdateError(f"a reply holds exactly one {kind.__name__}, got {len(records)}")
    return records[0]


def _check_keys(state: Mapping[str, Tensor], broadcast: Mapping[str, Tensor]) -> None:
    if state.keys() == broadcast.keys():
        return
    absent = sorted(broadcast.keys() - state.keys())
    extra = sorted(state.keys() - broadcast.keys())
    raise BadUpdateError(f"a reply holds the arrays that were sent, got missing {absent} and extra {extra}")


def _finite(tensor: Tensor) -> bool:
    # a sum is one pass without a temporary; it may overflow although all are finite, so look again then
    return math.isfinite(float(tensor.sum())) or bool(torch.isfinite(tensor).all())


def _examples(metrics: MetricRecord, weight_key: str) -> int:
    if weight_key not in metrics:
        raise BadUpdateError(f"a reply's metrics hold {weight_key!r}, got {sorted(metrics)}")
    value = metrics[weight_key]
    if isinstance(value, list) or not math.isfinite(value) or not 0 < value <= MOST_EXAMPLES:
        raise BadUpdateError(f"{weight_key!r} is one number from 1 to {MOST_EXAMPLES:.0e}, got {value!r}")
    return max(1, int(value))


def _reported(content: RecordDict, metrics: MetricRecord) -> dict[str, float]:
    scalars: dict[str, Any] = dict(metrics.items())
    beside = content.get(AUDIT_RECORD)
    if isinstance(beside, ConfigRecord):
        scalars.update(beside.items())
    return {
        key: float(value)
        for key, value in scalars.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }
