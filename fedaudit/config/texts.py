"""What a scalar of the configuration may say where it stands for several things: lists, names, a device.

Flower's run configuration holds scalars only, so that a list is one text, "a, b".
"""

import math
import re
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BeforeValidator

from fedaudit.config.attack_trigger import Trigger
from fedaudit.errors import ConfigError
from fedaudit.registry import ATTACKS, Registry
from fedaudit.spec import parse_specs

Observer = Literal["server", "client", "oracle"]


def named_parts(registry: Registry | None, at_least: int = 0, at_most: int | None = None) -> AfterValidator:
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


def one_of(registry: Registry) -> AfterValidator:
    """Check a text that names one part in `registry`."""
    return named_parts(registry, at_least=1, at_most=1)


def pieces_of(text: str) -> tuple[str, ...]:
    """The texts in a comma-separated list."""
    return tuple(piece.strip() for piece in text.split(",") if piece.strip())


def _trigger(text: str) -> str:
    if text:
        try:
            Trigger.parse(text)
        except ConfigError as error:
            raise ValueError(str(error)) from error
    return text


def _int_list(text: str) -> str:
    pieces = pieces_of(text)
    if not pieces or not all(piece.isdecimal() for piece in pieces):
        raise ValueError("whole numbers separated by commas are allowed: write e.g. '0,1'")
    if len({int(piece) for piece in pieces}) < len(pieces):
        raise ValueError("each number is listed once: remove the repetition")
    return text


def _quantities(text: str) -> str:
    pieces = pieces_of(text)
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
    pieces = pieces_of(text)
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
        values = [float(piece) for piece in pieces_of(text)]
    except ValueError as error:
        raise ValueError("numbers separated by commas are allowed: write e.g. '0.1, 0.3'") from error
    if not all(0 < value < math.inf for value in values):
        raise ValueError("numbers above 0 are allowed: write e.g. '0.1, 0.3'")
    if len(set(values)) < len(values):
        raise ValueError("each number is listed once: remove the repetition")
    return text


NumberList = Annotated[str, BeforeValidator(_real_as_text), AfterValidator(_number_list)]
IntList = Annotated[str, BeforeValidator(_number_as_text), AfterValidator(_int_list)]
Observers = Annotated[str, AfterValidator(_observers)]
Device = Annotated[str, AfterValidator(_device)]
TriggerText = Annotated[str, AfterValidator(_trigger)]
Quantities = Annotated[str, AfterValidator(_quantities)]


def ints(text: str) -> tuple[int, ...]:
    """The whole numbers in a comma-separated list.

    >>> ints("1, 5")
    (1, 5)
    """
    return tuple(int(piece) for piece in pieces_of(text))


def numbers(text: str) -> tuple[float, ...]:
    """The numbers in a comma-separated list.

    >>> numbers("0.1, 3")
    (0.1, 3.0)
    """
    return tuple(float(piece) for piece in pieces_of(text))
