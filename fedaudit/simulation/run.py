"""One way to run a ServerApp and a ClientApp on this machine, whichever engine does it."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, get_args

from flwr.app import Context, RecordDict
from flwr.app.user_config import UserConfig
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedaudit.errors import ConfigError, FedauditError, RunFailedError
from fedaudit.simulation.in_process import InProcessGrid

Engine = Literal["in-process", "ray"]


def run_federation(
    server_app: ServerApp,
    client_app: ClientApp,
    *,
    num_clients: int,
    run_config: UserConfig,
    engine: Engine = "in-process",
    seed: int = 0,
    workers: int = 1,
    gpu_share: float = 0.0,
    grid_setup: Callable[[Grid], None] | None = None,
) -> None:
    """Run a federation to its end; results are what the ServerApp writes.

    With one in-process worker torch's number of threads is left as it is, so each client uses all cores. With
    more, share the cores: ``torch.set_num_threads(cores // workers)`` before the call. Ray gives every actor
    one core.

    Args:
        server_app: called once, with the engine's grid.
        client_app: called for every message.
        num_clients: number of nodes; node i finds ``partition-id`` i in ``context.node_config``.
        run_config: what both apps find in ``context.run_config``.
        engine: "in-process" or "ray".
        seed: decides the node ids of the in-process engine; Flower draws those of Ray itself. The library
            seeds no global generator: an app that samples clients with Flower's strategies seeds ``random``.
        workers: threads (in-process) or actors (ray).
        gpu_share: share of a GPU per Ray actor.
        grid_setup: called with the grid before the ServerApp, to restore clients' states for example.

    Raises:
        ConfigError: if an argument is out of range or the engine is not available.
        RunFailedError: if the ServerApp or the engine failed; the cause is chained.
        FedauditError: one that the ServerApp raised comes through as it is.
    """
    if engine not in get_args(Engine):
        raise ConfigError(
            f"engines on this machine are {', '.join(get_args(Engine))}, got {engine!r}: choose one"
        )
    try:
        with _quiet_flower():
            if engine == "ray":
                from fedaudit.simulation.ray_engine import run_on_ray

                run_on_ray(server_app, client_app, num_clients, run_config, workers, gpu_share, grid_setup)
            else:
                with InProcessGrid(client_app, num_clients, run_config, seed, workers) as grid:
                    if grid_setup:
                        grid_setup(grid)
                    server_app(grid, _server_context(grid, run_config))
    except FedauditError:
        raise
    except (Exception, SystemExit) as error:
        raise RunFailedError(
            f"the federation stopped: the ServerApp raised {type(error).__name__}: {error}; "
            "the chained traceback says where"
        ) from error


def _server_context(grid: InProcessGrid, run_config: UserConfig) -> Context:
    return Context(
        run_id=grid.run.run_id, node_id=0, node_config={}, state=RecordDict(), run_config=dict(run_config)
    )


@contextmanager
def _quiet_flower() -> Iterator[None]:
    """Hold back Flower's running commentary, unless a handler of its logger asks for more than INFO."""
    flower = logging.getLogger("flwr")
    before = flower.level
    quiet = all(handler.level >= logging.INFO for handler in flower.handlers)
    if quiet:
        flower.addFilter(_is_no_repetition)
        flower.setLevel(max(before, logging.WARNING))
    try:
        yield
    finally:
        if quiet:
            flower.setLevel(before)
            flower.removeFilter(_is_no_repetition)


def _is_no_repetition(record: logging.LogRecord) -> bool:
    """Flower's engine prints the traceback of a failed client up to four times; it is logged here, once."""
    return record.module not in ("vce_api", "raybackend", "run_simulation")
