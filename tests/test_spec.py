"""The grammar of parts and options."""

from dataclasses import dataclass
from typing import Literal

import pytest

from fedaudit.errors import ConfigError
from fedaudit.spec import Spec, build, options_of, parse_spec, parse_specs


@dataclass(frozen=True)
class Sampler:
    """A part with an option of every kind."""

    size: int
    scale: float = 1.0
    clip_norm: float | None = None
    mode: Literal["fast", "exact"] = "fast"
    text: str = ""
    enabled: bool = False

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size must be positive, got {self.size}: give 1 or more")


@pytest.mark.parametrize(
    ("text", "specs"),
    [
        ("", ()),
        ("  ", ()),
        ("none", (Spec("none"),)),
        ("none,", (Spec("none"),)),
        ("dp-sgd()", (Spec("dp-sgd"),)),
        ("a, b(x=1) ,c", (Spec("a"), Spec("b", {"x": 1}), Spec("c"))),
        ("a(x=1, y=2), b", (Spec("a", {"x": 1, "y": 2}), Spec("b"))),
        ("a(learning_rate=1e-3)", (Spec("a", {"learning-rate": 0.001}),)),
        ("a( x = -1 , y = fast )", (Spec("a", {"x": -1, "y": "fast"}),)),
    ],
)
def test_text_is_read_as_these_parts(text: str, specs: tuple[Spec, ...]) -> None:
    assert parse_specs(text) == specs


@pytest.mark.parametrize(
    ("written", "value"),
    [("8", 8), ("8.0", 8.0), ("1e3", 1000.0), ("true", True), ("false", False), ("True", "True"), ("", "")],
)
def test_option_values_have_their_own_types(written: str, value: object) -> None:
    read = parse_spec(f"part(option={written})").options["option"]
    assert (type(read), read) == (type(value), value)


@pytest.mark.parametrize(
    "text", ["a", "a(x=1)", "a(x=1.0, y=true)", "a(mode=exact)", "a(z=1e-05)", "dp-sgd(clip-norm=-2.5)"]
)
def test_writing_a_spec_and_reading_it_gives_the_same_spec(text: str) -> None:
    assert str(parse_spec(text)) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (",a", r"a part is written 'name' or 'name\(key=value, ...\)', got ',a'"),
        ("a,,b", "check it from ',b' on"),
        ("a(x=1", "check it from"),
        ("a(x=(1))", "check it from"),
        ("a b", "check it from 'a b' on"),
        ("3a", "check it from '3a' on"),
        ("a(x)", r"an option is written key=value, got 'x' in 'a\(x\)'"),
        ("a(x=1=2)", "an option is written key=value, got 'x=1=2'"),
        ("a(x=1, x=2)", "an option is given once, got 'x' again"),
        ("a(x-y=1, x_y=2)", "an option is given once, got 'x-y' again"),
    ],
)
def test_text_outside_the_grammar_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_specs(text)


@pytest.mark.parametrize("text", ["", "a, b"])
def test_a_single_spec_is_exactly_one(text: str) -> None:
    with pytest.raises(ConfigError, match="exactly one name is allowed here"):
        parse_spec(text)


def test_options_reach_the_factory_with_the_annotated_types() -> None:
    spec = parse_spec("sampler(size=4, scale=2, clip-norm=1, mode=exact, text=64, enabled=true)")
    sampler = build(spec, Sampler)
    assert sampler == Sampler(4, 2.0, 1.0, "exact", "64", True)
    assert type(sampler.scale) is float
    assert type(sampler.text) is str


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("s(size=1, speed=2)", "s has no option 'speed': its options are clip-norm, enabled, mode, scale"),
        ("s(size=2.5)", r"s\(size=2.5\) is not allowed: it must be a valid integer"),
        ("s(size=true)", r"s\(size=true\) is not allowed: it must be a valid integer"),
        ("s(size=1, scale=true)", "must be a valid number"),
        ("s(size=1, scale=big)", r"s\(scale=big\) is not allowed: it must be a valid number"),
        ("s(size=1, mode=slow)", "must be 'fast' or 'exact'"),
        ("s(size=1, enabled=2)", "must be a valid boolean"),
        ("s(scale=1)", r"s needs size: write s\(size=...\)"),
        ("s(size=0)", r"s\(size=0\) cannot be used: size must be positive, got 0"),
    ],
)
def test_options_that_do_not_fit_are_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(parse_spec(text), Sampler)


def test_given_arguments_are_not_options() -> None:
    assert set(options_of(Sampler, exclude=frozenset({"size"}))) == {
        "scale", "clip_norm", "mode", "text", "enabled",
    }  # fmt: skip
    assert build(Spec("s"), Sampler, size=3).size == 3
    with pytest.raises(ConfigError, match="no option 'size'"):
        build(parse_spec("s(size=4)"), Sampler, size=3)


def test_an_error_inside_a_factory_is_not_blamed_on_the_user() -> None:
    def broken() -> int:
        return len(3)  # type: ignore[arg-type]

    with pytest.raises(TypeError, match="has no len"):
        build(Spec("broken"), broken)


def test_variadic_arguments_are_not_options() -> None:
    def collect(first: int, *rest: int, last: int = 0, **others: int) -> int:
        return first + sum(rest) + last + sum(others.values())

    assert options_of(collect) == {"first": int, "last": int}
