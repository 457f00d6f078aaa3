"""One HTML file that shows runs side by side and opens without a network: `write_report`."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd

from fedaudit.records import Run, write_text
from fedaudit.report import markup, template, verification
from fedaudit.report.attack_section import attack_section
from fedaudit.report.disclosure import disclosed_by_client
from fedaudit.report.display import by_variation, comparison_text, count, interval, number, signed
from fedaudit.report.document import document
from fedaudit.report.evidence import Evidence, Runs, gather
from fedaudit.report.figures import by_defense, over_rounds
from fedaudit.report.findings import MAX_TOLD, findings, reading
from fedaudit.report.guarantees import NO_GUARANTEE
from fedaudit.report.heat_map import heat_map
from fedaudit.report.pareto import measured_against, pareto_points
from fedaudit.report.pareto_figure import described, pareto_figure
from fedaudit.report.provenance import audited, configuration, notices, run_list, versions
from fedaudit.report.quantities import PRIVACY, describe, with_unit
from fedaudit.report.quantities.attack import TABULATED
from fedaudit.report.seeds import defense_of, quantities_in, seed_of, shown_observer
from fedaudit.report.style import only, styles, unit_of, without_legend
from fedaudit.report.tables import comparison_table, paired_differences, problems, settings

MAX_PROBLEMS, MAX_HEAT_MAPS, TRANSPOSE_UP_TO = 200, 6, 5
MAX_TITLE, MAX_DISCLOSED = 70, 5
DISCLOSURE = (
    "Bits about whether an example is in a client's data, added up over the audited rounds by the chain rule "
    "and capped at the one bit there is to know: the bound 1/2 log2(1 + GNQ) of each round's first step. It "
    "covers an observer who is unsure of the other examples, and takes their sum as Gaussian."
)
ROLE_TITLES = {
    "utility": "Utility",
    "leakage": "Leakage",
    "attack": "Attack scores",
    "update": "Size and direction of updates",
    "cost": "Time",
}


def write_report(runs: Runs, path: str | Path) -> Path:
    """Write one self-contained HTML page about `runs` and return where it is.

    The page holds its script, style, figures and images; a content security policy in it forbids every
    network access. Runs should differ by defense and seed, and by what a comparison varied: then
    most parts are given for each variation by itself. What else differs is stated at the top.

    Args:
        runs: any number of runs, finished or not.
        path: the file to write; replaced atomically.
    """
    target = Path(path)
    write_text(target, render(runs))
    return target


def render(runs: Runs) -> str:
    """The page as text."""
    evidence = gather(runs)
    defenses = evidence.defenses

    def each(draw: Callable[[Evidence], list[str]]) -> list[str]:
        return _each_variation(evidence, draw)

    sections = {
        "audited": ("What was audited", [markup.facts(audited(evidence.runs))]),
        "findings": ("Key findings", each(lambda part: [markup.bullets(findings(part))])),
        "comparison": ("Comparison of defenses", _comparison(evidence)),
        "claims": ("What defense and strategy claim, tested", _claims(evidence)),
        "differences": ("Differences to the baseline, paired by seed", _differences(evidence)),
        "scatter": ("Utility against leakage", each(lambda part: _scatter(part, defenses))),
        "rounds": ("Over rounds", each(lambda part: _over_rounds(part.rows, defenses))),
        "clients": ("Who leaks, and when", each(lambda part: _heat_maps(part.rows, defenses))),
        "ledger": ("Membership disclosure over all rounds", each(lambda part: _disclosure(part.runs))),
        "layers": ("Which layer leaks what", each(lambda part: _layer_maps(part.layers, defenses))),
        "attacks": ("Attacks", each(lambda part: list(filter(None, [attack_section(part)])))),
        "missing": ("Skipped, failed and rejected", each(_problems)),
        "reading": ("How to read these numbers", _how_to_read(evidence)),
        "threats": ("Threat model", _threats()),
        "settings": ("Settings behind the numbers", each(_settings)),
        "configuration": ("Runs, configuration and versions", _provenance(evidence.runs)),
    }
    drawn = {name: (title, markup.section(name, title, *parts)) for name, (title, parts) in sections.items()}
    title = f"Leakage audit: {', '.join(defenses) or 'no runs'}"
    if len(title) > MAX_TITLE:
        title = f"Leakage audit of {len(defenses)} defenses"
    warnings = notices(evidence)
    notice = f'<div class="notice" role="note">{markup.bullets(warnings)}</div>' if warnings else ""
    return document(title, _subtitle(evidence), drawn, notice)


def _each_variation(evidence: Evidence, draw: Callable[[Evidence], list[str]]) -> list[str]:
    """What `draw` makes of each variation, under its name; without a name if nothing was varied."""
    parts = []
    for label, part in evidence.variations.items():
        drawn = draw(part)
        if drawn and label:
            parts.append(_variation(label))
        parts += drawn
    return parts


def _variation(label: str) -> str:
    return f'<h3 class="variation">{markup.text(label)}</h3>'


def _subtitle(evidence: Evidence) -> str:
    runs, records = evidence.runs, len(evidence.pooled)
    started = sorted(str(s) for run in runs if (s := run.info.get("run", {}).get("started")))
    when = ""
    if started:
        first, last = started[0][:16].replace("T", " "), started[-1][:16].replace("T", " ")
        when = f", started {first}" if first == last else f", started {first} to {last}"
    varied = f"{count(len(evidence.variations), 'variation')}, " if evidence.varied else ""
    return f"{varied}{count(len(runs), 'run')}, {count(records, 'record')}{when}"


def _comparison(evidence: Evidence) -> list[str]:
    parts = []
    for label, mine in by_variation(comparison_table(evidence)):
        shown = comparison_text(mine)
        parts.append(_variation(label) if label else "")
        if len(shown) <= TRANSPOSE_UP_TO:
            shown = shown.set_index("Defense").T.reset_index().rename(columns={"index": "Quantity"})
        else:  # what is the same in every row needs no column, and the table has no room for it
            same = [name for name in ("Rounds", "Seeds") if shown[name].nunique() == 1]
            extent = ", ".join(f"{name.lower()}: {shown[name].iloc[0]}" for name in same)
            parts.append(markup.paragraph(f"In all rows, {extent}.", "quiet") if same else "")
            shown = shown.drop(columns=same)
        right = [str(name) for name in shown.columns[1:]]
        parts.append(markup.table(shown, right=right, kind="comparison"))
    if not parts:
        return []
    note = (
        "Mean ± half-width of the 95 % interval over seeds. Accuracy is that of the last evaluated round; "
        "leakage is the mean over clients and audited rounds; attack scores are means over attacked updates; "
        "ε is the largest over clients and seeds. In brackets: who observed it."
    )
    return [*parts, markup.paragraph(note, "quiet"), markup.paragraph(template.INTERVALS, "quiet")]


def _claims(evidence: Evidence) -> list[str]:
    table = verification.claims_table(evidence)
    if not len(table):
        return []
    parts = []
    for defense, mine in table.groupby("defense", sort=False):
        title = f"{defense}: {verification.totals(mine)}"
        drawn = markup.table(
            verification.shown(mine), right=["Measured"], long=["Evidence"], kind="comparison"
        )
        parts += [f"<h3>{markup.text(title)}</h3>", drawn]
    return [*parts, markup.paragraph(verification.MEANING, "quiet")]


def _differences(evidence: Evidence) -> list[str]:
    frame = paired_differences(evidence, evidence.baseline)
    if not len(frame):
        return []
    baseline = str(frame["baseline"].iloc[0])
    note = f"Defense minus {baseline}, over the seeds that both were run with."
    parts = [markup.paragraph(note, "quiet"), markup.paragraph(template.BOOTSTRAP, "quiet")]
    for label, part in by_variation(frame):
        parts.append(_variation(label) if label else "")
        many = part["defense"].nunique() > MAX_TOLD  # then a click opens each
        for defense, mine in part.groupby("defense", sort=False):
            drawn = markup.table(*_differences_text(mine, baseline))
            name = markup.text(defense)
            opened = f"<details><summary>{name}</summary>{drawn}</details>"
            parts.append(opened if many else f"<h3>{name}</h3>{drawn}")
    return parts


def _differences_text(frame: pd.DataFrame, baseline: str) -> tuple[pd.DataFrame, list[str]]:
    """The table of one defense, and its columns of numbers."""
    shown = pd.DataFrame(
        {
            "Quantity": [
                with_unit(describe(q).label, u) for q, u in zip(frame["quantity"], frame["unit"], strict=True)
            ],
            "Observer": frame["observer"],
            f"Under {baseline}": frame["baseline_mean"].map(number),
            "Under the defense": frame["defense_mean"].map(number),
            "Difference": frame["difference"].map(signed),
            "95 % interval (t)": [
                interval(low, high) for low, high in zip(frame["low"], frame["high"], strict=True)
            ],
            "Bootstrap": [
                interval(low, high)
                for low, high in zip(frame["bootstrap_low"], frame["bootstrap_high"], strict=True)
            ],
            "Seeds": frame["seeds"],
            "Reading": [
                reading(*row) for row in frame[["difference", "half_width", "seeds"]].itertuples(index=False)
            ],
        }
    )
    numbers = [f"Under {baseline}", "Under the defense", "Difference", "95 % interval (t)", "Bootstrap"]
    return shown, [*numbers, "Seeds"]


def _scatter(evidence: Evidence, defenses: Sequence[str]) -> list[str]:
    panels, told = [], []
    for quantity, observer in measured_against(evidence):
        points = pareto_points(evidence, quantity, observer)
        if not len(points):
            continue
        unit = unit_of(only(evidence.values, quantity, observer))
        panels.append((quantity, observer, unit, points))
        if len(points) > 1:
            told += [f"{describe(quantity).label} ({observer}): {line}" for line in described(points)]
    if not panels:
        return []
    labels = {}
    for defense, worst in evidence.guarantees.items():
        labels[defense] = NO_GUARANTEE if worst.epsilon is None else f"ε = {worst}"
    utility = unit_of(evidence.values[evidence.values["quantity"] == "accuracy"])
    figure = pareto_figure(panels, defenses, labels, ("accuracy", utility))
    parts = [markup.plot(figure), markup.paragraph(template.FRONT, "quiet")]
    return parts + ([markup.bullets(told)] if told else [])


def _over_rounds(rows: pd.DataFrame, defenses: Sequence[str]) -> list[str]:
    measured: dict[str, list[tuple[str, pd.DataFrame]]] = {}
    for (quantity, observer), part in rows.groupby(["quantity", "observer"]):
        measured.setdefault(str(quantity), []).append((str(observer), part))
    many = len(defenses) > TRANSPOSE_UP_TO
    parts = []
    for role, title in ROLE_TITLES.items():
        plots = []
        for quantity in quantities_in(rows):
            if describe(quantity).role != role or quantity.partition(".")[2] in TABULATED:
                continue
            for observer, part in measured[quantity]:
                few = part["round"].nunique() < 3 and bool(part["client_id"].notna().all())
                draw = by_defense if few else over_rounds
                figure = draw(part, quantity, observer, defenses)
                plots.append(markup.plot(without_legend(figure) if many else figure))
        if plots:
            parts += [f"<h3>{title}</h3>", '<div class="plots">' + "\n".join(plots) + "</div>"]
    return [markup.key(styles(defenses)), *parts] if many and parts else parts


def _heat_maps(rows: pd.DataFrame, defenses: Sequence[str]) -> list[str]:
    own = rows[rows["client_id"].notna()]
    names = [
        (name, shown_observer(own, name))
        for name in quantities_in(own)
        if describe(name).role == "leakage" and own.loc[own["quantity"] == name, "round"].nunique() > 1
    ]
    plots = [markup.plot(heat_map(own, name, observer, defenses)) for name, observer in names[:MAX_HEAT_MAPS]]
    if len(names) > MAX_HEAT_MAPS:
        plots.append(markup.paragraph(f"{MAX_HEAT_MAPS} of {len(names)} measures are drawn.", "quiet"))
    return plots


def _disclosure(runs: Sequence[Run]) -> list[str]:
    frames = []
    for run in runs:
        steps = int(run.info.get("config", {}).get("train.local-steps", 0)) or None
        found = disclosed_by_client(run.records, steps)
        frames.append(found.assign(defense=defense_of(run), seed=seed_of(run)))
    frame = pd.concat(frames) if frames else pd.DataFrame()
    if not len(frame):
        return []
    worst = frame.sort_values("worst_bits", ascending=False, kind="stable").groupby("defense", sort=False)
    top = worst.head(MAX_DISCLOSED)
    shown = pd.DataFrame(
        {
            "Defense": top["defense"],
            "Seed": top["seed"],
            "Client": top["client_id"],
            "Observer": top["observer"],
            "Mean example [bits]": top["mean_bits"].map(number),
            "Worst example [bits]": top["worst_bits"].map(number),
            "Rounds": top["rounds"].astype(str) + " of " + top["rounds_joined"].astype(str),
            "Kind": top["kind"],
            "Why no upper bound": top["reason"],
        }
    ).sort_values("Defense", kind="stable")
    right = ["Mean example [bits]", "Worst example [bits]", "Rounds"]
    return [
        markup.paragraph(DISCLOSURE),
        markup.table(shown, right=right, long=["Why no upper bound"]),
        markup.paragraph(f"The {MAX_DISCLOSED} most exposed clients of each defense.", "quiet"),
    ]


def _layer_maps(rows: pd.DataFrame, defenses: Sequence[str]) -> list[str]:
    plots = []
    for name in quantities_in(rows):
        observer = shown_observer(rows, name)
        plots.append(markup.plot(heat_map(rows, name, observer, defenses, by="layer")))
    if not plots:
        return []
    note = (
        "Each map has the quantity of the same name, computed for one layer's parameters alone. Colours "
        "compare layers and rounds within a map; different quantities have different units and scales."
    )
    return [markup.paragraph(note, "quiet"), *plots]


def _problems(evidence: Evidence) -> list[str]:
    frame = problems(evidence)
    if not len(frame):
        return [markup.paragraph("Nothing was skipped, failed or rejected.")] if evidence.runs else []
    renamed = {
        "status": "Status",
        "count": "Count",
        "quantity": "Quantity",
        "observer": "Observer",
        "defense": "Defense",
        "reason": "Reason",
        "clients": "Clients",
        "first": "Client ids",
        "rounds": "Rounds",
    }
    shown = frame.head(MAX_PROBLEMS)[list(renamed)].rename(columns=renamed).fillna("")
    drawn = markup.table(shown, right=["Count", "Clients", "Rounds"], long=["Reason"])
    rest = len(frame) - MAX_PROBLEMS
    more = markup.paragraph(f"{rest} more reasons are in the records.", "quiet") if rest > 0 else ""
    totals = frame.groupby("status")["count"].sum()
    total = "; ".join(f"{name}: {n:,}" for name, n in totals.items())
    return [markup.paragraph(f"Rows without a number. {total}."), drawn, more]


def _how_to_read(evidence: Evidence) -> list[str]:
    rows, pooled = evidence.rows, evidence.pooled
    lines = []
    for name in quantities_in(rows):
        part = rows[rows["quantity"] == name]
        known = describe(name)
        words = (
            ", ".join(sorted(map(str, part[column].dropna().unique()))) for column in ("kind", "observer")
        )
        lines.append(
            (known.label, *words, known.meaning or "A measure without a description here.", known.limits)
        )
    if pooled["epsilon"].notna().any() or (pooled["quantity"] == PRIVACY).any():
        lines.append(("ε (epsilon)", "upper", "–", *template.EPSILON))
    if not lines:
        return []
    frame = pd.DataFrame(lines, columns=["Quantity", "Kind", "Observer", "What it is", "What it is not"])
    kinds = "; ".join(f"{name}: {meaning}" for name, meaning in template.KINDS)
    return [markup.table(frame, kind="reading"), markup.paragraph(f"Kinds of number. {kinds}.", "quiet")]


def _threats() -> list[str]:
    frame = pd.DataFrame(template.THREAT_MODEL, columns=["Observer", "What it sees and what its numbers are"])
    return [markup.table(frame, kind="reading")]


def _settings(evidence: Evidence) -> list[str]:
    found = settings(evidence)
    found = found[[describe(name).role != "attack" for name in found["quantity"]]]
    if not len(found):
        return []
    shown = pd.DataFrame(
        {
            "Quantity": [describe(name).label for name in found["quantity"]],
            "Observer": found["observer"],
            "Defense": found["defense"],
            "Settings and side results": found["settings"].map(markup.mapping),
        }
    )
    return [markup.table(shown, long=["Settings and side results"])]


def _provenance(runs: Sequence[Run]) -> list[str]:
    listed = run_list(runs)
    if not len(listed):
        return []
    parts = ["<h3>Runs</h3>", markup.table(listed, right=["Rounds", "Records"], long=["Run"])]
    for title, frame in (("Configuration", configuration(runs)), ("Versions", versions(runs))):
        if len(frame):
            parts += [f"<h3>{title}</h3>", markup.table(frame, long=["Value"])]
    return parts
