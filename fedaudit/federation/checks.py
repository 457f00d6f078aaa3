"""Everything that can be said against a configuration before anything runs."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from fedaudit.accounting import Ledger
from fedaudit.audit.secure_sum import SecureSum
from fedaudit.config import RunConfig
from fedaudit.errors import ConfigError
from fedaudit.federation.reference_app import reference_module
from fedaudit.federation.setup import Setup, setup
from fedaudit.spec import parse_spec
from fedaudit.training.round_release import check_signal


def check(config: RunConfig) -> Setup:
    """Build every part the configuration names, so that what is wrong is said before anything runs.

    Raises:
        ConfigError: naming the key, its value and what is allowed.
        DataError: if the data is missing or cannot be split among the clients.
    """
    from fedaudit.audit.auditor import Auditor

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
        _check_secure(config, made.secure, enough, max(sizes))
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


def _check_secure(
    config: RunConfig, secure: SecureSum, strategies: Sequence[str], most_examples: int
) -> None:
    """Raise a ConfigError for what secure aggregation does not go together with.

    Args:
        config: the run's configuration.
        secure: secure aggregation as it is in force.
        strategies: names of those that the mean of the updates is enough for.
        most_examples: examples of the largest client.
    """
    named = f"defense.name = {config.defense.name!r}"
    if parse_spec(config.strategy.name).name not in strategies:
        raise ConfigError(
            f"strategy.name = {config.strategy.name!r} is not allowed with {named}: it needs single clients' "
            f"updates, which secure aggregation hides; choose one of {', '.join(strategies)}"
        )
    sampled = max(1, int(config.federation.clients * config.federation.fraction_train))
    if sampled < secure.part.threshold:
        raise ConfigError(
            f"{named} is not allowed: no sum of {secure.part.threshold} clients is ever released, as "
            f"{sampled} are asked in a round; lower the threshold"
        )
    if most_examples > secure.most_examples(sampled):
        raise ConfigError(
            f"{named} is not allowed: secure aggregation of {sampled} clients takes at most "
            f"{secure.most_examples(sampled)} examples of each, got {most_examples}; use fewer"
        )
    if config.attack.trigger:
        raise ConfigError(
            f"attack.trigger = {config.attack.trigger!r} is not allowed with {named}: it looks for single "
            "clients, which secure aggregation hides; list attack.rounds"
        )


@contextmanager
def _about(key: str, value: str) -> Iterator[None]:
    """Say which key of the configuration an error is about."""
    try:
        yield
    except (ConfigError, ValueError) as error:
        raise ConfigError(f"{key} = {value!r} is not allowed: {error}") from error
