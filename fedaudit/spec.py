"""One small grammar for choosing a part and its options in a scalar: ``name(key=value, ...)``.

Flower's run configuration holds scalars only, so a list of parts is one string:
``"none, dp-sgd(epsilon=8, clip-norm=1)"``. The same grammar serves models, partitioners, strategies,
defenses, measures and attacks. Values are numbers, true/false or plain text. Defenses may be chained:
``"dp-sgd(epsilon=8) then top-k(fraction=0.1)"`` is one item of a list, applied from left to right.
"""

import inspect
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from fedaudit.errors import ConfigError

Scalar = int | float | bool | str

_PART = re.compile(r"\s*([A-Za-z][\w-]*)\s*(?:\(([^()]*)\))?\s*(,|$|(?<=[\s)])then\s+(?=\S))")
_OPTION = re.compile(r"\s*([A-Za-z][\w-]*)\s*=\s*([^,=]*?)\s*$")


@dataclass(frozen=True)
class Spec:
    """A part's registered name and the options written beside it.

    >>> str(parse_spec("dp-sgd( epsilon=8 , clip-norm=1.0)"))
    'dp-sgd(epsilon=8, clip-norm=1.0)'
    """

    name: str
    options: Mapping[str, Scalar] = field(default_factory=dict)
    then: "Spec | None" = None

    @property
    def chain(self) -> "tuple[Spec, ...]":
        """The part and those that follow it, each by itself."""
        rest = self.then.chain if self.then else ()
        return (Spec(self.name, self.options), *rest)

    def __str__(self) -> str:
        inside = ", ".join(f"{key}={_write(value)}" for key, value in self.options.items())
        own = f"{self.name}({inside})" if self.options else self.name
        return f"{own} then {self.then}" if self.then else own


def parse_specs(text: str) -> tuple[Spec, ...]:
    """The specs in a comma-separated list; an empty text is an empty list.

    Raises:
        ConfigError: if the text does not follow the grammar.

    >>> [spec.name for spec in parse_specs("none, dp-sgd(epsilon=8)")]
    ['none', 'dp-sgd']
    """
    specs: list[Spec] = []
    pending: list[Spec] = []
    position = 0
    while position < len(text.rstrip()):
        match = _PART.match(text, position)
        if match is None:
            raise ConfigError(
                f"a part is written 'name' or 'name(key=value, ...)', got {text!r}: "
                f"check it from {text[position:].strip()!r} on"
            )
        pending.append(Spec(match[1], _parse_options(match[2] or "", text)))
        if not match[3].startswith("then"):
            whole: Spec | None = None
            for part in reversed(pending):
                whole = Spec(part.name, part.options, whole)
            specs += [whole] if whole else []
            pending = []
        position = match.end()
    return tuple(specs)


def parse_spec(text: str) -> Spec:
    """The single spec in `text`.

    Raises:
        ConfigError: if there is not exactly one.
    """
    specs = parse_specs(text)
    if len(specs) != 1:
        raise ConfigError(f"exactly one name is allowed here, got {text!r}: give one")
    return specs[0]


def build(spec: Spec, factory: Callable[..., Any], /, **given: Any) -> Any:
    """Call `factory` with the spec's options, each checked against the factory's annotation.

    `given` are arguments the caller supplies itself; they are not options.

    Raises:
        ConfigError: if an option is unknown, has the wrong type, or a required one is missing.
    """
    allowed = options_of(factory, exclude=frozenset(given))
    arguments: dict[str, Any] = dict(given)
    for key, value in spec.options.items():
        name = key.replace("-", "_")
        if name not in allowed:
            known = ", ".join(sorted(o.replace("_", "-") for o in allowed)) or "none"
            raise ConfigError(f"{spec.name} has no option {key!r}: its options are {known}")
        arguments[name] = _checked(spec.name, key, value, allowed[name])
    needed = [n.replace("_", "-") for n in _required(factory) if n not in arguments]
    if needed:
        raise ConfigError(f"{spec.name} needs {', '.join(needed)}: write {spec.name}({needed[0]}=...)")
    try:
        return factory(**arguments)
    except ValueError as error:
        raise ConfigError(f"{spec} cannot be used: {error}") from error


def options_of(factory: Callable[..., Any], exclude: frozenset[str] = frozenset()) -> dict[str, Any]:
    """Option names of a factory and their annotations.

    >>> def clip(x, norm: float = 1.0): ...
    >>> options_of(clip, exclude=frozenset({"x"}))
    {'norm': <class 'float'>}
    """
    hints = get_type_hints(factory.__init__ if inspect.isclass(factory) else factory)
    return {name: hints.get(name, Any) for name in _parameters(factory) if name not in exclude}


def _parameters(factory: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {n: p for n, p in inspect.signature(factory).parameters.items() if p.kind in by_name}


def _required(factory: Callable[..., Any]) -> list[str]:
    return [n for n, p in _parameters(factory).items() if p.default is inspect.Parameter.empty]


def _checked(part: str, key: str, value: Any, annotation: Any) -> Any:
    # numbers are read before the annotation is known: an option that is text may look like one;
    # true and false are never numbers, although Python says so
    config = ConfigDict(arbitrary_types_allowed=True, coerce_numbers_to_str=True)
    try:
        return TypeAdapter(annotation, config=config).validate_python(
            value, strict=isinstance(value, bool) or None
        )
    except ValidationError as error:
        rule = error.errors()[0]["msg"].removeprefix("Input should be ")
        raise ConfigError(f"{part}({key}={_write(value)}) is not allowed: it must be {rule}") from error


def _parse_options(text: str, whole: str) -> dict[str, Scalar]:
    options: dict[str, Scalar] = {}
    for piece in filter(str.strip, text.split(",")):
        match = _OPTION.match(piece)
        if match is None:
            raise ConfigError(f"an option is written key=value, got {piece.strip()!r} in {whole!r}: fix it")
        key = match[1].replace("_", "-")
        if key in options:
            raise ConfigError(f"an option is given once, got {key!r} again in {whole!r}: remove one")
        options[key] = _scalar(match[2])
    return options


def _scalar(text: str) -> Scalar:
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return text


def _write(value: Scalar) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
