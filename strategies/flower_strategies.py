"""Any built-in Flower strategy by its class name, with options: ``FedAdam(eta=0.1)``."""

import inspect

import flwr.serverapp.strategy as flower
from flwr.serverapp.strategy import Strategy

from fedaudit.errors import ConfigError
from fedaudit.spec import Spec, build, parse_spec

WRAPS = "strategy"


def strategy_names() -> list[str]:
    """Class names of Flower's strategies that can be built from scalars."""
    found = [name for name in flower.__all__ if _is_strategy(getattr(flower, name))]
    return sorted(name for name in found if not name.startswith("FedXgb"))


def build_strategy(text: str, *, clients: int, fraction_train: float, min_available: int) -> Strategy:
    """The strategy a spec names, sampling `fraction_train` of the nodes and evaluating on none.

    A wrapper of Flower's (the DifferentialPrivacy classes) takes its inner strategy's name as the option
    ``inner`` (FedAvg if left out) and samples what the inner one samples.

    Raises:
        ConfigError: if there is no such strategy or an option does not fit.
    """
    spec = parse_spec(text)
    if spec.name not in strategy_names():
        raise ConfigError(f"no strategy is named {spec.name!r}: choose one of {', '.join(strategy_names())}")
    kind = getattr(flower, spec.name)
    sampled = max(1, int(clients * fraction_train))
    options = dict(spec.options)
    if WRAPS in inspect.signature(kind).parameters:
        inner = build_strategy(
            str(options.pop("inner", "FedAvg")),
            clients=clients,
            fraction_train=fraction_train,
            min_available=min_available,
        )
        options.setdefault("num-sampled-clients", sampled)
        return build(Spec(spec.name, options), kind, strategy=inner)  # type: ignore[no-any-return]
    return build(  # type: ignore[no-any-return]
        Spec(spec.name, options),
        kind,
        fraction_train=fraction_train,
        fraction_evaluate=0.0,
        min_train_nodes=sampled,
        min_evaluate_nodes=0,
        min_available_nodes=min_available,
    )


def _is_strategy(candidate: object) -> bool:
    return (
        inspect.isclass(candidate) and issubclass(candidate, Strategy) and not inspect.isabstract(candidate)
    )
