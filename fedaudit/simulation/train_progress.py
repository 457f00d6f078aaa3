"""How many clients of a training round have replied, announced to whoever watches."""

from collections.abc import Iterable

from flwr.app import ConfigRecord, Message, MessageType

from fedaudit.progress import announce

ROUND_KEY = "server-round"  # Flower's strategies put the round's number under this key


class TrainProgress:
    """Counts the replies to the train messages among `messages`; other messages are not announced."""

    def __init__(self, messages: Iterable[Message]) -> None:
        self._waiting = {m.metadata.message_id: round_of(m) for m in messages if is_train(m)}
        self._total = len(self._waiting)

    def replied(self, message_id: str) -> None:
        """Announce that the message with this id was answered."""
        if message_id in self._waiting:
            round_number = self._waiting.pop(message_id)
            announce("client", self._total - len(self._waiting), self._total, round_number)


def is_train(message: Message) -> bool:
    """Whether `message` asks for training, whatever the action."""
    return message.metadata.message_type.partition(".")[0] == MessageType.TRAIN


def round_of(message: Message) -> int:
    """The round that a message's configuration names; 0 if it names none."""
    for record in message.content.values():
        if isinstance(record, ConfigRecord) and isinstance(number := record.get(ROUND_KEY), int):
            return number
    return 0
