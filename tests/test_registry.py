"""The lists of parts."""

import re

import pytest

from fedaudit import registry
from fedaudit.errors import ConfigError
from fedaudit.registry import Entry, Registry
from fedaudit.spec import Spec, options_of, parse_spec

REGISTRIES = [value for value in vars(registry).values() if isinstance(value, Registry)]
PARTS = [pytest.param(r[name], id=f"{r.kind}-{name}") for r in REGISTRIES for name in r]


@pytest.mark.parametrize("entry", PARTS)
def test_every_registered_part_can_be_imported(entry: Entry) -> None:
    assert callable(entry.load())


@pytest.mark.parametrize("entry", PARTS)
def test_what_a_part_is_cannot_be_changed_by_an_option(entry: Entry) -> None:
    assert not {"name", "unit", "needs", "scope", "observers"} & set(options_of(entry.load()))


@pytest.mark.parametrize("entry", PARTS)
def test_every_part_has_a_one_line_summary(entry: Entry) -> None:
    assert re.fullmatch(r"\S.{8,98}[^.\s]", entry.summary)


@pytest.mark.parametrize("parts", REGISTRIES, ids=lambda parts: parts.kind)
def test_names_can_be_written_in_a_spec(parts: Registry) -> None:
    assert list(parts)
    assert [parse_spec(name).name for name in parts] == list(parts)


def test_a_part_of_ones_own_is_built_with_its_options() -> None:
    parts = Registry("shape", {"path": ("by import path", "fractions:Fraction")})
    parts.register("square", "area of a square", lambda side=1.0, unit="m": f"{side * side} {unit}2")
    assert parts.build(parse_spec("square(side=2.0)"), unit="cm") == "4.0 cm2"
    assert parts.build(Spec("path")) == 0
    assert list(parts) == ["path", "square"]
    assert "square" in parts
    assert "circle" not in parts


def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    parts = Registry("shape", {"square": ("flat", "x:y"), "cube": ("solid", "x:y")})
    for ask in (parts.check, parts.__getitem__, lambda name: parts.build(Spec(name))):
        with pytest.raises(ConfigError, match="no shape is named 'circle': choose one of square, cube"):
            ask("circle")


def test_a_name_is_taken_once() -> None:
    parts = Registry("shape", {"square": ("flat", "x:y")})
    with pytest.raises(ConfigError, match="a shape named 'square' exists already"):
        parts.register("square", "another", dict)
    assert parts["square"].summary == "flat"
