"""Membership of candidate examples, score by score: a table for the terminal, and a page with ROC curves."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from rich import box
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from fedaudit.attacks.roc import roc
from fedaudit.records import Run, write_text
from fedaudit.report import markup
from fedaudit.report.display import NOTHING, count, number
from fedaudit.report.document import document
from fedaudit.report.provenance import configuration, notices, run_list, versions
from fedaudit.report.style import DASHES, OKABE_ITO, RULE, Figure, new_figure, style_figure

ENVELOPE = "Gaussian envelope"
RATES = (("auc", "AUC"), ("tpr-at-fpr-0.01", "TPR at 1 % FPR"), ("tpr-at-fpr-0.001", "TPR at 0.1 % FPR"))
MAX_UPDATES = 60
MEANING = (
    "A server scores candidate examples by the updates it received. Members are examples a client holds, "
    "non-members are reference examples that no client holds, with the members' shares of labels. AUC is the "
    "chance that a member scores above a non-member: 0.5 is guessing. TPR at 1 % FPR is the share of members "
    "that are named while at most 1 % of non-members are named wrongly."
)
LIMITS = (
    "Not a bound: another score may find more. The control compares two random halves of the non-members and "
    "must lie near 0.5. The Gaussian envelope, where a local step is clipped and noised, is what the update "
    "of one round leaves to an observer who knows all other examples; scores may exceed it by what earlier "
    "rounds left in the weights. All clients are compared with the same reference examples."
)
INTERVALS = (
    "Intervals are 95 %: a bootstrap over clients where there are three or more, of independent candidates "
    "for a single update, and missing for two clients. With fewer than about ten clients a bootstrap is too "
    "short."
)
_FLOOR = 1e-3


def table_of(pooled: pd.DataFrame) -> pd.DataFrame:
    """One row per scope and score as text, the envelope as a row of its own where noise is known."""
    rows = []
    for scope, part in pooled.groupby("scope", sort=False):
        for _, found in part.iterrows():
            row = {"Scope": scope, "Score": found["score"]}
            row |= {heading: _rate(found, name) for name, heading in RATES}
            row["Control AUC"] = _rate(found, "control-auc")
            sizes = [int(found[name]) for name in ("updates", "members", "non-members")]
            row |= dict(zip(("Updates", "Members", "Non-members"), (f"{n:,}" for n in sizes), strict=True))
            rows.append(row)
        known = part[part["envelope-auc"].notna()]
        if len(known):
            row = {"Scope": scope, "Score": ENVELOPE}
            row |= {heading: number(float(known[f"envelope-{name}"].iloc[0]), 3) for name, heading in RATES}
            rows.append(row)
    return pd.DataFrame(rows).fillna(NOTHING)


def rich_tables(pooled: pd.DataFrame) -> list[Table]:
    """One table per scope for a terminal of 80 characters: each interval below its value."""
    tables = []
    for scope, part in table_of(pooled).groupby("Scope", sort=False):
        first = part.iloc[0]
        sizes = f"{first['Updates']} updates, {first['Members']} members, {first['Non-members']} non-members"
        table = Table(
            title=f"Membership, {escape(str(scope))} ({sizes})",
            caption="95 % intervals below; 0.5 is a guess's AUC; control: two halves of the non-members",
            box=box.SIMPLE_HEAD,
            title_justify="left",
            padding=(0, 1, 0, 0),
        )
        table.add_column("Score", no_wrap=True)
        for heading in (*(heading for _, heading in RATES), "Control AUC"):
            table.add_column(heading.replace(" at ", "\nat "), justify="right", no_wrap=True)
        for _, row in part.iterrows():
            cells = [row[heading] for heading in (*(heading for _, heading in RATES), "Control AUC")]
            table.add_row(row["Score"], *(escape(_below(cell)) for cell in cells))
        tables.append(table)
    return tables


def _below(cell: str) -> str:
    """A value's interval in a line of its own."""
    return cell.replace(" (", "\n").replace(" to ", "–").removesuffix(")")


def figure_of(curves: Mapping[str, tuple[Tensor, Tensor]], pooled: pd.DataFrame, title: str) -> Figure:
    """ROC curves of several scores on logarithmic axes, where few false positives can be seen.

    Args:
        curves: scores of all candidates and whether each is a member, by score.
        pooled: the rows of the same scope, for the envelope.
        title: of the figure.
    """
    figure = new_figure()
    grid = np.geomspace(_FLOOR, 1, 120)
    figure.add_scatter(
        x=grid, y=grid, mode="lines", line={"color": RULE, "dash": "dot"}, name="guessing", hoverinfo="skip"
    )
    for place, (score, (values, members)) in enumerate(curves.items()):
        fpr, tpr = (side.numpy() for side in roc(values, members))
        shown = tpr[np.searchsorted(fpr, grid, side="right") - 1]  # the best rate that keeps each FPR
        figure.add_scatter(
            x=grid,
            y=np.where(shown > 0, shown, np.nan),
            mode="lines",
            line={
                "color": OKABE_ITO[place % len(OKABE_ITO)],
                "dash": DASHES[place % len(DASHES)],
                "width": 2,
                "shape": "hv",
            },
            name=score,
            hovertemplate="FPR %{x:.3f}, TPR %{y:.3f}<extra>" + score + "</extra>",
        )
    known = pooled[pooled["envelope-auc"].notna()]
    if len(known):
        rates = [float(known[f"envelope-{name}"].iloc[0]) for name, _ in RATES[1:]]
        figure.add_scatter(
            x=[0.01, 0.001],
            y=rates,
            mode="markers",
            marker={"symbol": "star", "size": 13, "color": "#000000"},
            name=ENVELOPE,
            hovertemplate="FPR %{x}, TPR %{y:.4f}<extra>" + ENVELOPE + "</extra>",
        )
    legend = ["guessing", *curves, *([ENVELOPE] if len(known) else [])]
    note = "true against false positives, logarithmic; one threshold for all candidates"
    style_figure(figure, title, note, legend, 360 + 24 * len(legend))
    ticks = [0.001, 0.01, 0.1, 1]
    for update in (figure.update_xaxes, figure.update_yaxes):
        update(
            type="log",
            range=[math.log10(_FLOOR), 0.02],
            tickvals=ticks,
            ticktext=["0.1 %", "1 %", "10 %", "100 %"],
        )
    figure.update_xaxes(title_text="False-positive rate")
    figure.update_yaxes(title_text="True-positive rate")
    return figure


def write_membership(
    run: Run,
    pooled: pd.DataFrame,
    updates: pd.DataFrame,
    curves: Mapping[str, Mapping[str, tuple[Tensor, Tensor]]],
    path: str | Path,
) -> Path:
    """Write the page and return where it is.

    Args:
        run: the run whose updates were read.
        pooled: what `offline_membership.pooled` made of them.
        updates: what `offline_membership.per_update` made of them.
        curves: for each scope and score, scores of all candidates and whether each is a member.
        path: the file to write; replaced atomically.
    """
    shown = table_of(pooled)
    right = [str(name) for name in shown.columns if name not in ("Scope", "Score")]
    figures = [
        markup.plot(figure_of(of_scope, pooled[pooled["scope"] == scope], f"ROC, {scope}"))
        for scope, of_scope in curves.items()
    ]
    sections = {
        "question": ("What was asked", [markup.paragraph(MEANING), markup.paragraph(LIMITS, "quiet")]),
        "scores": (
            "Scores",
            [
                part
                for scope, mine in shown.groupby("Scope", sort=False)
                for part in (
                    f"<h3>{markup.text(str(scope).capitalize())}</h3>",
                    markup.table(mine.drop(columns="Scope"), right=right),
                )
            ]
            + [markup.paragraph(INTERVALS, "quiet")],
        ),
        "curves": ("ROC curves", ['<div class="plots">' + "\n".join(figures) + "</div>"] if figures else []),
        "updates": ("Update by update", _updates(updates)),
        "missing": ("What has no number", _missing(pooled)),
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
    subtitle = f"{run.name}: {count(len(updates), 'row')} of scores and updates"
    warnings = [each for each in notices([run]) if each.startswith("ACTIVE")]
    notice = f'<div class="notice" role="note">{markup.bullets(warnings)}</div>' if warnings else ""
    target = Path(path)
    write_text(target, document("Membership of candidate examples", subtitle, drawn, notice))
    return target


def _updates(updates: pd.DataFrame) -> list[str]:
    """The updates with the largest areas."""
    ranked = updates[updates["auc"].notna()].sort_values("auc", ascending=False, kind="stable")
    if not len(ranked):
        return []
    top = ranked.head(MAX_UPDATES)
    shown = pd.DataFrame(
        {
            "Score": top["score"],
            "Round": ["mean" if r == 0 else str(r) for r in top["round"]],
            "Client": top["client"].astype(str),
            **{heading: [_rate(row, name) for _, row in top.iterrows()] for name, heading in RATES},
            "Control AUC": [_rate(row, "control-auc") for _, row in top.iterrows()],
            "Envelope AUC": top["envelope-auc"].map(lambda value: number(float(value), 3)),
            "Members": top["members"].astype(str),
            "Non-members": top["non-members"].astype(str),
        }
    )
    shown = shown.loc[:, (shown != NOTHING).any()]
    right = [str(name) for name in shown.columns if name != "Score"]
    rest = len(ranked) - len(top)
    more = f" The {rest} others are in membership-updates.csv." if rest else ""
    note = f"Largest areas first: the best of many comparisons flatters.{more}"
    return [markup.table(shown, right=right), markup.paragraph(note, "quiet")]


def _missing(pooled: pd.DataFrame) -> list[str]:
    reasons: Sequence[str] = [
        f"{row['score']}, {row['scope']}: {row['reason']}." for _, row in pooled.iterrows() if row["reason"]
    ]
    return [markup.bullets(reasons)] if reasons else []


def _rate(row: "pd.Series", name: str) -> str:
    """A rate to three decimals with its interval, where there is one."""
    value, low, high = (float(row[key]) for key in (name, f"{name}-low", f"{name}-high"))
    if math.isnan(value):
        return NOTHING
    if math.isnan(low) or math.isnan(high):
        return number(value, 3)
    return f"{number(value, 3)} ({number(low, 3)} to {number(high, 3)})"
