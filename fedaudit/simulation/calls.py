"""One call of a ClientApp, the same in every engine: what the client gets, and what it may give back."""

from collections.abc import Mapping
from typing import Any

from flwr.app import ArrayRecord, Context, Message, RecordDict
from flwr.app.user_config import UserConfig
from flwr.clientapp import ClientApp

from fedaudit.flower.arrays import Array
from fedaudit.simulation.flower_internals import replace_values


def isolated(content: RecordDict) -> RecordDict:
    """Records of one's own: no change of a key, value, list or array shows in `content`.

    Flower's strategies put one `RecordDict` into every message of a round, and mods change what they receive;
    Flower's engines hide this by serialising. The arrays' payloads are immutable bytes and are shared.
    """
    own: dict[str, Any] = {}
    for key, record in content.items():
        copied = record.copy()
        if isinstance(record, ArrayRecord):
            replace_values(copied, {name: Array.view(array) for name, array in record.items()})
        elif lists := {name: list(value) for name, value in record.items() if isinstance(value, list)}:
            replace_values(copied, lists)
        own[key] = copied
    records = RecordDict()
    replace_values(records, own)
    return records


def call(app: ClientApp, message: Message, context: Context) -> Message:
    """The app's reply to `message`.

    Raises:
        TypeError: if the app returned no message; Flower alone would wait for it until the time-out.
        ValueError: if it returned a message that answers another one, or none.
    """
    reply = app(message, context)
    if not isinstance(reply, Message):
        raise TypeError(
            f"a ClientApp must return a Message, got {type(reply).__name__}: "
            "return Message(..., reply_to=...)"
        )
    if reply.metadata.reply_to_message_id != message.metadata.message_id:
        raise ValueError(
            "a ClientApp must reply to the message it got, its reply names "
            f"{reply.metadata.reply_to_message_id!r}: build it with reply_to="
        )
    return reply


def check_run_config(context: Context, given: Mapping[str, object]) -> None:
    """Refuse a changed run configuration, in Flower's words.

    Raises:
        ValueError: if the app wrote into ``context.run_config``.
    """
    if context.run_config != given:
        raise ValueError(
            f"The `run_config` field of the `Context` object cannot be modified (run_id: {context.run_id})."
        )


class ConfiguredClientApp:
    """A picklable stand-in for `app` that fills in the run configuration Flower's engine leaves empty."""

    def __init__(self, app: ClientApp, run_config: UserConfig) -> None:
        self.app = app
        self.run_config = dict(run_config)

    def __call__(self, message: Message, context: Context) -> Message:
        """Call the app with a filled context; its state, and nothing else, is handed back in `context`."""
        filled = Context(
            context.run_id, context.node_id, context.node_config, context.state, dict(self.run_config)
        )
        reply = call(self.app, message, filled)
        context.state = filled.state
        if filled.run_config != self.run_config:
            context.run_config = filled.run_config  # Flower's worker then answers with its own error
        return reply
