"""What a resumed run needs: global weights, the strategies' state and the clients' ledgers, after each round.

One safetensors file, replaced at once: the arrays and, as JSON in its metadata, the rest. Nothing is pickled,
and only the last complete round is kept.
"""

import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy import Strategy
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from fedaudit.errors import RecordError
from fedaudit.flower.arrays import numpy_arrays

FILE = "checkpoint.safetensors"
_STATE = "state"
_SCALARS = (int, float, bool, str)
_OWN = "own-state"
"""Stands for an attribute where a wrapper says itself what it keeps."""


@runtime_checkable
class Keeping(Protocol):
    """A strategy of ours whose next round depends on earlier ones."""

    def state_to_keep(self) -> dict[str, Any]:
        """What JSON can hold of it."""
        ...

    def take_state(self, kept: Mapping[str, Any]) -> None:
        """Continue from what `state_to_keep` returned."""
        ...


@dataclass(frozen=True)
class Checkpoint:
    """A run after a complete round."""

    round: int
    arrays: ArrayRecord
    strategy: dict[str, Any]
    nodes: dict[int, RecordDict]


def save(
    path: Path, round_number: int, arrays: ArrayRecord, strategy: Strategy, nodes: Mapping[int, RecordDict]
) -> None:
    """Write the state after `round_number` in place of the state before it."""
    kept = _state(strategy)
    tensors = {f"arrays/{name}": values for name, values in numpy_arrays(arrays).items()}
    tensors |= {f"strategy/{name}": value for name, value in kept if isinstance(value, np.ndarray)}
    state = {
        "round": round_number,
        "order": list(arrays),  # safetensors sorts names, Flower pairs some arrays by position
        "strategy-order": [name for name, _ in kept],
        "strategy": {name: value for name, value in kept if not isinstance(value, np.ndarray)},
        "nodes": {str(node): _encode(record) for node, record in nodes.items()},
    }
    temporary = path.with_name(f".{path.name}.part")
    write_arrays(temporary, tensors, {_STATE: json.dumps(state)})
    temporary.replace(path)


def write_arrays(
    path: Path, arrays: Mapping[str, np.ndarray[Any, Any]], metadata: dict[str, str] | None = None
) -> None:
    """Write arrays of any shape as safetensors."""
    # not numpy.ascontiguousarray, which makes an array of no dimension one of one
    save_file({name: np.asarray(values, order="C") for name, values in arrays.items()}, path, metadata)


def load(path: Path) -> Checkpoint | None:
    """The last complete round; None if there is none.

    Raises:
        RecordError: if the checkpoint is damaged.
    """
    if not path.is_file():
        return None
    try:
        with safe_open(path, "np") as file:
            state = json.loads(file.metadata()[_STATE])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        arrays = ArrayRecord({name: _array(tensors[f"arrays/{name}"]) for name in state["order"]})
        scalars = state["strategy"]
        values = {
            p: scalars[p] if p in scalars else tensors[f"strategy/{p}"] for p in state["strategy-order"]
        }
        nodes = {int(node): _decode(record) for node, record in state["nodes"].items()}
        return Checkpoint(int(state["round"]), arrays, values, nodes)
    except (ValueError, KeyError, TypeError, AttributeError, OSError, SafetensorError) as error:
        raise RecordError(f"{path} holds no readable checkpoint ({error}): start the run anew") from error


def restore(strategy: Strategy, values: Mapping[str, Any]) -> None:
    """Put saved values back into a freshly built strategy and the ones it wraps.

    What a constructor takes is not among them: it comes from the configuration.
    """
    grouped: dict[str, dict[str, Any]] = {}
    for path, value in values.items():
        owner, attribute, *key = path.split("|")
        grouped.setdefault(owner, {})
        if key:
            grouped[owner].setdefault(attribute, {})[key[0]] = value
        else:
            grouped[owner][attribute] = value
    for depth, layer in enumerate(_layers(strategy)):
        for attribute, value in grouped.get(str(depth), {}).items():
            if attribute == _OWN and isinstance(layer, Keeping):
                layer.take_state(value)
                continue
            setattr(layer, attribute, _shaped(value) if isinstance(value, dict) else value)


def _shaped(parts: dict[str, Any]) -> Any:
    keys = list(parts)
    if all(key.startswith("[") for key in keys):
        return [parts[key] for key in sorted(keys, key=lambda key: int(key[1:]))]
    if all(key.startswith("@") for key in keys):
        return ArrayRecord({key[1:]: _array(parts[key]) for key in keys})
    return parts


def _layers(strategy: Strategy) -> list[Strategy]:
    layers = [strategy]
    while isinstance(inner := getattr(layers[-1], "strategy", None), Strategy):
        layers.append(inner)
    return layers


def _state(strategy: Strategy) -> list[tuple[str, Any]]:
    """What strategies keep between rounds, by 'depth|attribute|key': arrays and numbers of Flower's, and what
    those of ours say themselves.

    Arithmetic on an array of no dimension gives a numpy scalar: it counts as such an array.
    """
    found: list[tuple[str, Any]] = []
    for depth, layer in enumerate(_layers(strategy)):
        if isinstance(layer, Keeping):
            found.append((f"{depth}|{_OWN}", layer.state_to_keep()))
            continue
        if type(layer).__module__.split(".")[0] != "flwr":
            continue  # our other wrappers are rebuilt from the configuration
        configured = inspect.signature(type(layer)).parameters
        for attribute, value in vars(layer).items():
            if attribute in configured:
                continue
            path = f"{depth}|{attribute}"
            if isinstance(value, np.ndarray):
                found.append((path, value))
            elif isinstance(value, np.generic):
                found.append((path, value.item()))
            elif isinstance(value, ArrayRecord):
                found += [(f"{path}|@{key}", array.numpy()) for key, array in value.items()]
            elif isinstance(value, dict) and value and all(map(_is_array, value.values())):
                found += [(f"{path}|{key}", np.asarray(array)) for key, array in value.items()]
            elif isinstance(value, list) and value and all(map(_is_array, value)):
                found += [(f"{path}|[{index}", np.asarray(array)) for index, array in enumerate(value)]
            elif isinstance(value, _SCALARS):
                found.append((path, value))
    return found


def _is_array(value: object) -> bool:
    return isinstance(value, (np.ndarray, np.generic))


def _array(values: np.ndarray[Any, Any]) -> Any:
    from flwr.app import Array

    return Array(np.asarray(values))


def _encode(record: RecordDict) -> dict[str, Any]:
    encoded: dict[str, Any] = {}
    for name, part in record.items():
        if not isinstance(part, (ConfigRecord, MetricRecord)):
            raise RecordError(
                f"a client's state holds metrics and settings, got {type(part).__name__} in {name!r}"
            )
        encoded[name] = {"kind": type(part).__name__, "values": dict(part.items())}
    return encoded


def _decode(encoded: Mapping[str, Any]) -> RecordDict:
    kinds = {"ConfigRecord": ConfigRecord, "MetricRecord": MetricRecord}
    return RecordDict({name: kinds[part["kind"]](part["values"]) for name, part in encoded.items()})
