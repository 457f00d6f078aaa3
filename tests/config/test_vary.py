"""What a comparison varies: the grammar, the product, and what is refused before anything runs."""

from pathlib import Path

import pytest

from fedaudit.config import RunConfig
from fedaudit.config.schema import varied_values
from fedaudit.config.vary import split_vary
from fedaudit.errors import ConfigError
from fedaudit.federation.folders import run_folder
from fedaudit.studies.calibration import calibrate
from fedaudit.studies.comparison import comparisons


def config(vary: str, **more: object) -> RunConfig:
    """A configuration that varies this."""
    keys = {"compare." + key: value for key, value in more.items()}
    return RunConfig.from_flat({"compare.vary": vary, "compare.defenses": "none, sign", **keys})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {}),
        (" ; ", {}),
        ("data.name:digits|patches", {"data.name": ("digits", "patches")}),
        ("a: 1 | 2; b: x ;", {"a": ("1", "2"), "b": ("x",)}),
        ("""a: "p|q" | 'r;s' | t""", {"a": ('"p|q"', "'r;s'", "t")}),
        (r'a: "x\"|y" | z', {"a": (r'"x\"|y"', "z")}),
        (r"a: 'x\' | z", {"a": (r"'x\'", "z")}),  # a literal string of TOML has no escapes
        ("a: it's | it's too", {"a": ("it's", "it's too")}),
        ("a: C:/x | D:/y", {"a": ("C:/x", "D:/y")}),
        ("a: f(x=1, y='b') | g", {"a": ("f(x=1, y='b')", "g")}),
    ],
)
def test_a_separator_counts_outside_quotes_only(text: str, expected: dict[str, tuple[str, ...]]) -> None:
    assert split_vary(text) == expected


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("a", "a varied key is written 'key: value | value', got 'a'"),
        (": 1", "a varied key is written"),
        ("a: 1 | ", "an empty one for a in 'a: 1 |'"),
        ("a:", "an empty one for a"),
        ("a: 1; a: 2", "a key is varied once, got a twice"),
        ("a: 'x | y", "a quoted value ends with its quote"),
    ],
)
def test_a_broken_text_is_told_what_is_wrong(text: str, rule: str) -> None:
    with pytest.raises(ConfigError, match=rule.replace("|", r"\|")):
        split_vary(text)


def test_values_have_the_types_of_overrides() -> None:
    text = """train.lr: 1 | 0.5; audit.strict: true | false; data.name: digits | "npz"; data.root: 1,2 | ''"""
    assert varied_values(text) == {
        "train.lr": (1, 0.5),
        "audit.strict": (True, False),
        "data.name": ("digits", "npz"),
        "data.root": ("1,2", ""),
    }


def test_every_combination_of_values_defenses_and_seeds_has_a_folder_of_its_own() -> None:
    runs = comparisons(
        config("data.name: digits | patches; train.batch-size: 8 | 32", seeds="0, 3"), Path("c")
    )
    found = {
        (run.data.name, run.train.batch_size, run.defense.name, run.seed): str(run_folder(run))
        for run in runs
    }
    assert len(runs) == len(found) == len(set(found.values())) == 16
    assert found["patches", 8, "sign", 3] == "c/data.name=patches-train.batch-size=8-sign-seed3"
    assert [run.data.name for run in runs[:8]] == ["digits"] * 8  # the last key changes fastest


def test_without_varied_keys_folders_are_named_as_before() -> None:
    runs = comparisons(config(""), Path("c"))
    assert [str(run_folder(run)) for run in runs] == ["c/none-seed0", "c/sign-seed0"]


def test_names_that_look_alike_or_are_long_stay_apart() -> None:
    values = " | ".join(f"'{character}{'x' * 300}'" for character in "ab") + " | 'p/q' | 'p;q' | 'p|q'"
    runs = comparisons(config(f"data.root: {values}"), Path("c"))
    names = [run.output.name for run in runs]
    assert len(set(names)) == 10 and max(map(len, names)) <= 210
    assert [name for name in names if name.startswith("data.root=p-q-none")] == [
        "data.root=p-q-none-seed0",
        "data.root=p-q-none-seed0-2",
        "data.root=p-q-none-seed0-3",
    ]


@pytest.mark.parametrize(
    ("vary", "sentence"),
    [
        (
            "train.batch-size: 8 | x",
            "asks for train.batch-size = x, but train.batch-size = 'x' is not allowed",
        ),
        ("data.name: digits | moon", "asks for data.name = moon, but data.name = 'moon' is not allowed"),
        (
            "train.optimizer: sgd | adam; train.momentum: 0.0 | 0.9",
            "adam, train.momentum = 0.9, but train.mom",
        ),
    ],
)
def test_a_combination_that_cannot_run_is_named_before_any_runs(vary: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence) as caught:
        comparisons(config(vary), Path("c"))
    assert "\n" not in str(caught.value)


def test_a_list_is_no_value() -> None:
    with pytest.raises(ConfigError, match="must be a scalar"):
        config("train.batch-size: [1, 2]")


def test_the_baseline_is_one_of_the_defenses() -> None:
    assert config("", baseline="sign").compare.baseline == "sign"
    with pytest.raises(ConfigError, match=r"one of compare.defenses, got 'top-k': choose from none; sign"):
        config("", baseline="top-k")


def test_a_calibration_refuses_what_it_would_ignore(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a calibration varies defense and seed only"):
        calibrate(config("train.lr: 1 | 2"), tmp_path)
