"""What was inferred of each client's attribute: a table for the terminal and a page."""

import math
from pathlib import Path

import pandas as pd
from rich import box
from rich.markup import escape
from rich.table import Table

from fedaudit.records import Run, write_text
from fedaudit.report import markup
from fedaudit.report.display import NOTHING, count, number, signed
from fedaudit.report.document import document
from fedaudit.report.provenance import configuration, notices, run_list, versions
from fedaudit.report.style import OKABE_ITO, RULE, SYMBOLS, Figure, new_figure, style_figure

MEANING = (
    "The server trains shadow updates on its own reference examples, half of them with the attribute rare "
    "and half with it frequent, fits a probe to them, and reads the clients' updates with it. Log odds above "
    "0 say that the attribute is frequent. Nothing of a client's data is used but for the truth beside it."
)
LIMITS = (
    "Not a bound: another probe, or more shadows, may find more. Where the attribute goes along with "
    "something else in the reference data, a class say, the probe may read that instead. The AUC orders the "
    "clients of this run by their log odds; its 95 % interval covers the choice of clients only. Shadow AUC "
    "is that of the server's own validation shadows, by which it chose the probe's penalty."
)


def rounds_table(rounds: pd.DataFrame) -> pd.DataFrame:
    """One row per round as text."""
    return pd.DataFrame(
        {
            "Round": ["mean" if r == 0 else str(r) for r in rounds["round"]],
            "Clients": rounds["clients"].astype(str),
            "With it frequent": rounds["with"].astype(str),
            "AUC": [_area(*row) for row in rounds[["auc", "auc-low", "auc-high"]].itertuples(index=False)],
            "Shadow AUC": rounds["shadow-auc"].map(lambda value: number(float(value), 3)),
        }
    )


def clients_table(clients: pd.DataFrame) -> pd.DataFrame:
    """One row per client as text: the mean over rounds, or the only round."""
    mine = _final(clients).sort_values("log-odds", ascending=False, kind="stable")
    return pd.DataFrame(
        {
            "Client": mine["client"].astype(str),
            "Examples": mine["examples"].map("{:,}".format),
            "Log odds": mine["log-odds"].map(lambda value: signed(float(value), 2)),
            "Inferred": ["frequent" if odds > 0 else "rare" for odds in mine["log-odds"]],
            "True share": mine["share"].map(lambda value: f"{100 * value:.0f} %"),
            "Truth": ["frequent" if frequent else "rare" for frequent in mine["frequent"]],
        }
    )


def rich_tables(attribute: str, clients: pd.DataFrame, rounds: pd.DataFrame) -> list[Table]:
    """Both for a terminal."""
    titles = (f"Attribute of clients: {attribute}", "What the updates say, by log odds")
    tables = []
    for title, frame in zip(titles, (rounds_table(rounds), clients_table(clients)), strict=True):
        table = Table(title=escape(title), box=box.SIMPLE_HEAD, title_justify="left", padding=(0, 1, 0, 0))
        for name in frame.columns:
            table.add_column(str(name), justify="left" if name in ("Inferred", "Truth") else "right")
        for row in frame.itertuples(index=False, name=None):
            table.add_row(*map(escape, row))
        tables.append(table)
    return tables


def figure_of(attribute: str, clients: pd.DataFrame, middle: float) -> Figure:
    """Log odds of each client over its true share."""
    mine = _final(clients)
    figure = new_figure()
    for place, (truth, word) in enumerate(((False, "rare"), (True, "frequent"))):
        part = mine[mine["frequent"] == truth]
        figure.add_scatter(
            x=part["share"],
            y=part["log-odds"],
            customdata=part["client"],
            mode="markers",
            marker={"color": OKABE_ITO[place], "symbol": SYMBOLS[place], "size": 10},
            name=f"truly {word}",
            hovertemplate="client %{customdata}: share %{x:.2f}, log odds %{y:.2f}<extra></extra>",
        )
    note = "each point is a client; above the line the server says frequent"
    style_figure(
        figure, f"Log odds and true share of {attribute}", note, ["truly rare", "truly frequent"], 420
    )
    figure.update_xaxes(title_text="Share of the client's examples with the attribute", range=[-0.03, 1.03])
    figure.update_yaxes(title_text="Log odds")
    figure.add_hline(y=0, line={"color": RULE, "dash": "dot"})
    figure.add_vline(x=middle, line={"color": RULE, "dash": "dot"})
    return figure


def write_attribute(
    run: Run,
    attribute: str,
    clients: pd.DataFrame,
    rounds: pd.DataFrame,
    shares: tuple[float, float],
    path: str | Path,
) -> Path:
    """Write the page and return where it is.

    Args:
        run: the run whose updates were read.
        attribute: as written.
        clients: `offline_attribute.Inferred.clients`.
        rounds: `offline_attribute.Inferred.rounds`.
        shares: of examples with the attribute in the two kinds of shadows.
        path: the file to write; replaced atomically.
    """
    per_round, per_client = rounds_table(rounds), clients_table(clients)
    reasons = list(dict.fromkeys(filter(None, rounds["reason"])))
    made = f"Shadows had {shares[0]:.0%} or {shares[1]:.0%} of examples with the attribute."
    sections = {
        "question": (
            "What was asked",
            [markup.paragraph(f"{MEANING} {made}"), markup.paragraph(LIMITS, "quiet")],
        ),
        "rounds": (
            "How well clients are told apart",
            [markup.table(per_round, right=list(map(str, per_round.columns))), markup.bullets(reasons)]
            if reasons
            else [markup.table(per_round, right=list(map(str, per_round.columns)))],
        ),
        "figure": ("Inferred and true", [markup.plot(figure_of(attribute, clients, sum(shares) / 2))]),
        "clients": (
            "Client by client",
            [markup.table(per_client, right=["Client", "Examples", "Log odds", "True share"])],
        ),
        "runs": (
            "Run, configuration and versions",
            [
                markup.table(frame, long=["Value"])
                for frame in (run_list([run]), configuration([run]), versions([run]))
                if len(frame)
            ],
        ),
    }
    drawn = {name: (title, markup.section(name, title, *parts)) for name, (title, parts) in sections.items()}
    warnings = [each for each in notices([run]) if each.startswith("ACTIVE")]
    notice = f'<div class="notice" role="note">{markup.bullets(warnings)}</div>' if warnings else ""
    subtitle = f"{run.name}: {count(len(_final(clients)), 'client')}"
    target = Path(path)
    write_text(target, document(f"Attribute of clients: {attribute}", subtitle, drawn, notice))
    return target


def _final(clients: pd.DataFrame) -> pd.DataFrame:
    """The mean over rounds where there is one, else the only round."""
    averaged = clients[clients["round"] == 0]
    return averaged if len(averaged) else clients


def _area(value: float, low: float, high: float) -> str:
    if math.isnan(value):
        return NOTHING
    if math.isnan(low):
        return number(value, 3)
    return f"{number(value, 3)} ({number(low, 3)} to {number(high, 3)})"
