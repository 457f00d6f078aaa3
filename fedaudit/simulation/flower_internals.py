"""The one module that touches names Flower does not promise to keep.

Flower's public interface has no way to run a ClientApp without Flower's own engine: a message takes its run
from a process-wide task identity, its id is filled in behind a read-only property, and the simulation engine
has no entry that takes a run configuration. Everything of that kind is here, and
``tests/simulation/test_flower_internals.py`` says which name moved when a new release of Flower breaks one.
Checked with Flower 1.41 and 1.42.
"""

import copy
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Any

from flwr.app import Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.client_app import ClientAppException, LoadClientAppError
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.serverapp import ServerApp
from flwr.supercore import telemetry
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

__all__ = [
    "ClientAppException",
    "ErrorCode",
    "LoadClientAppError",
    "Run",
    "copy_message",
    "current_run",
    "empty_run",
    "error_reply",
    "identity",
    "no_telemetry",
    "replace_values",
    "restore_identity",
    "simulate",
    "stamp",
    "take_identity",
]

Identity = tuple[int | None, ...]
_IDENTITY = ("_run_id", "_task_id", "_node_id")


def _identity() -> Identity:
    """For whom this process speaks: run, task and node; the public properties raise where nothing is set."""
    return tuple(getattr(TaskIdentity, name) for name in _IDENTITY)


def take_identity(run_id: int) -> Identity:
    """Let ``Message(...)`` in this process speak for the server of `run_id`; the identity it had before."""
    before = _identity()
    restore_identity((run_id, 1, SUPERLINK_NODE_ID))
    return before


def restore_identity(identity: Identity) -> None:
    """Put back what `take_identity` returned."""
    for name, value in zip(_IDENTITY, identity, strict=True):
        setattr(TaskIdentity, name, value)


def current_run() -> int | None:
    """The run for which this process speaks; None outside a run."""
    return TaskIdentity._run_id


@contextmanager
def identity() -> Iterator[None]:
    """Restore the process's identity after a block that changes it."""
    before = _identity()
    try:
        yield
    finally:
        restore_identity(before)


def empty_run(run_id: int) -> Run:
    """A run with nothing but its id."""
    return Run.create_empty(run_id)


def stamp(message: Message, message_id: str, run_id: int) -> None:
    """Fill in what the SuperLink fills in when it accepts a message."""
    message.metadata.__dict__["_message_id"] = message_id
    message.metadata.__dict__["_run_id"] = run_id


def copy_message(message: Message, content: RecordDict) -> Message:
    """A message with the metadata of `message`, as an object of its own, and `content`."""
    return Message(content=content, metadata=copy.copy(message.metadata))  # type: ignore[call-overload,no-any-return]


def replace_values(record: MutableMapping[str, Any], values: Mapping[str, Any]) -> None:
    """Put `values`, known to be of the right types, into `record` without Flower's checks of every item."""
    vars(record)["_data"].update(values)


def error_reply(exception: BaseException, message: Message) -> Message:
    """The reply Flower's simulation worker sends when `exception` stopped the call that `message` asked for.

    Its code says whether the app raised (2), could not be loaded (1) or anything else went wrong (0); its
    reason is the exception's type and text, ``<class '...'>:<'...'>``.
    """
    if isinstance(exception, ClientAppException):
        code = ErrorCode.CLIENT_APP_RAISED_EXCEPTION
    elif isinstance(exception, LoadClientAppError):
        code = ErrorCode.LOAD_CLIENT_APP_EXCEPTION
    else:
        code = ErrorCode.UNKNOWN
    return Message(Error(code, f"{type(exception)}:<'{exception}'>"), reply_to=message)


@contextmanager
def no_telemetry() -> Iterator[None]:
    """Keep Flower from reporting usage inside the block; it reads its environment variable on import only."""
    before = telemetry.FLWR_TELEMETRY_ENABLED
    telemetry.FLWR_TELEMETRY_ENABLED = "0"
    try:
        yield
    finally:
        telemetry.FLWR_TELEMETRY_ENABLED = before


def simulate(
    server_app: ServerApp, client_app: ClientApp, num_clients: int, backend_config: Mapping[str, Any]
) -> None:
    """Run the apps with Flower's simulation engine and its Ray backend.

    Flower's public `run_simulation` does no more than this call, but announces its own removal; ``flwr run``
    uses the function called here.
    """
    from flwr.simulation.run_simulation import _run_simulation

    _run_simulation(
        num_supernodes=num_clients,
        exit_event=telemetry.EventType.PYTHON_API_RUN_SIMULATION_LEAVE,
        client_app=client_app,
        server_app=server_app,
        backend_name="ray",
        backend_config=dict(backend_config),
    )
