"""What a comparison varies beside defenses and seeds: the text `compare.vary`, read into combinations.

    data.name: digits | patches; train.batch-size: 8 | 32

Keys are separated by ``;``, a key from its values by ``:``, values by ``|``; the product of all is compared.
A value is what a command-line override takes: TOML, or plain text if it is not. One that holds ``|`` or
``;``, or begins or ends with a space, is put in quotes, TOML's ``"..."`` or ``'...'``; inside a value that
does not begin with a quote, quotes mean nothing. It is one text because Flower's run configuration holds
scalars only.
"""

from collections.abc import Mapping
from itertools import product

from fedaudit.errors import ConfigError
from fedaudit.spec import Scalar

_FORBIDDEN = {
    "seed": "compare.seeds lists the seeds",
    "defense.name": "compare.defenses lists the defenses",
    "output.": "a comparison gives every run a folder of its own",
    "compare.": "it says what a comparison is",
    "calibrate.": "it changes nothing in a comparison",
}


def split_vary(text: str) -> dict[str, tuple[str, ...]]:
    """The keys and the text of each of their values, quotes kept.

    Raises:
        ConfigError: if the text does not follow the grammar above.

    >>> split_vary('data.name: digits | patches; train.lr: 0.1 | 1')
    {'data.name': ('digits', 'patches'), 'train.lr': ('0.1', '1')}
    """
    found: dict[str, tuple[str, ...]] = {}
    for clause in _split(text, ";"):
        if not clause.strip():
            continue  # a text may end in ';'
        key, colon, values = clause.partition(":")
        key = key.strip()
        if not colon or not key:
            raise ConfigError(
                f"a varied key is written 'key: value | value', got {clause.strip()!r}: "
                "write e.g. 'train.batch-size: 8 | 32'"
            )
        if key in found:
            raise ConfigError(f"a key is varied once, got {key} twice: list all its values together")
        found[key] = tuple(value.strip() for value in _split(values, "|"))
        if not all(found[key]):
            raise ConfigError(
                f"every varied value is written out, got an empty one for {key} in {clause.strip()!r}: "
                "remove the '|' beside it, or write an empty text as ''"
            )
    return found


def _split(text: str, separator: str) -> list[str]:
    """Pieces between separators that stand outside a quoted value."""
    pieces, quote, escaped = [""], "", False
    opens = True  # a quote opens at the start of a value only
    for character in text:
        if quote:
            if character == quote and not escaped:
                quote = ""
            escaped = quote == '"' and character == "\\" and not escaped
        elif opens and character in "\"'":
            quote = character
        elif character == separator:
            pieces.append("")
        if character == separator and not quote:
            opens = True
            continue
        opens = not quote and (character in "|;:" or (opens and character.isspace()))
        pieces[-1] += character
    if quote:
        raise ConfigError(f"a quoted value ends with its quote, got {text!r}: add the missing {quote}")
    return pieces


def refusal(key: str) -> str:
    """Why a key cannot be varied; empty if it can.

    >>> refusal("seed"), refusal("train.lr")
    ('compare.seeds lists the seeds', '')
    """
    return next(
        (
            why
            for name, why in _FORBIDDEN.items()
            if key == name or (name[-1] == "." and key.startswith(name))
        ),
        "",
    )


def combinations(varied: Mapping[str, tuple[Scalar, ...]]) -> list[dict[str, Scalar]]:
    """Every combination of one value per key, the last key changing fastest; one empty one without keys.

    >>> combinations({"a": (1, 2), "b": (3,)})
    [{'a': 1, 'b': 3}, {'a': 2, 'b': 3}]
    """
    return [dict(zip(varied, values, strict=True)) for values in product(*varied.values())]


def label(values: Mapping[str, object]) -> str:
    """A combination as people read it; empty for no keys.

    >>> label({"data.name": "digits", "audit.strict": True})
    'data.name = digits, audit.strict = true'
    """
    return ", ".join(f"{key} = {written(value)}" for key, value in values.items())


def written(value: object) -> str:
    """A value of the configuration as TOML has it, texts without quotes."""
    return str(value).lower() if isinstance(value, bool) else str(value)
