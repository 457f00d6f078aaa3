"""The same apps in Flower's own simulation engine: several processes, several GPUs, several machines.

Worth its start-up of about ten seconds and its milliseconds per message when a client's own work is long, or
when clients shall not share one process. The in-process engine is the faster one for small models.
"""

import importlib.util
import logging
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import Any, cast

import torch
from flwr.app import Context, Message
from flwr.app.user_config import UserConfig
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedaudit.errors import ConfigError, RunFailedError
from fedaudit.simulation import flower_internals as internals
from fedaudit.simulation.calls import ConfiguredClientApp
from fedaudit.simulation.train_progress import TrainProgress

logger = logging.getLogger(__name__)

ENVIRONMENT = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
# what Flower and Ray write into the environment of the process that starts them
_CHANGED = ("PYTHONPATH", "PYTHONBREAKPOINT", "RAY_ENABLE_UV_RUN_RUNTIME_ENV")


def run_on_ray(
    server_app: ServerApp,
    client_app: ClientApp,
    num_clients: int,
    run_config: UserConfig,
    workers: int = 1,
    gpu_share: float = 0.0,
    grid_setup: Callable[[Grid], None] | None = None,
) -> None:
    """Run a federation with Ray actors; Ray is started for it and shut down after it.

    Both apps must be picklable (module-level functions are; what they need must be importable from
    ``sys.path`` or the current folder). Flower draws the node ids at random and replies come as they finish,
    so a run repeats only if neither matters: all clients take part, and the aggregate ignores the order.

    Args:
        server_app: runs in a thread of this process.
        client_app: runs in the actors.
        num_clients: number of virtual nodes.
        run_config: what both apps find in ``context.run_config``.
        workers: number of actors, one CPU each.
        gpu_share: share of a GPU per actor; 0 hides the GPUs. At most 1 / `gpu_share` actors use one GPU.
        grid_setup: called with Flower's grid before the ServerApp.

    Raises:
        ConfigError: if Ray is not installed, or a share of a GPU is asked for where there is none.
        RunFailedError: if Flower's engine stopped before the ServerApp had finished.
        Exception: whatever the ServerApp raised.
    """
    if importlib.util.find_spec("ray") is None:
        raise ConfigError(
            "federation.engine='ray' needs Ray, which is not installed: pip install 'flwr[simulation]'"
        )
    if gpu_share > 0 and not torch.cuda.is_available():
        raise ConfigError(
            f"federation.gpu-share={gpu_share} needs a CUDA device, and there is none: set it to 0"
        )
    server = _WatchedServerApp(server_app, num_clients, run_config, grid_setup)
    backend = {
        "init_args": {"num_cpus": workers, "log_to_driver": False, "logging_level": logging.ERROR},
        "client_resources": {"num_cpus": 1, "num_gpus": gpu_share},
    }
    failure: Exception | None = None
    with _environment(), internals.identity(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module="ray")  # a hint on GPUs, every run
        try:
            internals.simulate(
                cast(ServerApp, server),
                cast(ClientApp, ConfiguredClientApp(client_app, run_config)),
                num_clients,
                backend,
            )
        except Exception as error:
            failure = error
        finally:
            server.abort()
            _shut_down()
    if server.error is not None:
        raise server.error
    if failure is not None or not server.finished:
        raise RunFailedError(
            f"Flower's simulation engine stopped before the ServerApp had finished: {_root(failure)}"
        ) from failure


class _WatchedServerApp:
    """Fills in the run configuration, announces progress, remembers an exception, and can be told to stop.

    It waits until Flower has registered the nodes, so that an app may count on them from its first line.

    Flower neither joins the ServerApp's thread nor tells it when the actors could not be started: without
    `abort` it would poll for replies until the round's time-out and keep the process alive.
    """

    def __init__(
        self,
        app: ServerApp,
        num_clients: int,
        run_config: Mapping[str, Any],
        grid_setup: Callable[[Grid], None] | None,
    ) -> None:
        self.app, self.num_clients, self.run_config = app, num_clients, dict(run_config)
        self.grid_setup = grid_setup
        self.error: BaseException | None = None
        self.finished = False
        self._aborted = Event()

    def __call__(self, grid: Grid, context: Context) -> None:
        context.run_config = dict(self.run_config)
        self._watch(grid)
        try:
            while len(list(grid.get_node_ids())) < self.num_clients:
                time.sleep(0.01)
            if self.grid_setup:
                self.grid_setup(grid)
            self.app(grid, context)
            self.finished = True
        except BaseException as error:  # SystemExit would end the thread without a trace
            if not self._aborted.is_set():
                self.error = error
            raise

    def abort(self) -> None:
        """Make the app's next look at the grid fail."""
        self._aborted.set()

    def _watch(self, grid: Grid) -> None:
        """Hook into what every wait of an app comes through: looking for nodes and for replies."""
        push, pull, nodes = grid.push_messages, grid.pull_messages, grid.get_node_ids
        progress = TrainProgress([])

        def watched_push(messages: Iterable[Message]) -> Iterable[str]:
            nonlocal progress
            batch = list(messages)
            ids = push(batch)
            progress = TrainProgress(batch)
            return ids

        def watched_pull(message_ids: Iterable[str]) -> Iterable[Message]:
            self._stop_if_aborted()
            replies = list(pull(message_ids))
            for reply in replies:
                if reply.has_error():
                    logger.warning("node %d failed: %s", reply.metadata.src_node_id, reply.error.reason)
                progress.replied(reply.metadata.reply_to_message_id)
            return replies

        def watched_nodes() -> Iterable[int]:
            self._stop_if_aborted()
            return nodes()

        vars(grid).update(push_messages=watched_push, pull_messages=watched_pull, get_node_ids=watched_nodes)

    def _stop_if_aborted(self) -> None:
        if self._aborted.is_set():
            raise RunFailedError("the simulation engine has stopped: no reply will come")


@contextmanager
def _environment() -> Iterator[None]:
    """Defaults the user may override, and the current folder on the actors' path; all restored afterwards."""
    before = dict(os.environ)
    asked = os.environ.get("FLWR_TELEMETRY_ENABLED")
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    path = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (path, str(Path.cwd()))))
    try:
        if asked is None:
            with internals.no_telemetry():
                yield
        else:
            yield
    finally:
        for key in (*ENVIRONMENT, *_CHANGED):
            if key in before:
                os.environ[key] = before[key]
            else:
                os.environ.pop(key, None)


def _shut_down() -> None:
    import ray

    if ray.is_initialized():
        ray.shutdown()


def _root(error: BaseException | None) -> str:
    """The text of the first exception in a chain."""
    while error is not None and error.__cause__ is not None:
        error = error.__cause__
    return "no reason given" if error is None else f"{type(error).__name__}: {error}"
