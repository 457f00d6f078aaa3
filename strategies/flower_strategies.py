"""Any built-in Flower strategy by its class name, with options: ``FedAdam(eta=0.1)``."""

import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import flwr.serverapp.strategy as flower
from flwr.serverapp.strategy import Strategy

from fedaudit.errors import ConfigError
from fedaudit.spec import Spec, build, parse_spec

WRAPS = "strategy"
# what the reference client reads and reports; a strategy that used other names would find nothing
KEYS = {"weighted_by_key": "num-examples", "arrayrecord_key": "arrays", "configrecord_key": "config"}
LOSS = {"train_loss_key": "train-loss"}
SUM_SUFFICES = ("FedAvg", "FedProx", "FedAvgM", "FedAdagrad", "FedAdam", "FedYogi")
"""Strategies that look at nothing but the weighted mean of the updates."""
UNUSABLE = {
    "FedXgb": "it aggregates trees, and the models here are networks",
    "DifferentialPrivacyClientSide": "it counts on clipping that the reference client does not do, and noise "
    "for unclipped updates protects nothing: use its ServerSide twin",
}


def strategy_names() -> list[str]:
    """Class names of Flower's strategies that can be built from scalars and suit the reference client."""
    found = [name for name in flower.__all__ if _is_strategy(getattr(flower, name))]
    return sorted(name for name in found if not name.startswith(tuple(UNUSABLE)))


def build_strategy(text: str, *, clients: int, fraction_train: float, min_available: int) -> Strategy:
    """The strategy a spec names, sampling `fraction_train` of the nodes and evaluating on none.

    A wrapper of Flower's (the DifferentialPrivacy classes) takes its inner strategy's name as the option
    ``inner`` (FedAvg if left out) and samples what the inner one samples.

    Raises:
        ConfigError: if there is no such strategy or an option does not fit.
    """
    spec = parse_spec(text)
    if spec.name not in strategy_names():
        allowed = ", ".join(strategy_names())
        for start, reason in UNUSABLE.items():
            if spec.name in flower.__all__ and spec.name.startswith(start):
                raise ConfigError(f"{spec.name} cannot be used: {reason}; choose one of {allowed}")
        raise ConfigError(f"no strategy is named {spec.name!r}: choose one of {allowed}")
    kind = getattr(flower, spec.name)
    sampled = max(1, int(clients * fraction_train))
    options = dict(spec.options)
    parameters = inspect.signature(kind).parameters
    if WRAPS in parameters:
        inner = build_strategy(
            str(options.pop("inner", "FedAvg")),
            clients=clients,
            fraction_train=fraction_train,
            min_available=min_available,
        )
        options.setdefault("num-sampled-clients", sampled)
        return build(Spec(spec.name, options), kind, strategy=inner)  # type: ignore[no-any-return]
    given: dict[str, Any] = {
        "fraction_train": fraction_train,
        "fraction_evaluate": 0.0,
        "min_train_nodes": sampled,
        "min_evaluate_nodes": 0,
        "min_available_nodes": min_available,
        **{key: value for key, value in (KEYS | LOSS).items() if key in parameters},
    }
    with _no_evaluation_expected():
        return build(Spec(spec.name, options), kind, **given)  # type: ignore[no-any-return]


@contextmanager
def _no_evaluation_expected() -> Iterator[None]:
    """Hold back Flower's warning that clients do not evaluate: here the server does."""

    def expected(record: logging.LogRecord) -> bool:
        return "fraction_evaluate" not in record.getMessage()

    flower_log = logging.getLogger("flwr")
    flower_log.addFilter(expected)
    try:
        yield
    finally:
        flower_log.removeFilter(expected)


def _is_strategy(candidate: object) -> bool:
    return (
        inspect.isclass(candidate) and issubclass(candidate, Strategy) and not inspect.isabstract(candidate)
    )
