"""Which defenses no other one beats on both accuracy and leakage, over all and at equal epsilon."""

import math
from collections.abc import Mapping, Sequence

import pandas as pd

from fedaudit.report.evidence import Evidence, Runs, gather
from fedaudit.report.guarantees import WorstEpsilon
from fedaudit.report.quantities import describe
from fedaudit.report.seeds import quantities_in, shown_observer, t_interval
from fedaudit.report.variations import values_of

TOLERANCE = 0.05
"""Epsilons whose ratio is at most 1 + this count as equal: noise is found by search, and steps are whole."""


def pareto_front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Which points no other point beats, where less of both coordinates is better.

    p beats q if p <= q in both coordinates and p < q in at least one; equal points do not beat each
    other. One sort: O(n log n).

    Args:
        points: pairs of finite or infinite numbers.

    Returns:
        For each point whether it is on the front.

    Raises:
        ValueError: if a coordinate is NaN.

    >>> pareto_front([(0, 2), (1, 1), (1, 1), (2, 2), (0, 3)])
    [True, True, True, False, False]
    """
    if any(math.isnan(value) for point in points for value in point):
        raise ValueError("a front is of numbers, got NaN: leave points without a number out")
    on_front = [False] * len(points)
    best, holder = math.inf, None  # least second coordinate so far, and the point that has it
    for i in sorted(range(len(points)), key=lambda i: points[i]):
        if holder is None or points[i][1] < best or points[i] == holder:
            on_front[i] = True
            best, holder = points[i][1], points[i]
    return on_front


def equal_epsilon(guarantees: Mapping[str, WorstEpsilon], tolerance: float = TOLERANCE) -> dict[str, str]:
    """Defenses whose guarantees can be compared, and the name of their group, "ε ≈ 8, example".

    A group has one unit, one adversary, deltas and epsilons within a factor of 1 + tolerance of its least
    one, and at least two members. Defenses without a guarantee for every client are in no group.

    >>> equal_epsilon({"a": WorstEpsilon(8.0, 1e-5, "example"), "b": WorstEpsilon(7.9, 1e-5, "example")})
    {'b': 'ε ≈ 8, example', 'a': 'ε ≈ 8, example'}
    """
    stated: list[tuple[str, float, float, str]] = sorted(
        (_against(worst), worst.delta or 0.0, worst.epsilon, name)
        for name, worst in guarantees.items()
        if worst.epsilon is not None and math.isfinite(worst.epsilon) and worst.covered >= worst.clients
    )
    groups: list[list[tuple[str, float, float, str]]] = []
    for entry in sorted(stated, key=lambda entry: (entry[0], entry[2], entry[1])):
        home = next((group for group in groups if _alike(group[0], entry, tolerance)), None)
        if home is None:
            groups.append([entry])
        else:
            home.append(entry)
    found: dict[str, str] = {}
    for group in groups:
        if len(group) > 1:
            middle = sorted(entry[2] for entry in group)[len(group) // 2]
            name = ", ".join(filter(None, (f"ε ≈ {middle:.3g}", group[0][0])))
            found |= {entry[3]: name for entry in group}
    return found


def _against(worst: WorstEpsilon) -> str:
    """What is hidden, and from whom if not from anyone."""
    unit = worst.unit or ""
    return f"{unit} against an {worst.adversary}" if worst.adversary else unit


def _alike(first: tuple[str, float, float, str], other: tuple[str, float, float, str], room: float) -> bool:
    near = (max(a, b) <= (1 + room) * min(a, b) for a, b in zip(first[1:3], other[1:3], strict=True))
    return first[0] == other[0] and all(near)


def measured_against(evidence: Evidence) -> list[tuple[str, str]]:
    """Quantities to set against accuracy, each with the observer that is compared.

    Those `compare.against` names; else the leakage and attack columns of the comparison table.
    """
    rows = evidence.rows
    names = quantities_in(rows)
    usual = [q for q in names if describe(q).role in ("leakage", "attack") and describe(q).headline]
    chosen = [q for q in evidence.against if q in names] or usual
    return [(name, shown_observer(rows, name)) for name in chosen]


def pareto_points(
    evidence: Evidence, quantity: str, observer: str, utility: str = "accuracy"
) -> pd.DataFrame:
    """One row per defense of one variation that has both numbers, over the seeds that have both.

    Columns: "defense", "leakage" and "utility" (means), "leakage_half", "utility_half" (t, 95 %), "group"
    (see `equal_epsilon`; "" for none), "front" (no other defense beats its means), "group_front" (none of
    its group does) and "front_seeds" (in how many seeds none beats its numbers of that seed), "seeds".

    The direction is what a deployer wants of the quantity, `quantities.Quantity.wanted`: less, unless it is
    stated that more protects better. A place on the front is a statement about means: within the
    intervals it may be chance, and front_seeds shows how steady it is.
    """
    values = evidence.values
    sign = 1.0 if describe(quantity).wanted > 0 else -1.0  # of more leakage: +1 is good
    towards = -1.0 if describe(utility).wanted >= 0 else 1.0
    ours = values[(values["quantity"] == quantity) & (values["observer"] == observer)]
    base = values.loc[values["quantity"] == utility, ["defense", "seed", "value"]]
    both = ours.merge(base, on=["defense", "seed"], suffixes=("_leakage", "_utility"))
    groups = equal_epsilon(evidence.guarantees)
    rows = []
    for defense in [name for name in evidence.defenses if (both["defense"] == name).any()]:
        mine = both[both["defense"] == defense]
        x, x_half, n = t_interval(mine["value_leakage"].to_list())
        y, y_half, _ = t_interval(mine["value_utility"].to_list())
        rows.append((defense, x, y, x_half, y_half, groups.get(defense, ""), n))
    columns = ["defense", "leakage", "utility", "leakage_half", "utility_half", "group", "seeds"]
    frame = pd.DataFrame(rows, columns=columns)
    frame["front"] = _front(frame["leakage"], frame["utility"], -sign, towards)
    frame["group_front"] = False
    for name, part in frame.groupby("group"):
        if name:
            frame.loc[part.index, "group_front"] = _front(part["leakage"], part["utility"], -sign, towards)
    wins = dict.fromkeys(frame["defense"], 0)
    for _, part in both.groupby("seed"):
        won = _front(part["value_leakage"], part["value_utility"], -sign, towards)
        for defense, first in zip(part["defense"], won, strict=True):
            wins[defense] += first
    frame["front_seeds"] = [wins[name] for name in frame["defense"]]
    return frame


def _front(leakage: pd.Series, utility: pd.Series, along: float, across: float) -> list[bool]:
    points = zip(leakage, utility, strict=True)
    return pareto_front([(_digits(along * x), _digits(across * y)) for x, y in points])


def _digits(value: float) -> float:
    """Twelve digits: means of the same numbers in another order are a tie."""
    return float(f"{value:.12g}")


def pareto_table(runs: Runs) -> pd.DataFrame:
    """`pareto_points` of every variation and quantity in one frame.

    Columns: one for every varied key, "quantity", "observer", then those of `pareto_points`.
    """
    evidence = gather(runs)
    pieces = []
    for part in evidence.variations.values():
        for quantity, observer in measured_against(part):
            points = pareto_points(part, quantity, observer)
            about = values_of(part.runs[0], evidence.varied) | {"quantity": quantity, "observer": observer}
            for place, (name, value) in enumerate(about.items()):
                points.insert(place, name, value)
            pieces.append(points)
    return pd.concat(pieces, ignore_index=True) if pieces else pd.DataFrame()
