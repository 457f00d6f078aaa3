"""The one schema of a run: TOML presets, command-line overrides and Flower run-config are all read into it.

Keys are kebab-case in TOML and dotted in Flower's run configuration (``data.name``); a preset in
``configs/`` is therefore at the same time a file for ``flwr run . --run-config``.
"""

import difflib
from collections.abc import Mapping
from functools import cache
from typing import Any, Self

from pydantic import Field, ValidationError, model_validator

from fedaudit.config.overrides import flatten, parse_override
from fedaudit.config.sections import (
    AttackConfig,
    AuditConfig,
    CalibrateConfig,
    CompareConfig,
    DataConfig,
    DefenseConfig,
    FederationConfig,
    ModelConfig,
    OutputConfig,
    Section,
    StrategyConfig,
    TrainConfig,
    TuneConfig,
)
from fedaudit.config.texts import ints
from fedaudit.config.vary import combinations, label, refusal, split_vary
from fedaudit.errors import ConfigError
from fedaudit.spec import Scalar, Spec, parse_specs


class RunConfig(Section):
    """Everything that determines a run.

    >>> RunConfig.from_flat({"federation.rounds": 3}).federation.rounds
    3
    """

    seed: int = Field(0, ge=0, lt=2**32, description="seed of everything random; numpy takes 32 bits")
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    federation: FederationConfig = FederationConfig()
    strategy: StrategyConfig = StrategyConfig()
    train: TrainConfig = TrainConfig()
    defense: DefenseConfig = DefenseConfig()
    audit: AuditConfig = AuditConfig()
    attack: AttackConfig = AttackConfig()
    compare: CompareConfig = CompareConfig()
    calibrate: CalibrateConfig = CalibrateConfig()
    tune: TuneConfig = TuneConfig()
    output: OutputConfig = OutputConfig()

    @model_validator(mode="after")
    def _varied(self) -> Self:
        """`compare.vary` names keys of this schema, each value once."""
        text = self.compare.vary
        try:
            for key, values in varied_values(text).items() if text.strip() else ():
                if why := refusal(key):
                    raise ConfigError(f"{key} cannot be varied, {why}: remove it")
                repeated = next((v for i, v in enumerate(values) if v in values[:i]), None)
                if repeated is not None:
                    raise ConfigError(f"each value is listed once, got {repeated!r} more than once for {key}")
        except ConfigError as error:  # pydantic collects ValueError only
            raise ValueError(f"compare.vary = {text!r} is not allowed: {error}") from error
        return self

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if "oracle" in self.audit.observer_names and self.federation.engine == "deployment":
            raise ValueError(
                "audit.observers may list 'oracle' in simulation only, got federation.engine='deployment': "
                "remove one of the two"
            )
        if self.train.optimizer == "adam" and self.train.momentum:
            raise ValueError(
                "train.momentum belongs to train.optimizer='sgd', "
                f"got {self.train.momentum} with 'adam': set it to 0"
            )
        attacked = ints(self.attack.rounds) if self.attack.names else ()
        if not all(1 <= number <= self.federation.rounds for number in attacked):
            raise ValueError(
                f"attack.rounds may list rounds 1 to {self.federation.rounds} (federation.rounds), "
                f"got {self.attack.rounds!r}: change one of the two"
            )
        return self

    @classmethod
    def from_flat(cls, flat: Mapping[str, Any]) -> "RunConfig":
        """A checked configuration from dotted keys.

        Raises:
            ConfigError: naming the first bad key, its value and what is allowed.
        """
        nested: dict[str, Any] = {}
        for key, value in flat.items():
            _check_key(key)
            table, _, leaf = key.rpartition(".")
            (nested.setdefault(table, {}) if table else nested)[leaf] = value
        try:
            return cls.model_validate(nested)
        except ValidationError as error:
            raise ConfigError(_sentence(error, flat)) from error

    def flat(self) -> dict[str, Scalar]:
        """Dotted keys and their values, defaults included."""
        return flatten(self.model_dump(by_alias=True))

    def with_(self, **changes: Scalar) -> "RunConfig":
        """A copy with dotted keys changed; ``__`` stands for the dot and ``_`` for the hyphen."""
        renamed = {k.replace("__", ".").replace("_", "-"): v for k, v in changes.items()}
        return RunConfig.from_flat({**self.flat(), **renamed})

    def variations(self) -> "list[tuple[dict[str, Scalar], RunConfig]]":
        """Each combination of `compare.vary` and this configuration with its values.

        Raises:
            ConfigError: naming the combination and what is wrong with it.
        """
        found = []
        for values in combinations(varied_values(self.compare.vary)):
            try:
                found.append((values, RunConfig.from_flat({**self.flat(), **values})))
            except ConfigError as error:
                raise ConfigError(f"compare.vary asks for {label(values)}, but {error}") from error
        return found

    def defense_specs(self) -> tuple[Spec, ...]:
        """The defenses to compare."""
        return parse_specs(self.compare.defenses)


def varied_values(text: str) -> dict[str, tuple[Scalar, ...]]:
    """The keys of a `compare.vary` and their values, read as command-line overrides are.

    Raises:
        ConfigError: if the grammar is broken, or a key is unknown.

    >>> varied_values("train.batch-size: 8 | 32")
    {'train.batch-size': (8, 32)}
    """
    found = {}
    for key, values in split_vary(text).items():
        _check_key(key)
        found[key] = tuple(parse_override(f"{key}={value}")[1] for value in values)
    return found


@cache
def known_keys() -> tuple[str, ...]:
    """Every dotted key of the schema."""
    return tuple(RunConfig().flat())


def _check_key(key: str) -> None:
    keys = known_keys()
    if key in keys:
        return
    near = difflib.get_close_matches(key, keys, n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(near)}?" if near else f"the keys are {', '.join(keys)}"
    raise ConfigError(f"there is no configuration key {key!r}: {hint}")


def _sentence(error: ValidationError, flat: Mapping[str, Any]) -> str:
    first = error.errors()[0]
    key = ".".join(str(piece) for piece in first["loc"])
    message = first["msg"]
    if first["type"] == "value_error":
        rule = message.removeprefix("Value error, ")
    else:
        rule = f"it must be {message.removeprefix('Input should be ')}"
    if key not in known_keys():  # a rule about several keys: its sentence names them itself
        return rule
    if isinstance(flat[key], list):
        rule += ", and a list is written as one text, 'a, b'"
    return f"{key} = {flat[key]!r} is not allowed: {rule}"
