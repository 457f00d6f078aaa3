"""Dotted keys and scalars: nested tables made flat, and one ``key=value`` of the command line."""

import tomllib
from collections.abc import Mapping
from typing import Any

from fedaudit.errors import ConfigError
from fedaudit.spec import Scalar


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Scalar]:
    """Nested tables as dotted keys."""
    flat: dict[str, Scalar] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


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
