"""The one schema of a run: TOML presets, command-line overrides and Flower run-config are all read into it.

Keys are kebab-case in TOML and dotted in Flower's run configuration (``data.name``); a preset in
``configs/`` is therefore at the same time a file for ``flwr run . --run-config``.
"""

import difflib
import math
import re
import tomllib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self, cast, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from fedaudit.attack_trigger import Trigger
from fedaudit.errors import ConfigError
from fedaudit.registry import ATTACKS, DATASETS, DEFENSES, MEASURES, MODELS, PARTITIONERS, Registry
from fedaudit.spec import Scalar as Scalar
from fedaudit.spec import Spec, parse_specs
from fedaudit.vary import combinations, label, refusal, split_vary

Observer = Literal["server", "client", "oracle"]


def _parts(registry: Registry | None, at_least: int = 0, at_most: int | None = None) -> AfterValidator:
    """Check a text that names between `at_least` and `at_most` parts, each one once and in `registry`."""

    def checked(text: str) -> str:
        try:
            specs = parse_specs(text)
            for spec in specs:
                if registry is not None:
                    registry.check_spec(spec)
                elif spec.then:
                    raise ConfigError(f"only defenses are chained by 'then', got '{spec}': give one name")
        except ConfigError as error:  # pydantic adds the key, and collects ValueError only
            raise ValueError(str(error)) from error
        if len(specs) < at_least or (at_most is not None and len(specs) > at_most):
            wanted = "exactly one name" if at_most == 1 else f"at least {at_least} name"
            choice = f"choose from {', '.join(registry)}" if registry is not None else "give one"
            raise ValueError(f"{wanted} is allowed here, got {len(specs)}: {choice}")
        for spec in specs:
            if specs.count(spec) > 1:
                raise ValueError(f"a part is listed once, got {spec} more than once: remove the repetition")
        return text

    return AfterValidator(checked)


def _one_of(registry: Registry) -> AfterValidator:
    return _parts(registry, at_least=1, at_most=1)


def _pieces(text: str) -> tuple[str, ...]:
    return tuple(piece.strip() for piece in text.split(",") if piece.strip())


def _trigger(text: str) -> str:
    if text:
        try:
            Trigger.parse(text)
        except ConfigError as error:
            raise ValueError(str(error)) from error
    return text


def _int_list(text: str) -> str:
    pieces = _pieces(text)
    if not pieces or not all(piece.isdecimal() for piece in pieces):
        raise ValueError("whole numbers separated by commas are allowed: write e.g. '0,1'")
    if len({int(piece) for piece in pieces}) < len(pieces):
        raise ValueError("each number is listed once: remove the repetition")
    return text


def _vary(text: str) -> str:
    if not text.strip():
        return text
    try:
        for key, values in varied_values(text).items():
            if why := refusal(key):
                raise ConfigError(f"{key} cannot be varied, {why}: remove it")
            repeated = next((v for i, v in enumerate(values) if v in values[:i]), None)
            if repeated is not None:
                raise ConfigError(f"each value is listed once, got {repeated!r} more than once for {key}")
    except ConfigError as error:
        raise ValueError(str(error)) from error
    return text


def _quantities(text: str) -> str:
    pieces = _pieces(text)
    if len(set(pieces)) < len(pieces):
        raise ValueError("each quantity is listed once: remove the repetition")
    for piece in pieces:
        owner, dot, _ = piece.partition(".")
        if dot and owner not in ATTACKS:
            raise ValueError(
                f"a score is written 'attack.score', and there is no attack {owner!r}: "
                f"choose from {', '.join(ATTACKS)}"
            )
    return text


def _observers(text: str) -> str:
    allowed = get_args(Observer)
    pieces = _pieces(text)
    if not pieces or not set(pieces) <= set(allowed):
        raise ValueError(f"observers are {', '.join(allowed)}: list one or more of these")
    return text


def _device(text: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:[0-9]+)?", text):
        raise ValueError("devices are auto, cpu, cuda and cuda:N: choose one of these")
    return text


def _number_as_text(value: Any) -> Any:
    """A list of one number is a number in TOML."""
    return str(value) if type(value) is int else value


def _real_as_text(value: Any) -> Any:
    return str(value) if type(value) in (int, float) else value


def _number_list(text: str) -> str:
    try:
        values = [float(piece) for piece in _pieces(text)]
    except ValueError as error:
        raise ValueError("numbers separated by commas are allowed: write e.g. '0.1, 0.3'") from error
    if not all(0 < value < math.inf for value in values):
        raise ValueError("numbers above 0 are allowed: write e.g. '0.1, 0.3'")
    if len(set(values)) < len(values):
        raise ValueError("each number is listed once: remove the repetition")
    return text


NumberList = Annotated[str, BeforeValidator(_real_as_text), AfterValidator(_number_list)]
IntList = Annotated[str, BeforeValidator(_number_as_text), AfterValidator(_int_list)]


def ints(text: str) -> tuple[int, ...]:
    """The whole numbers in a comma-separated list.

    >>> ints("1, 5")
    (1, 5)
    """
    return tuple(int(piece) for piece in _pieces(text))


def numbers(text: str) -> tuple[float, ...]:
    """The numbers in a comma-separated list.

    >>> numbers("0.1, 3")
    (0.1, 3.0)
    """
    return tuple(float(piece) for piece in _pieces(text))


class Section(BaseModel):
    """A table of the configuration: kebab-case keys, nothing unknown, checked, frozen."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        validate_default=True,
        allow_inf_nan=False,
        alias_generator=lambda name: name.replace("_", "-"),
        populate_by_name=True,
    )


class DataConfig(Section):
    """What the clients train on."""

    name: Annotated[str, _one_of(DATASETS)] = "digits"
    root: str = Field("data", description="folder (or .npz file) of datasets that are not embedded")
    download: bool = Field(False, description="let torchvision download a missing dataset")
    partitioner: Annotated[str, _one_of(PARTITIONERS)] = "iid"
    test_fraction: float = Field(0.2, gt=0, lt=1, description="share held by the server for testing")
    reference_fraction: float = Field(
        0.1, ge=0, lt=1, description="share the auditing server owns as public data"
    )
    validation_fraction: float = Field(
        0.0, ge=0, lt=1, description="share of the clients' data the server evaluates on, not on the test set"
    )
    max_examples: int = Field(0, ge=0, description="use only this many examples; 0 is all")


class ModelConfig(Section):
    """What is trained."""

    name: Annotated[str, _one_of(MODELS)] = "mlp"


class FederationConfig(Section):
    """Who takes part, how often, and where it runs."""

    clients: int = Field(10, ge=2)
    rounds: int = Field(10, ge=1)
    fraction_train: float = Field(1.0, gt=0, le=1, description="share of clients sampled per round")
    evaluate_every: int = Field(
        1, ge=1, description="server-side evaluation every this many rounds, and at the end"
    )
    engine: Literal["in-process", "ray", "deployment"] = "in-process"
    device: Annotated[str, AfterValidator(_device)] = "auto"
    workers: int = Field(1, ge=1, description="threads (in-process) or actors (ray)")
    gpu_share: float = Field(0.0, ge=0, le=1, description="share of a GPU per ray actor")
    round_timeout: float = Field(3600.0, gt=0, description="seconds to wait for replies")
    reject_bad_updates: bool = Field(True, description="hand an invalid update on as a failed client")


class StrategyConfig(Section):
    """The Flower strategy that aggregates."""

    name: Annotated[str, _parts(None, at_least=1, at_most=1)] = "FedAvg"


class TrainConfig(Section):
    """Local training."""

    optimizer: Literal["sgd", "adam"] = "sgd"
    lr: float = Field(0.1, gt=0)
    lr_decay: float = Field(1.0, gt=0, le=1, description="factor on lr after every round")
    momentum: float = Field(0.0, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0)
    batch_size: int = Field(16, ge=1)
    local_epochs: int = Field(1, ge=1)
    local_steps: int = Field(0, ge=0, description="steps per round instead of epochs; 0 means epochs")


class DefenseConfig(Section):
    """What protects the updates."""

    name: Annotated[str, _one_of(DEFENSES)] = "none"


class AuditConfig(Section):
    """What is measured, by whom, how often."""

    measures: Annotated[str, _parts(MEASURES)] = "cohort-gradient-uniqueness, update-norm, update-cosine"
    observers: Annotated[str, AfterValidator(_observers)] = "server"
    every: int = Field(1, ge=1, description="audit every this many rounds, the first and the last always")
    strict: bool = Field(False, description="stop on a skipped or failed measure")
    save_updates: bool = Field(False, description="keep raw updates of audited rounds as safetensors")
    verify: bool = Field(False, description="test what defense and strategy claim in every audited round")

    @property
    def observer_names(self) -> tuple[Observer, ...]:
        """The observers that measure."""
        return cast(tuple[Observer, ...], _pieces(self.observers))


class AttackConfig(Section):
    """Which attacks run on which intercepted updates."""

    names: Annotated[str, _parts(ATTACKS)] = ""
    rounds: IntList = Field("1", description="rounds whose updates are attacked")
    clients: int = Field(1, ge=1, description="how many of the round's clients are attacked")
    trigger: Annotated[str, AfterValidator(_trigger)] = Field(
        "", description="attack clients for whom this holds, too: 'mutual-information > 3'"
    )
    save_images: bool = Field(False, description="keep originals and reconstructions for the report")
    lpips: bool = Field(False, description="score images by LPIPS too, if its weights are on this machine")


class CompareConfig(Section):
    """What `fedaudit compare` sets side by side."""

    defenses: Annotated[str, _parts(DEFENSES, at_least=1)] = "none, dp-sgd"
    seeds: IntList = "0"
    vary: Annotated[str, AfterValidator(_vary)] = Field(
        "", description="further keys and their values: 'train.batch-size: 8 | 32; data.name: a | b'"
    )
    baseline: Annotated[str, _parts(DEFENSES, at_most=1)] = Field(
        "", description="the defense that others are subtracted from; empty is none, else the first"
    )
    against: Annotated[str, AfterValidator(_quantities)] = Field(
        "", description="quantities drawn against accuracy; empty is all leakage and attack columns"
    )

    @model_validator(mode="after")
    def _baseline_is_compared(self) -> Self:
        listed = [str(spec) for spec in parse_specs(self.defenses)]
        if any(str(spec) not in listed for spec in parse_specs(self.baseline)):
            raise ValueError(
                f"compare.baseline is one of compare.defenses, got {self.baseline!r}: "
                f"choose from {'; '.join(listed)}"
            )
        return self


class TuneConfig(Section):
    """What `fedaudit tune` varies: every combination, or some of them, each one training per seed."""

    defense: str = Field(
        "dp-sgd(epsilon=8, clip-norm={clip}, lr={lr}, batch-size={batch-size})",
        description="a defense in which {lr}, {clip} and {batch-size} stand for what is varied",
    )
    lr: NumberList = Field("0.1, 0.3, 1", description="learning rates; empty varies none")
    clip: NumberList = Field("0.1, 0.3, 1", description="values of {clip}")
    batch_size: NumberList = Field("16, 64", description="batch sizes, whole numbers")
    trials: int = Field(0, ge=0, description="most combinations, drawn by the seed; 0 is all")
    rounds: int = Field(0, ge=0, description="rounds of a trial; 0 is federation.rounds")
    seeds: IntList = "0"
    validation_fraction: float = Field(0.2, gt=0, lt=1, description="share of the clients' data to score on")


class CalibrateConfig(Section):
    """What `fedaudit calibrate` attacks."""

    examples: int = Field(4, ge=1, description="examples of a client and round, reconstructed together")
    repetitions: int = Field(64, ge=4, description="local rounds repeated with and without an example")


class OutputConfig(Section):
    """Where results go."""

    directory: str = "runs"
    name: str = Field("", description="folder of the run inside directory; empty is <defense>-seed<seed>")
    resume: bool = Field(False, description="continue the run in that folder from its last complete round")


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


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Scalar]:
    """Nested tables as dotted keys."""
    flat: dict[str, Scalar] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def presets_folder() -> Path:
    """Where the presets are: beside the package in a checkout, inside it in a wheel."""
    inside = Path(__file__).parent / "_app" / "configs"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "configs"


def presets() -> dict[str, Path]:
    """Names and files of the presets that come with fedaudit."""
    return {path.stem: path for path in sorted(presets_folder().glob("*.toml"))}


def load_config(source: str | Path, overrides: Mapping[str, Scalar] | None = None) -> RunConfig:
    """Read a TOML file, or a preset by name, and apply overrides by dotted key.

    Raises:
        ConfigError: if the file is missing, is not TOML, or breaks the schema.
    """
    path = _config_file(source)
    try:
        nested = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"a configuration is TOML in UTF-8, got {str(path)!r}: {error}") from error
    except OSError as error:
        raise ConfigError(f"a configuration must be readable, got {str(path)!r}: {error.strerror}") from error
    return RunConfig.from_flat({**flatten(nested), **(overrides or {})})


def _config_file(source: str | Path) -> Path:
    path, known = Path(source), presets()
    if str(path) in known:
        return known[str(path)]
    if path.is_file():
        return path
    # a wheel has no configs/ folder beside it: configs/quickstart.toml still names the preset
    if path.parent == Path("configs") and path.suffix == ".toml" and path.stem in known:
        return known[path.stem]
    raise ConfigError(
        f"a configuration is a TOML file or a preset's name, got {str(source)!r}: "
        f"the presets are {', '.join(known)}"
    )


def parse_override(text: str) -> tuple[str, Scalar]:
    """Key and value of one ``key=value``; the value is TOML, or plain text if it is not.

    >>> parse_override("federation.rounds=3")
    ('federation.rounds', 3)
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"an override is written key=value, got {text!r}: write e.g. federation.rounds=3")
    try:
        parsed = tomllib.loads(f"v = {value}")["v"]
    except tomllib.TOMLDecodeError:
        parsed = value.strip()
    if not isinstance(parsed, (str, int, float, bool)):
        raise ConfigError(f"the value of {key} must be a scalar, got {value!r}: write lists as 'a,b'")
    return key.strip(), parsed


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
