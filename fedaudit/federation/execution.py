"""One federation on this machine, from its configuration to its records."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fedaudit.config import RunConfig
from fedaudit.errors import FedauditError, RunFailedError
from fedaudit.federation.checks import check
from fedaudit.federation.folders import run_folder
from fedaudit.federation.reference_app import reference_app
from fedaudit.federation.run_description import describe
from fedaudit.federation.setup import Setup
from fedaudit.records import Run, load_run, write_json

SMALL_MODEL = 1_000_000
"""Parameters below which one thread is faster than several."""


@contextmanager
def _threads_for(made: Setup) -> Iterator[None]:
    """One thread of torch for a small model: waking others costs more than they compute (6x on DLG)."""
    before = torch.get_num_threads()
    if sum(parameter.numel() for parameter in made.build_model().parameters()) < SMALL_MODEL:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def execute(config: RunConfig) -> Run:
    """Run one federation on this machine and return its records.

    Raises:
        RunFailedError: if it stopped before its last round; completed rounds are kept.
    """
    from fedaudit.report.tables import records_summary
    from fedaudit.simulation.run import run_federation

    made = check(config)
    folder = run_folder(config)
    describe(config, folder)
    federation = config.federation
    server_app, client_app = reference_app()
    started = time.perf_counter()
    try:
        with _threads_for(made):
            run_federation(
                server_app,
                client_app,
                num_clients=federation.clients,
                run_config=config.flat(),
                engine="ray" if federation.engine == "ray" else "in-process",
                seed=config.seed,
                workers=federation.workers,
                gpu_share=federation.gpu_share,
            )
    except FedauditError:
        raise
    except Exception as error:
        raise RunFailedError(f"the run in {folder} stopped: {type(error).__name__}: {error}") from error
    summary = records_summary(load_run(folder).records)
    write_json(folder / "summary.json", {**summary, "total-seconds": time.perf_counter() - started})
    return load_run(folder)
