"""What is known about a quantity by its name, whether it is listed or not.

Nothing depends on the lists but wording and order: a quantity that is in none of them is shown all the same,
described by the registry's one line if it is a registered measure.
"""

from dataclasses import replace

from fedaudit.registry import MEASURES
from fedaudit.report.quantities.attack import ATTACK
from fedaudit.report.quantities.leakage import LEAKAGE
from fedaudit.report.quantities.quantity import BOUND, LAYER, Quantity
from fedaudit.report.quantities.run import COST, UPDATE, UTILITY

_KNOWN = (*UTILITY, *LEAKAGE, *UPDATE, *ATTACK, *COST)

_BY_NAME = {known.name: known for known in _KNOWN}
_ORDER = {known.name: place for place, known in enumerate(_KNOWN)}
_ROLES = ("utility", "leakage", "attack", "update", "cost")
PRIVACY = "epsilon"
"""The quantity that is read from the columns epsilon, delta, privacy_unit and accountant instead."""


def describe(name: str) -> Quantity:
    """What is known about a quantity; one that is not listed counts as a measure of leakage.

    >>> describe("dlg.psnr").label
    'DLG: reconstruction PSNR'
    >>> describe("curvature").label
    'Curvature'
    """
    if name in _BY_NAME:
        return _BY_NAME[name]
    if name.endswith(LAYER):
        whole = describe(name.removesuffix(LAYER))
        return replace(whole, name=name, label=f"{whole.label} by layer", headline=False)
    owner, dot, score = name.partition(".")
    if dot and f"*.{score}" in _BY_NAME:
        known = _BY_NAME[f"*.{score}"]
        return replace(known, name=name, label=f"{_title(owner, short=True)}: {known.label}")
    if dot:
        label = f"{_title(owner, short=True)}: {score.replace('-', ' ')}"
        return Quantity(name, label, "attack", headline=False)
    base = name.removesuffix(BOUND)
    if base != name:
        meaning = "Upper bound in nats that goes with " + describe(base).label.lower() + "."
        return Quantity(name, f"{_title(base)} bound", wanted=-1, headline=False, meaning=meaning)
    summary = MEASURES[name].summary if name in MEASURES else ""
    meaning = f"{summary[:1].upper()}{summary[1:]}." if summary else ""
    return Quantity(name, _title(name), meaning=meaning)


def order(name: str) -> tuple[int, int, str]:
    """Sort key that puts utility before leakage before attacks, known before new."""
    known = describe(name)
    score = f"*.{name.partition('.')[2]}"
    place = _ORDER.get(name, _ORDER.get(score, len(_ORDER)))
    return _ROLES.index(known.role), place, name


def with_unit(label: str, unit: str) -> str:
    """Label and unit as on an axis; the unit "1" is left out.

    >>> with_unit("Mutual information", "nats"), with_unit("Accuracy", "1")
    ('Mutual information [nats]', 'Accuracy')
    """
    return label if unit in ("1", "") else f"{label} [{unit}]"


def _title(name: str, short: bool = False) -> str:
    words = name.replace("-", " ")
    return words.upper() if short and len(words) <= 4 else words[:1].upper() + words[1:]
