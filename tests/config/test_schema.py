"""The schema of a run, its presets and its overrides."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from fedaudit.config import RunConfig, load_config
from fedaudit.config.files import presets
from fedaudit.config.overrides import flatten, parse_override
from fedaudit.config.schema import known_keys
from fedaudit.config.sections import Section
from fedaudit.config.texts import ints
from fedaudit.errors import ConfigError

ROOT = Path(__file__).parents[2]

# Values of the right type outside what is allowed, and the sentence's rule; None: every value is allowed.
OUTSIDE: dict[str, list[tuple[Any, str]] | None] = {
    "seed": [(-1, "greater than or equal to 0"), (2**32, "less than 4294967296")],
    "data.name": [
        ("minst", "no dataset is named 'minst': choose one of digits"),
        ("digits, mnist", "exactly one name"),
        ("digits(", "a part is written"),
    ],
    "data.root": None,
    "data.download": None,
    "data.partitioner": [("random", "choose one of iid"), ("", "exactly one name is allowed here, got 0")],
    "data.test-fraction": [(0, "greater than 0"), (1, "less than 1")],
    "data.reference-fraction": [(-0.1, "greater than or equal to 0"), (1.0, "less than 1")],
    "data.validation-fraction": [(-0.1, "greater than or equal to 0"), (1.0, "less than 1")],
    "data.max-examples": [(-1, "greater than or equal to 0")],
    "model.name": [("vgg", "choose one of logistic")],
    "federation.clients": [(1, "greater than or equal to 2")],
    "federation.rounds": [(0, "greater than or equal to 1")],
    "federation.fraction-train": [(0, "greater than 0"), (1.1, "less than or equal to 1")],
    "federation.evaluate-every": [(0, "greater than or equal to 1")],
    "federation.engine": [("cloud", "'in-process', 'ray' or 'deployment'")],
    "federation.device": [("gpu", "devices are auto, cpu, cuda and cuda:N"), ("cuda:x", "devices are")],
    "federation.workers": [(0, "greater than or equal to 1")],
    "federation.gpu-share": [(-0.1, "greater than or equal to 0"), (2, "less than or equal to 1")],
    "federation.round-timeout": [(0, "greater than 0"), (float("inf"), "a finite number")],
    "federation.reject-bad-updates": None,
    "strategy.name": [("", "exactly one name"), ("FedAvg, FedProx", "exactly one name")],
    "train.optimizer": [("lion", "'sgd' or 'adam'")],
    "train.lr": [(0, "greater than 0"), (float("nan"), "a finite number")],
    "train.lr-decay": [(0, "greater than 0"), (1.1, "less than or equal to 1")],
    "train.momentum": [(-0.1, "greater than or equal to 0"), (1, "less than 1")],
    "train.weight-decay": [(-1, "greater than or equal to 0")],
    "train.batch-size": [(0, "greater than or equal to 1")],
    "train.local-epochs": [(0, "greater than or equal to 1")],
    "train.local-steps": [(-1, "greater than or equal to 0")],
    "defense.name": [("magic", "no defense is named 'magic': choose one of none")],
    "audit.measures": [("norm", "no measure is named"), ("update-norm, update-norm", "listed once")],
    "audit.observers": [("root", "observers are server, client, oracle"), ("", "one or more")],
    "audit.every": [(0, "greater than or equal to 1")],
    "audit.strict": None,
    "audit.save-updates": None,
    "audit.verify": None,
    "attack.names": [("brute", "no attack is named")],
    "attack.rounds": [("1;2", "whole numbers separated by commas"), ("", "whole numbers"), ("-1", "whole")],
    "attack.clients": [(0, "greater than or equal to 1")],
    "attack.trigger": [("norm is large", "written 'quantity > number'"), ("a > b", "a trigger is written")],
    "attack.save-images": None,
    "attack.lpips": None,
    "compare.defenses": [("", "at least 1 name"), ("none, none", "listed once, got none more than once")],
    "compare.seeds": [("1, 1", "listed once"), ("²", "whole numbers separated by commas")],
    "compare.vary": [
        ("train.bach: 1 | 2", "no configuration key 'train.bach': did you mean train.batch-size"),
        ("seed: 0 | 1", "seed cannot be varied, compare.seeds lists the seeds"),
        ("defense.name: none | sign", "compare.defenses lists the defenses"),
        ("output.name: a | b", "output.name cannot be varied, a comparison gives every run a folder"),
        ("compare.seeds: 1", "compare.seeds cannot be varied"),
        ("train.batch-size: 8 | 8", "listed once, got 8 more than once for train.batch-size"),
        ("train.batch-size", "a varied key is written 'key: value | value', got 'train.batch-size'"),
    ],
    "compare.baseline": [("none, sign", "exactly one name"), ("nothing", "no defense is named 'nothing'")],
    "compare.against": [
        ("update-norm, update-norm", "listed once"),
        ("dgl.psnr", "there is no attack 'dgl'"),
    ],
    "calibrate.examples": [(0, "greater than or equal to 1")],
    "calibrate.repetitions": [(3, "greater than or equal to 4")],
    "tune.defense": None,
    "tune.lr": [
        ("0.1; 1", "numbers separated by commas"),
        ("0", "numbers above 0"),
        ("1, 1.0", "listed once"),
    ],
    "tune.clip": [("x", "numbers separated by commas"), ("inf", "numbers above 0")],
    "tune.batch-size": [("-1", "numbers above 0")],
    "tune.trials": [(-1, "greater than or equal to 0")],
    "tune.rounds": [(-1, "greater than or equal to 0")],
    "tune.seeds": [("1, 1", "listed once")],
    "tune.validation-fraction": [(0, "greater than 0"), (1, "less than 1")],
    "output.directory": None,
    "output.name": None,
    "output.resume": None,
}
CASES = [
    pytest.param(key, value, rule, id=f"{key}={value!r}")
    for key, cases in OUTSIDE.items()
    for value, rule in cases or ()
]


def refused(flat: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_flat(flat)
    return str(caught.value)


def test_every_key_has_its_boundary_cases_here() -> None:
    assert tuple(OUTSIDE) == known_keys()


@pytest.mark.parametrize(("key", "value", "rule"), CASES)
def test_a_value_outside_what_is_allowed_is_named_with_its_key_and_rule(
    key: str, value: Any, rule: str
) -> None:
    sentence = refused({key: value})
    assert sentence.startswith(f"{key} = {value!r} is not allowed: ")
    assert rule in sentence
    assert "\n" not in sentence


WRONG = {
    bool: ["true", 1, []],
    int: ["3", True, 3.5, 3.0, []],
    float: ["0.5", True, []],
    str: [True, 1.5, ["a"], {"a": 1}],
}


@pytest.mark.parametrize("key", OUTSIDE)
def test_a_value_of_another_type_is_refused(key: str) -> None:
    for value in WRONG[type(RunConfig().flat()[key])]:
        if value == 1.5 and key in ("tune.lr", "tune.clip", "tune.batch-size"):
            continue  # a list of one number
        sentence = refused({key: value})
        assert sentence.startswith(f"{key} = {value!r} is not allowed: it must be ")
        assert "\n" not in sentence


@pytest.mark.parametrize("key", OUTSIDE)
def test_a_misspelt_key_is_answered_with_the_right_one(key: str) -> None:
    wrong = key[:-1]
    assert re.search(rf"no configuration key '{wrong}': did you mean .*\b{key}\b", refused({wrong: 1}))


def test_a_key_like_no_other_is_answered_with_all_keys() -> None:
    assert f"the keys are {', '.join(known_keys())}" in refused({"zzz": 1})


def test_a_table_is_not_a_key() -> None:
    assert "no configuration key 'train'" in refused({"train": 3})


def test_a_list_is_answered_with_how_to_write_it() -> None:
    assert "a list is written as one text, 'a, b'" in refused({"audit.measures": ["update-norm"]})


def test_whole_numbers_are_good_where_fractions_are() -> None:
    assert RunConfig.from_flat({"train.lr": 1}).train.lr == 1.0
    assert type(RunConfig.from_flat({"train.lr": 1}).train.lr) is float


def test_a_list_of_one_number_may_be_a_number() -> None:
    assert ints(RunConfig.from_flat({"compare.seeds": 7}).compare.seeds) == (7,)


@pytest.mark.parametrize(
    ("flat", "sentence"),
    [
        (
            {"audit.observers": "server, oracle", "federation.engine": "deployment"},
            "audit.observers may list 'oracle' in simulation only",
        ),
        ({"train.optimizer": "adam", "train.momentum": 0.9}, "train.momentum belongs to train.optimizer"),
        (
            {"attack.names": "dlg", "attack.rounds": "1, 4", "federation.rounds": 3},
            r"attack.rounds may list rounds 1 to 3 \(federation.rounds\), got '1, 4'",
        ),
        ({"attack.names": "dlg", "attack.rounds": "0"}, "attack.rounds may list rounds 1 to 10"),
    ],
)
def test_keys_that_contradict_each_other_are_refused(flat: dict[str, Any], sentence: str) -> None:
    assert re.match(sentence, refused(flat))


def test_attack_rounds_do_not_matter_without_attacks() -> None:
    assert RunConfig.from_flat({"attack.rounds": "99"}).attack.rounds == "99"


def test_flat_keys_read_back_give_the_same_configuration() -> None:
    config = RunConfig.from_flat(
        {"seed": 3, "train.lr": 0.25, "defense.name": "dp-sgd(epsilon=8)", "audit.strict": True}
    )
    assert RunConfig.from_flat(config.flat()) == config != RunConfig()


def test_changes_give_a_checked_copy() -> None:
    config = RunConfig()
    changed = config.with_(train__batch_size=4, seed=1)
    assert (changed.train.batch_size, changed.seed) == (4, 1)
    assert config == RunConfig()
    with pytest.raises(ConfigError, match=r"train\.batch-size = 0 is not allowed"):
        config.with_(train__batch_size=0)


def test_a_configuration_cannot_be_written_into() -> None:
    with pytest.raises(ValueError, match="frozen"):
        RunConfig().train.lr = 1.0  # type: ignore[misc]


def test_the_flower_app_has_the_defaults_of_the_schema() -> None:
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    table = flatten(pyproject["tool"]["flwr"]["app"]["config"])
    defaults = RunConfig().flat()
    assert table == defaults
    assert {key: type(value) for key, value in table.items()} == {
        key: type(value) for key, value in defaults.items()
    }


def test_every_key_is_kebab_case() -> None:
    assert [key for key in known_keys() if not re.fullmatch(r"[a-z]+(\.[a-z]+(-[a-z]+)*)?", key)] == []


def test_every_section_says_what_it_is() -> None:
    assert [section.__name__ for section in Section.__subclasses__() if not section.__doc__] == []


@pytest.mark.parametrize("name", presets())
def test_every_preset_loads_and_overrides_the_defaults(name: str) -> None:
    path = presets()[name]
    written = flatten(tomllib.loads(path.read_text(encoding="utf-8")))
    assert set(written) <= set(known_keys())
    config = load_config(name)
    assert written.items() <= config.flat().items()
    assert load_config(path) == config == load_config(f"configs/{name}.toml")


def test_there_are_presets() -> None:
    assert {"quickstart", "digits"} <= set(presets())


def test_overrides_win_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("seed = 1\n[federation]\nrounds = 4\nclients = 3\n", encoding="utf-8")
    config = load_config(path, {"federation.rounds": 2})
    assert (config.seed, config.federation.clients, config.federation.rounds) == (1, 3, 2)


@pytest.mark.parametrize("source", ["nothing", "elsewhere/quickstart.toml", "configs/nothing.toml"])
def test_a_file_that_does_not_exist_is_not_replaced_by_a_preset(source: str) -> None:
    with pytest.raises(ConfigError, match=f"a TOML file or a preset's name, got '{source}': the presets are"):
        load_config(source)


@pytest.mark.parametrize("content", [b"seed = ", b"\xff"], ids=["syntax", "encoding"])
def test_a_file_that_is_not_toml_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"a configuration is TOML in UTF-8, got '.*broken\.toml'"):
        load_config(path)


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("federation.rounds=3", "federation.rounds", 3),
        ("train.lr = 0.5", "train.lr", 0.5),
        ("audit.strict=true", "audit.strict", True),
        ("attack.rounds=1,5", "attack.rounds", "1,5"),
        ("data.name='digits'", "data.name", "digits"),
        ("defense.name=dp-sgd(epsilon=8)", "defense.name", "dp-sgd(epsilon=8)"),
        ("attack.names=", "attack.names", ""),
    ],
)
def test_an_override_is_a_key_and_a_typed_value(text: str, key: str, value: object) -> None:
    assert parse_override(text) == (key, value)
    assert type(parse_override(text)[1]) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("federation.rounds", "an override is written key=value, got 'federation.rounds'"),
        ("=3", "an override is written key=value"),
        ("audit.measures=['a']", "must be a scalar, got .*: write lists as 'a,b'"),
        ("seed=2020-01-01", "must be a scalar"),
    ],
)
def test_an_override_of_another_form_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_override(text)


@pytest.mark.parametrize("text", ["", "1", " 3, 1 ,2"])
def test_whole_numbers_keep_their_order(text: str) -> None:
    assert ints(text) == tuple(int(piece) for piece in text.replace(" ", "").split(",") if piece)
