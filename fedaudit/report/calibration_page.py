"""Does a measure predict the attack: the correlations as a table for the terminal and as a page."""

import math
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from rich import box
from rich.markup import escape
from rich.table import Table

from fedaudit.records import Run, write_text
from fedaudit.report import markup
from fedaudit.report.display import NOTHING, count, signed
from fedaudit.report.document import document
from fedaudit.report.provenance import configuration, run_list, versions
from fedaudit.report.style import OKABE_ITO, RULE, Figure, new_figure, safe, style_figure

SCOPES = {"overall": "all points together", "within stage": "points of one defense, seed and round"}
MEANING = (
    "Spearman's ρ between a measure and an attack's success: +1 if more measured leakage always goes with "
    "more success, 0 if it says nothing, negative if it points the wrong way. 'Overall' also counts "
    "differences between defenses and rounds; 'within stage' asks whether the measure tells clients and "
    "examples apart that are at the same stage. Intervals are 95 % bootstrap intervals over clients: they "
    "cover the chance of which clients were attacked, not another federation, model or attack."
)
VERDICTS = (
    ("predicts", "the interval lies above 0"),
    ("points the wrong way", "the interval lies below 0"),
    ("not shown", "the interval includes 0"),
)


def verdict(low: float, high: float) -> str:
    """What an interval of rho says.

    >>> verdict(0.1, 0.5), verdict(-0.2, 0.1), verdict(float("nan"), float("nan"))
    ('predicts', 'not shown', '–')
    """
    if math.isnan(low) or math.isnan(high):
        return NOTHING
    return "predicts" if low > 0 else "points the wrong way" if high < 0 else "not shown"


def table_of(correlations: pd.DataFrame) -> pd.DataFrame:
    """One row per measure and success, both scopes beside each other, as text."""
    rows = []
    for (success, measure), part in correlations.groupby(["success", "measure"], sort=False):
        row = {"Success": success, "Measure": measure}
        for scope in SCOPES:
            found = part[part["scope"] == scope].iloc[0]
            rho = float(found["rho"])
            row[f"ρ {scope}"] = NOTHING if math.isnan(rho) else signed(rho, 2)
            row[f"95 % {scope}"] = _range(float(found["low"]), float(found["high"]))
            row[f"{scope}: reading"] = verdict(found["low"], found["high"])
        row["Points"] = f"{int(part['points'].iloc[0]):,}"
        row["Clients"] = f"{int(part['clients'].iloc[0]):,}"
        rows.append(row)
    return pd.DataFrame(rows)


def _range(low: float, high: float) -> str:
    """Both ends to two decimals: a correlation has no more."""
    return NOTHING if math.isnan(low) or math.isnan(high) else f"{signed(low, 2)} to {signed(high, 2)}"


def rich_table(correlations: pd.DataFrame) -> Table:
    """The same for a terminal, one block per success."""
    shown = table_of(correlations)
    size = f"{shown['Points'].iloc[0]} points of {shown['Clients'].iloc[0]} clients" if len(shown) else ""
    table = Table(
        title="Does the measure predict the attack?",
        caption=f"Spearman's ρ (95 % interval over clients); {size or 'no points'}",
        box=box.SIMPLE_HEAD,
        title_justify="left",
        padding=(0, 1, 0, 0),
    )
    table.add_column("Measure", overflow="fold")
    for scope in SCOPES:
        table.add_column(f"ρ {scope}", justify="right", no_wrap=True)
    for success, part in shown.groupby("Success", sort=False):
        table.add_row(f"[bold]{escape(str(success))}[/bold]")
        for last, (_, row) in enumerate(part.iterrows(), 1):
            pairs = [(row[f"ρ {scope}"], row[f"95 % {scope}"]) for scope in SCOPES]
            cells = [rho if rho == NOTHING else f"{rho} ({ends})" for rho, ends in pairs]
            table.add_row(*map(escape, (f"  {row['Measure']}", *cells)), end_section=last == len(part))
    return table


def figure_of(correlations: pd.DataFrame, success: str) -> Figure:
    """Rho of every measure with one success, both scopes, with intervals."""
    part = correlations[correlations["success"] == success]
    figure = new_figure()
    places = {name: place for place, name in enumerate(part["measure"].unique())}
    for number, scope in enumerate(SCOPES):
        mine = part[part["scope"] == scope]
        figure.add_scatter(
            x=mine["rho"],
            y=[places[name] + 0.3 * number - 0.15 for name in mine["measure"]],
            customdata=mine["measure"],
            error_x={
                "array": mine["high"] - mine["rho"],
                "arrayminus": mine["rho"] - mine["low"],
                "thickness": 1.5,
                "width": 4,
            },
            mode="markers",
            marker={"color": OKABE_ITO[number], "symbol": ("circle", "diamond")[number], "size": 9},
            name=f"{scope} ({SCOPES[scope]})",
            hovertemplate="%{customdata}: %{x:.2f}<extra>" + scope + "</extra>",
        )
    note = "Spearman's ρ, 95 % bootstrap intervals over clients; the line is no association"
    style_figure(figure, f"Correlation with {success}", note, list(SCOPES), 190 + 34 * len(places))
    figure.update_xaxes(range=[-1.05, 1.05], title_text="Spearman's ρ")
    figure.update_yaxes(
        range=[len(places) - 0.5, -0.5],
        tickvals=list(places.values()),
        ticktext=[safe(str(name)) for name in places],
        automargin=True,
    )
    figure.add_vline(x=0, line={"color": RULE, "dash": "dot"})
    return figure


def write_calibration(
    runs: Sequence[Run], points: pd.DataFrame, correlations: pd.DataFrame, path: str | Path
) -> Path:
    """Write the page and return where it is.

    Args:
        runs: the runs the points come from.
        points: one row per attacked example.
        correlations: what `calibration.correlations` made of them.
        path: the file to write; replaced atomically.
    """
    shown = table_of(correlations)
    right = [n for n in map(str, shown.columns) if n.startswith(("ρ", "95", "Points", "Clients"))]
    figures = [markup.plot(figure_of(correlations, name)) for name in correlations["success"].unique()]
    readings = "; ".join(f"{name}: {meaning}" for name, meaning in VERDICTS)
    successes = points[[c for c in points if c in set(correlations["success"])]].describe().T.reset_index()
    successes = successes.rename(columns={"index": "Success", "count": "points"}).round(3)
    sections = {
        "question": (
            "What was asked",
            [markup.paragraph(MEANING), markup.paragraph(f"{readings}.", "quiet")],
        ),
        "figures": ("Correlations", figures),
        "table": ("Table", [markup.table(shown, right=right)]),
        "attacks": (
            "How the attacks did",
            [markup.table(successes.astype(str), right=list(map(str, successes.columns))[1:])],
        ),
        "runs": (
            "Runs, configuration and versions",
            [
                markup.table(frame, long=["Value"])
                for frame in (run_list(runs), configuration(runs), versions(runs))
            ],
        ),
    }
    drawn = {name: (title, markup.section(name, title, *parts)) for name, (title, parts) in sections.items()}
    subtitle = f"{count(len(runs), 'run')}, {count(len(points), 'attacked example')}"
    target = Path(path)
    write_text(target, document("Does the measure predict the attack?", subtitle, drawn))
    return target
