"""Fronts against the definition, groups of equal epsilon, and labels that cover nothing."""

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from fedaudit.records import Run
from fedaudit.report.evidence import gather
from fedaudit.report.guarantees import WorstEpsilon
from fedaudit.report.label_places import label_places
from fedaudit.report.pareto import equal_epsilon, measured_against, pareto_front, pareto_points, pareto_table
from fedaudit.report.pareto_figure import described, pareto_figure
from fedaudit.report.style import styles
from tests.report.fabricate import record
from tests.report.small import accuracy_run, write_run

MI = "mutual-information"


def naive_front(points: list[tuple[float, float]]) -> list[bool]:
    """No point is as good in both coordinates and better in one."""
    return [
        not any(q[0] <= p[0] and q[1] <= p[1] and (q[0] < p[0] or q[1] < p[1]) for q in points)
        for p in points
    ]


@pytest.mark.parametrize("seed", range(20))
def test_front_is_that_of_the_definition_with_and_without_ties(seed: int):
    draw = np.random.default_rng(seed)
    tied = [tuple(map(float, point)) for point in draw.integers(0, 6, size=(30, 2))]
    free = [tuple(map(float, point)) for point in draw.normal(size=(40, 2))]
    for points in (tied, free, tied[:1], [], [*free, (math.inf, -math.inf), (-math.inf, math.inf)]):
        assert pareto_front(points) == naive_front(points)


def test_front_moves_with_its_points():
    draw = np.random.default_rng(0)
    points = [tuple(map(float, point)) for point in draw.integers(0, 5, size=(25, 2))]
    order = draw.permutation(25)
    assert pareto_front([points[i] for i in order]) == [pareto_front(points)[i] for i in order]


def test_front_of_a_missing_number_is_an_error():
    with pytest.raises(ValueError, match="a front is of numbers, got NaN"):
        pareto_front([(0.0, math.nan)])


def _runs(folder: Path, table: dict[str, list[tuple[float, float]]]) -> list[Run]:
    """Runs by defense: (accuracy, mutual information) of each seed."""
    return [
        accuracy_run(folder, name, seed, accuracy, mutual_information=leakage)
        for name, pairs in table.items()
        for seed, (accuracy, leakage) in enumerate(pairs)
    ]


def test_points_are_means_with_their_front_and_its_steadiness(tmp_path: Path):
    table = {
        "none": [(0.9, 2.0), (0.9, 2.2)],
        "gaussian": [(0.8, 1.0), (0.8, 1.2)],
        "sign": [(0.7, 1.1), (0.85, 1.1)],  # beaten in the mean and in seed 0, not in seed 1
        "top-k": [(0.6, 3.0), (0.6, 3.0)],
    }
    points = pareto_points(gather(_runs(tmp_path, table)), MI, "server").set_index("defense")
    assert points["leakage"].to_dict() == pytest.approx(
        {"none": 2.1, "gaussian": 1.1, "sign": 1.1, "top-k": 3}
    )
    assert points.loc["gaussian", "leakage_half"] == pytest.approx(12.706 * 0.1, rel=1e-4)
    assert points["front"].to_dict() == {"none": True, "gaussian": True, "sign": False, "top-k": False}
    assert points["front_seeds"].to_dict() == {"none": 2, "gaussian": 1, "sign": 1, "top-k": 0}
    assert described(points.reset_index())[0].startswith("not beaten: gaussian (in 1 of 2 seeds); none")


def test_a_score_that_is_better_when_higher_is_turned_round(tmp_path: Path):
    runs = []
    for name, accuracy, error in (("none", 0.9, 0.1), ("sign", 0.8, 0.5), ("top-k", 0.7, 0.3)):
        rows = [record(name, name, 1, "accuracy", accuracy), record(name, name, 1, "dlg.mse", error)]
        runs.append(write_run(tmp_path, name, name, 0, rows))
    points = pareto_points(gather(runs), "dlg.mse", "server").set_index("defense")
    assert points["front"].to_dict() == {"none": True, "sign": True, "top-k": False}


def test_means_that_differ_by_rounding_are_a_tie(tmp_path: Path):
    table = {"none": [(0.1 + 0.2, 1.0)], "sign": [(0.3, 1.0)]}
    assert pareto_points(gather(_runs(tmp_path, table)), MI, "server")["front"].all()


def test_only_alike_guarantees_are_of_equal_epsilon():
    groups = equal_epsilon(
        {
            "a": WorstEpsilon(8.0, 1e-5, "example"),
            "b": WorstEpsilon(7.8, 1e-5, "example"),
            "client": WorstEpsilon(8.0, 1e-5, "client"),
            "weaker": WorstEpsilon(8.0, 1e-5, "example", adversary="outsider"),
            "looser": WorstEpsilon(8.0, 1e-3, "example"),
            "less": WorstEpsilon(7.3, 1e-5, "example"),
            "none": WorstEpsilon(),
            "partly": WorstEpsilon(8.0, 1e-5, "example", covered=1, clients=2),
            "endless": WorstEpsilon(math.inf, 1e-5, "example"),
        }
    )
    assert set(groups) == {"a", "b"}
    assert len(set(groups.values())) == 1


def test_front_at_equal_epsilon_has_only_its_group(tmp_path: Path):
    runs = []
    for name, accuracy, leakage, epsilon in (
        ("none", 0.9, 0.1, None),  # beats all
        ("dp-sgd", 0.8, 1.0, 8.0),
        ("gaussian", 0.7, 2.0, 8.1),
        ("leakage-adaptive", 0.75, 0.5, 8.0),
    ):
        privacy = {"epsilon": epsilon, "delta": 1e-5, "privacy_unit": "example"} if epsilon else {}
        rows = [
            record(name, name, 1, "accuracy", accuracy),
            record(name, name, 1, MI, leakage, client_id=0, **privacy),
        ]
        runs.append(write_run(tmp_path, name, name, 0, rows))
    points = pareto_points(gather(runs), MI, "server").set_index("defense")
    assert list(points.index[points["front"]]) == ["none"]
    assert list(points.index[points["group_front"]]) == ["dp-sgd", "leakage-adaptive"]
    assert set(points["group"]) == {"", "ε ≈ 8, example"}


def test_what_is_drawn_against_accuracy_can_be_chosen(tmp_path: Path):
    rows = [record("r", "none", 1, name, 0.5) for name in ("accuracy", MI, "membership-inference")]
    usual = gather([write_run(tmp_path / "a", "r", "none", 0, rows)])
    assert measured_against(usual) == [(MI, "server")]
    config = {"compare.against": "membership-inference"}
    chosen = gather([write_run(tmp_path / "b", "r", "none", 0, rows, config=config)])
    assert measured_against(chosen) == [("membership-inference", "server")]
    assert pareto_table(chosen)["quantity"].tolist() == ["membership-inference"]


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


@pytest.mark.parametrize("spread", [0.0, 4.0, 60.0], ids=["one place", "a cluster", "apart"])
def test_labels_cover_no_mark_and_no_other_label(spread: float):
    draw = np.random.default_rng(1)
    marks = [(float(x), float(y)) for x, y in np.array([400.0, 150.0]) + spread * draw.normal(size=(16, 2))]
    size, mark, frame = (18.0, 14.0), 13.0, (800.0, 320.0)
    places = label_places(marks, [size] * 16, mark, frame)
    labels = [(x - 9, y - 7, x + 9, y + 7) for x, y in places]
    dots = [(x - mark / 2, y - mark / 2, x + mark / 2, y + mark / 2) for x, y in marks]
    for i, label in enumerate(labels):
        assert label[0] >= 0 and label[1] >= 0 and label[2] <= frame[0] and label[3] <= frame[1]
        assert not any(_overlap(label, other) for other in [*labels[:i], *dots])
    if spread == 60.0:
        assert all(math.dist(m, p) < 60 for m, p in zip(marks, places, strict=True))


def test_a_label_avoids_lines_and_the_edge():
    place = label_places([(5.0, 95.0)], [(20.0, 12.0)], 10.0, (100.0, 100.0), [(0.0, 80.0, 100.0, 84.0)])[0]
    assert place[0] >= 10 and place[1] <= 94 and not 74 < place[1] < 90


def _figure(tmp_path: Path, names: list[str]):
    table = {name: [(0.5 + i / 100, 1.0 + i / 10), (0.52, 1.1)] for i, name in enumerate(names)}
    points = pareto_points(gather(_runs(tmp_path, table)), MI, "server")
    epsilons = dict.fromkeys(names, "ε = 7.85")
    return points, pareto_figure([(MI, "server", "nats", points)], names, epsilons)


def test_figure_puts_each_defense_at_its_means_and_writes_epsilon(tmp_path: Path):
    points, figure = _figure(tmp_path, ["none", "sign"])
    mark = next(trace for trace in figure.data if trace.meta == "sign")
    mine = points[points["defense"] == "sign"].iloc[0]
    assert (mark.x[0], mark.y[0]) == pytest.approx((mine["leakage"], mine["utility"]))
    assert mark.error_y.array[0] == pytest.approx(mine["utility_half"])
    assert mark.name == "2 · sign (ε = 7.85)"
    assert [note.text for note in figure.layout.annotations] == ["1", "2"]


def test_a_legend_names_each_entry_once_for_all_panels(tmp_path: Path):
    points, _ = _figure(tmp_path, ["none", "sign", "top-k"])
    panels = [(MI, "server", "nats", points), ("dlg.psnr", "oracle", "dB", points)]
    figure = pareto_figure(panels, ["none", "sign", "top-k"], {})
    shown = [trace.name for trace in figure.data if trace.showlegend]
    assert sorted(shown) == sorted({*shown}) and len(shown) == 4


def test_tags_in_a_defense_are_not_tags_in_the_figure(tmp_path: Path):
    points, _ = _figure(tmp_path, ["none"])
    points["defense"] = "<b>x</b>"
    figure = pareto_figure([(MI, "server", "1", points)], ["<b>x</b>"], {})
    assert "<b>" not in figure.to_json().replace("\\u003cb\\u003e", "<b>")


def test_forty_defenses_have_colours_symbols_and_dashes_of_their_own():
    looks = styles([str(i) for i in range(42)]).values()
    assert len({(look["colour"], look["symbol"]) for look in looks}) == 42
    assert len({(look["colour"], look["dash"]) for look in looks}) == 42


def test_fronts_of_no_runs_are_empty():
    assert pareto_table([]).equals(pd.DataFrame())
