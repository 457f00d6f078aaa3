"""A federation inside this process: Flower's Grid without serialisation, ports, actors or polling.

The ServerApp and the strategy are Flower's own and unchanged; a message pushed to the grid is a call of the
ClientApp. Compared with Flower's simulation engine, which pickles every message twice and polls for replies,
the cost per client falls from milliseconds to tens of microseconds, and a breakpoint in a client works.
"""

import logging
import random
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from types import TracebackType

from flwr.app import Context, Message, RecordDict
from flwr.app.user_config import UserConfig
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from fedaudit.errors import ConfigError, RecordError
from fedaudit.simulation import flower_internals as internals
from fedaudit.simulation.calls import call, check_run_config, isolated
from fedaudit.simulation.train_progress import TrainProgress

logger = logging.getLogger(__name__)


class InProcessGrid(Grid):
    """Runs every ClientApp call in this process; a client cannot tell it from Flower's simulation engine.

    What is guaranteed:

    - The node ids follow from `seed`, so a strategy that samples with a seeded generator picks the same
      clients again; node i of `get_node_ids` holds partition i.
    - Replies come in the order of their messages, whatever the number of workers. Two messages to one node in
      the same push are answered one after the other.
    - A client reads and writes records of its own. Its state lasts from call to call; the changes made by a
      call that failed are dropped.
    - An exception in a client is an error reply with the code and the form of reason Flower's worker uses.

    What is not: a call cannot be interrupted, so the strategy's time-out is not enforced, and all clients
    share the process's memory, random generators and model caches.

    Threads help only where clients spend their time outside Python's interpreter lock (large tensors,
    files). They share torch's intra-op threads: with several workers, call ``torch.set_num_threads`` with
    the number of cores divided by `workers`. A client that draws from a global generator gives other results
    with threads.

    Args:
        client_app: the app every node runs.
        num_clients: how many nodes there are.
        run_config: what every client finds in ``context.run_config``.
        seed: decides the run's and the nodes' ids.
        workers: threads that run clients; with 1 the clients run in the caller's thread.

    Raises:
        ConfigError: if `num_clients` or `workers` is less than 1.
    """

    def __init__(
        self,
        client_app: ClientApp,
        num_clients: int,
        run_config: UserConfig | None = None,
        seed: int = 0,
        workers: int = 1,
    ) -> None:
        for name, number in (("federation.clients", num_clients), ("federation.workers", workers)):
            if number < 1:
                raise ConfigError(f"{name} must be at least 1, got {number}: raise it")
        generator = random.Random(seed)
        self._run = internals.empty_run(generator.getrandbits(63))
        self._app = client_app
        self._run_config = dict(run_config or {})
        self._partitions = {node: i for i, node in enumerate(_node_ids(num_clients, generator))}
        self._states = {node: RecordDict() for node in self._partitions}
        self._changed: set[int] = set()
        self._replies: dict[int, Message] = {}
        self._pushed = 0
        self._pool = ThreadPoolExecutor(workers, "client") if workers > 1 else None
        self._identity_before = internals.take_identity(self._run.run_id)

    def __enter__(self) -> "InProcessGrid":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the worker threads and give back the process's Flower identity."""
        if self._pool:
            self._pool.shutdown(cancel_futures=True)
        if internals.current_run() == self._run.run_id:
            internals.restore_identity(self._identity_before)

    @property
    def run(self) -> internals.Run:
        """The run this grid belongs to."""
        return self._run

    def set_run(self, run: internals.Run) -> None:
        """Take another run's description; nodes keep their states."""
        self._run = run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """The message; Flower keeps this method for old code, new code calls ``Message`` itself."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        """All nodes, always available, in the order of their partitions."""
        return list(self._partitions)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Call the clients and keep their replies for `pull_messages`.

        A message to a node that is not in the federation is logged and not sent, as in Flower.

        Returns:
            The ids given to the messages that were sent.
        """
        sent = []
        for message in messages:
            if message.metadata.dst_node_id not in self._partitions:
                logger.error("no node has the id %d: its message is not sent", message.metadata.dst_node_id)
                continue
            self._pushed += 1
            internals.stamp(message, str(self._pushed), self._run.run_id)
            sent.append(message)
        progress = TrainProgress(sent)
        for reply in self._serve_in_threads(self._pool, sent) if self._pool else map(self._serve, sent):
            answered = reply.metadata.reply_to_message_id
            self._replies[int(answered)] = reply
            progress.replied(answered)
        return [message.metadata.message_id for message in sent]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """The replies to these messages, in the order the messages were pushed; each is handed out once."""
        wanted = sorted(int(number) for number in set(message_ids))
        return [self._replies.pop(number) for number in wanted if number in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Push and pull. `timeout` has no effect: all calls have returned when the push has."""
        return self.pull_messages(self.push_messages(messages))

    def node_states(self) -> dict[int, RecordDict]:
        """Copies of what the clients keep between calls, by node id: what a checkpoint needs of them."""
        return {node: isolated(state) for node, state in self._states.items()}

    def changed_node_states(self) -> dict[int, RecordDict]:
        """`node_states` of those whose state a client or `restore_node_states` set since the last call."""
        changed, self._changed = self._changed, set()
        return {node: isolated(self._states[node]) for node in changed}

    def restore_node_states(self, states: Mapping[int, RecordDict]) -> None:
        """Give nodes the states of `node_states`; nodes not named keep theirs.

        Raises:
            RecordError: if a node is not in this federation; nothing is restored then.
        """
        strange = [node for node in states if node not in self._states]
        if strange:
            raise RecordError(
                f"client states must belong to nodes of this federation, got node {strange[0]}: "
                "resume with the seed and the number of clients of the interrupted run"
            )
        self._states.update({node: isolated(state) for node, state in states.items()})
        self._changed.update(states)

    def _serve(self, message: Message) -> Message:
        """The reply of one client, an error reply if it fails."""
        node = message.metadata.dst_node_id
        context = Context(
            run_id=self._run.run_id,
            node_id=node,
            node_config={"partition-id": self._partitions[node], "num-partitions": len(self._partitions)},
            state=isolated(self._states[node]),
            run_config=dict(self._run_config),
        )
        try:
            reply = self._reply(internals.copy_message(message, isolated(message.content)), context)
            check_run_config(context, self._run_config)
        except (Exception, SystemExit) as error:
            logger.warning("client %d failed", self._partitions[node], exc_info=error)
            reply = internals.error_reply(error, message)
        else:
            if len(context.state) or len(self._states[node]):
                self._changed.add(node)
            self._states[node] = context.state
        internals.stamp(reply, f"{message.metadata.message_id}-reply", self._run.run_id)
        return reply

    def _reply(self, message: Message, context: Context) -> Message:
        """The client's reply in records of the server's own; the app's exception as Flower's actor has it."""
        try:
            reply = call(self._app, message, context)
        except internals.LoadClientAppError:
            raise
        except Exception as error:
            raise internals.ClientAppException(str(error)) from error
        if reply.has_content():
            reply = internals.copy_message(reply, isolated(reply.content))
        return reply

    def _serve_in_threads(self, pool: ThreadPoolExecutor, messages: list[Message]) -> Iterator[Message]:
        """Replies as they come; a node's messages stay in one thread, in order, for its state's sake."""
        by_node: dict[int, list[Message]] = {}
        for message in messages:
            by_node.setdefault(message.metadata.dst_node_id, []).append(message)
        futures = [
            pool.submit(lambda batch: [self._serve(m) for m in batch], batch) for batch in by_node.values()
        ]
        try:
            for future in as_completed(futures):
                yield from future.result()
        finally:
            for future in futures:
                future.cancel()


def _node_ids(number: int, generator: random.Random) -> list[int]:
    """Distinct positive ids; 0 and 1 mean no node and the SuperLink to Flower."""
    ids: dict[int, None] = {}
    while len(ids) < number:
        node = generator.getrandbits(63)
        if node > 1:
            ids[node] = None
    return list(ids)
