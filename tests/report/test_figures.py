"""Figures: what is drawn is what the frame says."""

import json

import numpy as np
import pandas as pd
import pytest

from fedaudit.records import Run
from fedaudit.report.figures import by_defense, over_rounds
from fedaudit.report.heat_map import heat_map
from fedaudit.report.seeds import numbers, pool
from fedaudit.report.style import is_wide, styles
from tests.report.fabricate import DP


@pytest.fixture(scope="module")
def rows(runs: list[Run]) -> pd.DataFrame:
    return numbers(pool(runs))


def _frame(values: dict[tuple[int, int], float], quantity: str = "update-norm") -> pd.DataFrame:
    return pd.DataFrame(
        {
            "defense": "none",
            "seed": "0",
            "round": [r for r, _ in values],
            "client_id": pd.array([c for _, c in values], dtype="Int64"),
            "quantity": quantity,
            "observer": "server",
            "value": list(values.values()),
            "unit": "1",
            "kind": "exact",
        }
    )


def test_line_is_the_median_and_band_the_deciles_over_clients():
    clients = np.arange(11.0)
    frame = _frame({(1, int(c)): c for c in clients})
    band, line = over_rounds(frame, "update-norm", "server", ["none"]).data
    assert list(line.y) == [5.0]
    assert list(band.y) == [9.0, 1.0]


def test_every_seed_of_a_round_quantity_is_a_line_beside_the_mean(rows: pd.DataFrame):
    figure = over_rounds(rows, "accuracy", "server", ["none", DP])
    assert sum(trace.line.width == 1 for trace in figure.data) == 4
    mean = next(t for t in figure.data if t.name == "none")
    expected = (
        rows[(rows["quantity"] == "accuracy") & (rows["defense"] == "none")].groupby("round")["value"].mean()
    )
    assert np.allclose(mean.y, expected)


def test_defense_keeps_its_colour_in_every_figure(rows: pd.DataFrame):
    colour = styles(["none", DP])[DP]["colour"]
    only = rows[rows["defense"] == DP]
    lines = over_rounds(only, "accuracy", "server", ["none", DP]).data
    assert {trace.line.color for trace in lines} == {colour}


def test_observer_and_kind_are_stated_in_the_figure(rows: pd.DataFrame):
    note = over_rounds(rows, "mutual-information", "oracle", ["none", DP]).layout.title.subtitle.text
    assert "observer: oracle" in note
    assert "lower" in note


def test_values_over_two_decades_get_a_log_axis_with_plain_numbers():
    axis = over_rounds(
        _frame({(1, c): 10.0**c for c in range(5)}), "update-norm", "server", ["none"]
    ).layout.yaxis
    assert axis.type == "log"
    assert list(axis.ticktext)[:4] == ["1", "10", "100", "1,000"]
    assert not is_wide(pd.Series([0.0, 1e6]))


def test_heat_map_shows_clients_by_round_and_leaves_gaps_blank():
    figure = heat_map(_frame({(1, 0): 1.0, (2, 0): 2.0, (2, 1): 3.0}), "update-norm", "server", ["none"])
    cells = np.array(figure.data[0].z, dtype=float)
    assert list(figure.data[0].y) == ["0", "1"]
    assert np.array_equal(cells, [[1.0, 2.0], [np.nan, 3.0]], equal_nan=True)


def test_many_clients_are_grouped_by_rank_and_nobody_is_lost():
    values = {(1, c): float(c) for c in range(1000)}
    figure = heat_map(_frame(values), "update-norm", "server", ["none"], max_rows=100)
    cells = np.array(figure.data[0].z, dtype=float)
    assert cells.shape == (100, 1)
    assert cells[0, 0] == np.mean(range(990, 1000))
    assert cells.mean() == pytest.approx(np.mean(range(1000)))
    assert figure.data[0].y[0] == "1–10"
    assert "averaged in 100 groups" in figure.layout.title.subtitle.text


def test_heat_maps_of_defenses_share_one_colour_scale(rows: pd.DataFrame):
    figure = heat_map(rows, "mutual-information", "oracle", ["none", DP])
    assert [trace.coloraxis for trace in figure.data] == ["coloraxis", "coloraxis"]
    assert figure.layout.title.subtitle.text.count("seed 0") == 1


def test_layers_keep_the_order_of_the_model_and_are_means_over_clients():
    rows = [
        (r, client, layer, value + client)
        for r in (1, 2)
        for client in (0, 2)
        for layer, value in (("stem", 5.0), ("a", 1.0), ("head", 3.0))
    ]
    frame = pd.DataFrame(rows, columns=["round", "client_id", "layer", "value"]).assign(
        defense="none", seed="0", observer="server", quantity="update-norm.layer", unit="1", kind="exact"
    )
    figure = heat_map(frame, "update-norm.layer", "server", ["none"], by="layer")
    assert list(figure.data[0].y) == ["stem", "a", "head"]
    assert np.asarray(figure.data[0].z).tolist() == [[6.0, 6.0], [2.0, 2.0], [4.0, 4.0]]
    assert figure.layout.title.text == "Update norm by layer"


def test_points_of_many_clients_are_thinned_but_keep_the_extremes():
    frame = _frame({(1, c): float(c) for c in range(5000)})
    points = by_defense(frame, "update-norm", "server", ["none"]).data[1]
    assert len(points.y) == 200
    assert (min(points.y), max(points.y)) == (0.0, 4999.0)


def test_tags_in_a_defense_are_not_tags_in_a_figure():
    frame = _frame({(1, 0): 1.0, (2, 0): 2.0}).assign(defense="<a href='x'>")
    figure = over_rounds(frame, "update-norm", "server", ["<a href='x'>"])
    assert "<a" not in json.dumps(figure.to_dict()["data"], default=str)


def test_figures_do_not_change_their_frame(rows: pd.DataFrame):
    before = rows.copy()
    heat_map(rows, "mutual-information", "oracle", ["none", DP])
    over_rounds(rows, "accuracy", "server", ["none", DP])
    pd.testing.assert_frame_equal(rows, before)
