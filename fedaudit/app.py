"""What the server and the client of a federation share: data, model, training, defense, and a run's life.

Both sides build the same `Setup` from the same configuration, once per process; nothing of it travels.
"""

import json
import logging
import os
import platform
import subprocess
import threading
import time
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property, lru_cache
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedaudit import __version__
from fedaudit.accounting import Ledger
from fedaudit.censorship import Censorship, Peeled
from fedaudit.config import RunConfig
from fedaudit.data.dataset import Split, load_dataset, split
from fedaudit.data.partition import partition
from fedaudit.defenses.base import BudgetedByRound, Defense, adaptive, removing
from fedaudit.defenses.chain import secure_part
from fedaudit.errors import ConfigError, FedauditError, RunFailedError
from fedaudit.models import build_model
from fedaudit.records import Run, load_run, write_json, write_text
from fedaudit.registry import DEFENSES, is_repeatable
from fedaudit.round_release import check_signal, plan, release_behind
from fedaudit.secure_sum import SecureSum, check_secure, context_of_sum
from fedaudit.spec import parse_spec
from fedaudit.training import TrainSettings, client_seed, plan_batches, settings_in_round, steps_per_round
from fedaudit.types import ClientUpdate, LocalEvidence, RoundContext, StepRelease, Truth
from fedaudit.vary import written

logger = logging.getLogger(__name__)
SMALL_MODEL = 1_000_000
"""Parameters below which one thread is faster than several."""
_VERSIONS = ("torch", "flwr", "opacus", "numpy", "pandas", "scikit-learn", "dp-accounting", "torchmetrics")


def summed_cross_entropy(outputs: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy summed over the batch, in nats; labels are class indices or probabilities (B, C)."""
    return functional.cross_entropy(outputs, labels, reduction="sum")


@dataclass(frozen=True)
class Setup:
    """Everything one process needs of a federation, derived from its configuration.

    Attributes:
        config: the configuration.
        clients: number of partitions the training data is split into.
    """

    config: RunConfig
    clients: int

    @cached_property
    def data(self) -> Split:
        """Training, test and reference data."""
        return split(load_dataset(self.config.data, self.config.seed), self.config.data, self.config.seed)

    @cached_property
    def partitions(self) -> list[Tensor]:
        """Indices of each client's examples in the training data."""
        labels = self.data.train.y.numpy()
        found = partition(self.config.data.partitioner, labels, self.clients, self.config.seed)
        return [torch.as_tensor(indices, dtype=torch.int64) for indices in found]

    def client_data(self, client: int) -> tuple[Tensor, Tensor]:
        """A client's own examples and labels, those that its defense leaves out included."""
        rows = self.partitions[client]
        return self.data.train.x[rows], self.data.train.y[rows]

    @cached_property
    def censorship(self) -> Censorship | None:
        """Which examples clients leave out, if their defense says that they do."""
        defense = removing(self.defense)
        if defense is None:
            return None
        return Censorship(
            defense,
            lambda: self.build_model().to(self.device),
            summed_cross_entropy,
            self.settings(1),
            self.config.seed,
            remembered=2 * self.clients,
        )

    def num_examples(self, client: int) -> int:
        """How many of its examples a client trains on, in every round."""
        held = len(self.partitions[client])
        return self.censorship.left(held) if self.censorship is not None else held

    def rows(self, client: int, weights: Mapping[str, Tensor]) -> Tensor:
        """Positions, among a client's own, of the examples it trains on when it is sent these weights."""
        if self.censorship is None:
            return torch.arange(len(self.partitions[client]))
        return self.censorship.rows(client, *self.client_data(client), weights)

    def training_data(self, client: int, weights: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The examples and labels a client trains on when it is sent these weights."""
        x, y = self.client_data(client)
        if self.censorship is None:
            return x, y
        rows = self.censorship.rows(client, x, y, weights)
        return x[rows], y[rows]

    def peeled(self, client: int, weights: Mapping[str, Tensor]) -> Peeled | None:
        """How unique a client's examples are with and without those it leaves out; None if it leaves none."""
        if self.censorship is None:
            return None
        return self.censorship.peeled(client, *self.client_data(client), weights)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one example."""
        return tuple(self.data.train.x.shape[1:])

    def build_model(self) -> nn.Module:
        """A fresh model with the run's initial weights."""
        return build_model(
            self.config.model.name, self.input_shape, self.data.train.num_classes, self.config.seed
        )

    @cached_property
    def _worker(self) -> threading.local:
        return threading.local()

    def worker_model(self) -> nn.Module:
        """This thread's one model instance; its weights are whatever was loaded last."""
        if not hasattr(self._worker, "model"):
            self._worker.model = self.build_model().to(self.device)
        return self._worker.model  # type: ignore[no-any-return]

    @cached_property
    def device(self) -> torch.device:
        """Where clients train."""
        wanted = self.config.federation.device
        if wanted == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return torch.device(wanted)

    @cached_property
    def defense(self) -> Defense:
        """The defense in force, planned over the run's rounds where it divides a budget among them."""
        rounds = self.config.federation.rounds
        built: Defense = DEFENSES.build(parse_spec(self.config.defense.name))
        if isinstance(built, BudgetedByRound):
            return built.over_rounds(rounds)
        return plan(built, settings_in_round(self.config.train, built, 1), rounds)

    @cached_property
    def secure(self) -> SecureSum | None:
        """Secure aggregation, if it is in force."""
        part = secure_part(self.defense)
        return SecureSum(part, self.config.seed) if part is not None else None

    def settings(self, round_number: int, proximal_mu: float = 0.0) -> TrainSettings:
        """Local training in a round, under the defense in force."""
        return settings_in_round(self.config.train, self.defense, round_number, proximal_mu)

    def release(self, num_examples: int) -> StepRelease:
        """What one local step of a client that trains on this many examples makes visible."""
        settings = self.settings(1)
        planned = steps_per_round(num_examples, settings) * self.config.federation.rounds
        return self.defense.release(num_examples, settings.batch_size, planned)

    def release_in_round(
        self, num_examples: int, round_number: int, ledger: Ledger, leakage: float | None
    ) -> StepRelease:
        """The same in one round, for a client that knows its ledger and what the server last measured."""
        changing = adaptive(self.defense)
        if changing is None:
            return self.release(num_examples)
        return changing.release_in_round(num_examples, round_number, ledger, leakage)

    def release_of(self, update: ClientUpdate) -> StepRelease:
        """What one local step behind this update made visible: as its client states it, else as planned."""
        return release_behind(self.defense, update) or self.release(update.num_examples)

    def batches(self, client: int, round_number: int) -> list[Tensor]:
        """Indices, in its training data, of each local step; a function of seed, client and round alone."""
        return plan_batches(
            self.num_examples(client),
            self.settings(round_number),
            poisson=self.defense.poisson,
            seed=client_seed(self.config.seed, client, round_number),
        )

    def context(self, round_number: int) -> RoundContext:
        """What an honest-but-curious server knows of a round."""
        settings, data = self.settings(round_number), self.data
        reference = (data.reference.x, data.reference.y) if data.reference is not None else None
        plain = settings.optimizer == "sgd" and not settings.momentum and not settings.weight_decay
        return RoundContext(
            round=round_number,
            build_model=self.build_model,
            loss=summed_cross_entropy,
            lr=settings.lr if plain else None,
            optimizer=settings.optimizer + (" with momentum" if settings.momentum else ""),
            local_steps=settings.local_steps,
            local_epochs=settings.local_epochs,
            batch_size=settings.batch_size,
            input_shape=self.input_shape,
            num_classes=data.train.num_classes,
            value_range=data.train.value_range,
            reference=reference,
            release=self.release_of,
            seed=client_seed(self.config.seed, 0, round_number),
            device=str(self.device),
        )

    def evidence(self, update: ClientUpdate) -> LocalEvidence:
        """The examples a client trains on (an oracle's view); of a sum, all clients'."""
        if update.summed:
            parts = [self.evidence(replace(update, client_id=each, summed=())) for each in update.summed]
            release = context_of_sum(self.context(update.round), update).release
            assert release is not None  # a context made here knows it
            x, y = torch.cat([part.x for part in parts]), torch.cat([part.y for part in parts])
            return LocalEvidence(x, y, release(update))
        x, y = self.training_data(update.client_id, update.before)
        return LocalEvidence(x, y, self.release_of(update))

    def truth(self, update: ClientUpdate) -> Truth:
        """The examples a client used in this round, each once (an oracle's view); of a sum, all clients'."""
        if update.summed:
            parts = [self.truth(replace(update, client_id=each, summed=())) for each in update.summed]
            return Truth(torch.cat([part.x for part in parts]), torch.cat([part.y for part in parts]))
        x, y = self.training_data(update.client_id, update.before)
        used = torch.cat([*self.batches(update.client_id, update.round), torch.empty(0, dtype=torch.int64)])
        rows = torch.unique(used)
        unused = torch.ones(len(y), dtype=torch.bool)
        unused[rows] = False
        return Truth(x[rows], y[rows], x[unused])


@lru_cache(maxsize=4)
def _setup(items: tuple[tuple[str, Any], ...], clients: int) -> Setup:
    return Setup(RunConfig.from_flat(dict(items)), clients)


def setup(run_config: Mapping[str, Any], clients: int | None = None) -> Setup:
    """The process's one `Setup` for this configuration.

    Raises:
        ConfigError: if the configuration breaks the schema.
        DataError: if the data is missing or cannot be split among so many clients.
    """
    known = {key: value for key, value in run_config.items() if not key.startswith("flwr.")}
    count = clients or int(known.get("federation.clients", RunConfig().federation.clients))
    return _setup(tuple(sorted(known.items())), count)


def reference_module(name: str) -> ModuleType:
    """A module of the reference app: inside the package in a wheel, beside it in a checkout."""
    inside = f"fedaudit._app.{name}"
    return import_module(inside if find_spec("fedaudit._app") is not None else name)


def reference_app() -> tuple[Any, Any]:
    """The ServerApp and the ClientApp."""
    return reference_module("strategies.server_app").app, reference_module("clients.client_app").app


def run_name(config: RunConfig) -> str:
    """The run's folder name: letters, digits, dots and hyphens of its defense and seed."""
    return config.output.name or f"{_plain(config.defense.name)}-seed{config.seed}"


def _plain(text: str) -> str:
    """Letters, digits, dots and equals signs of a text, hyphens for the rest."""
    plain = "".join(c if c.isalnum() or c in ".=" else "-" for c in text).strip("-")
    while "--" in plain:
        plain = plain.replace("--", "-")
    return plain


def run_folder(config: RunConfig) -> Path:
    """Where a run keeps everything."""
    return Path(config.output.directory) / run_name(config)


def check(config: RunConfig) -> Setup:
    """Build every part the configuration names, so that what is wrong is said before anything runs.

    Raises:
        ConfigError: naming the key, its value and what is allowed.
        DataError: if the data is missing or cannot be split among the clients.
    """
    from fedaudit.auditor import Auditor

    _check_machine(config)
    made = setup(config.flat())
    central_parts = reference_module("strategies.central")
    with _about("defense.name", config.defense.name):
        fraction = central_parts.inner_fraction(made)
    with _about("strategy.name", config.strategy.name):
        build_strategy = reference_module("strategies.flower_strategies").build_strategy
        strategy = build_strategy(
            config.strategy.name,
            clients=made.clients,
            fraction_train=fraction,
            min_available=made.clients,
        )
    with _about("audit.measures", config.audit.measures):
        Auditor(None, config.audit.measures)
    with _about("attack.names", config.attack.names):
        Auditor(None, "", attacks=config.attack.names)
    with _about("data.name", config.data.name):
        _ = made.data
    with _about("data.partitioner", config.data.partitioner):
        _ = made.partitions
    with _about("model.name", config.model.name):
        model = made.build_model()
    with _about("defense.name", config.defense.name):
        sizes = [made.num_examples(client) for client in range(made.clients)]
        releases = [made.release(size) for size in sizes]
        noise = torch.Generator().manual_seed(0)
        optimizer = torch.optim.SGD(model.parameters(), lr=config.train.lr)
        prepared, _ = made.defense.prepare(model, optimizer, releases[0], made.settings(1).batch_size, noise)
        made.defense.restore(prepared)
        check_signal(made.defense, config.audit)
        central_parts.protected(strategy, made)
        private = made.defense.guarantee(Ledger(), sizes[0]) is not None
    if hasattr(strategy, "train_loss_key") and private:
        raise ConfigError(
            f"strategy.name = {config.strategy.name!r} is not allowed with defense.name = "
            f"{config.defense.name!r}: it weights clients by their training loss, "
            "which the defense keeps private"
        )
    if made.secure is not None:
        enough = reference_module("strategies.flower_strategies").SUM_SUFFICES
        check_secure(config, made.secure, enough, max(sizes))
    return made


def _check_machine(config: RunConfig) -> None:
    federation = config.federation
    if federation.engine == "deployment":
        raise ConfigError(
            "federation.engine = 'deployment' is not allowed here: a deployment is started by 'flwr run', "
            "on this machine by 'python -m fedaudit.simulation.loopback'; "
            "choose 'in-process' or 'ray'"
        )
    if config.output.resume and federation.engine != "in-process":
        raise ConfigError(
            f"federation.engine = {federation.engine!r} is not allowed with output.resume: "
            "a run is resumed by 'in-process' only"
        )
    if federation.device.startswith("cuda"):
        wanted, found = torch.device(federation.device).index or 0, torch.cuda.device_count()
        if wanted >= found:
            raise ConfigError(
                f"federation.device = {federation.device!r} is not allowed: this machine has {found} "
                "CUDA devices; choose 'auto' or 'cpu'"
            )


@contextmanager
def _about(key: str, value: str) -> Iterator[None]:
    """Say which key of the configuration an error is about."""
    try:
        yield
    except (ConfigError, ValueError) as error:
        raise ConfigError(f"{key} = {value!r} is not allowed: {error}") from error


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


def describe(config: RunConfig, folder: Path) -> None:
    """Write run.toml: configuration, versions, seed, revision and machine."""
    versions = {"fedaudit": __version__, "python": platform.python_version()}
    for name in _VERSIONS:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    run: dict[str, Any] = {
        "name": folder.name,
        "defense": config.defense.name,
        "seed": config.seed,
        "engine": config.federation.engine,
        "repeatable": is_repeatable(config.defense.name),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "git-revision": _revision(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "device": "cuda" if torch.cuda.is_available() and config.federation.device != "cpu" else "cpu",
    }
    tables: dict[str, Mapping[str, Any]] = {"run": run, "config": config.flat(), "versions": versions}
    write_text(folder / "run.toml", _toml(tables))


def _toml(tables: Mapping[str, Mapping[str, Any]]) -> str:
    """Tables of scalars as TOML; a JSON string is a TOML basic string, and dotted keys are quoted."""
    lines = ["schema = 1"]
    for name, table in tables.items():
        lines += [
            "",
            f"[{name}]",
            *(f"{json.dumps(key)} = {json.dumps(value, ensure_ascii=False)}" for key, value in table.items()),
        ]
    return "\n".join(lines) + "\n"


def _revision() -> str:
    try:
        found = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return found.stdout.strip()


def comparisons(config: RunConfig, folder: Path) -> list[RunConfig]:
    """One configuration per combination of `compare.vary`, defense and seed, each in a folder of its own.

    A run's folder is named by its combination, defense and seed: "train.batch-size=8-none-seed0"; a name
    that is taken or over 200 characters ends in a number of its own.

    Raises:
        ConfigError: if a combination breaks the schema.
    """
    from fedaudit.config import ints

    runs: list[RunConfig] = []
    names: set[str] = set()
    for values, varied in config.variations():
        prefix = _plain("-".join(f"{key}={written(value)}" for key, value in values.items()))
        for spec in config.defense_specs():
            for seed in ints(config.compare.seeds):
                each = varied.with_(
                    defense__name=str(spec), seed=seed, output__directory=str(folder), output__name=""
                )
                name = _unused(f"{prefix}-{run_name(each)}".lstrip("-"), names)
                names.add(name)
                runs.append(each.with_(output__name=name))
    return runs


def _unused(name: str, taken: Container[str], longest: int = 200) -> str:
    """The name, or the first of name-2, name-3, ... that is not taken; file systems allow 255 bytes."""
    candidate, number = name[:longest], 1
    while candidate in taken or (number == 1 and len(name) > longest):
        number += 1
        candidate = f"{name[:longest]}-{number}"
    return candidate
