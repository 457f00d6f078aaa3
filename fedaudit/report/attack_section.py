"""The page's part about attacks: conditions, and the grids of originals above reconstructions."""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from fedaudit.errors import RecordError
from fedaudit.records import Run
from fedaudit.report.display import NOTHING, count, number
from fedaudit.report.evidence import Runs, gather
from fedaudit.report.images import Array, Recorded, picture, read_recorded, recorded_files
from fedaudit.report.markup import bullets, mapping, paragraph, table, text
from fedaudit.report.quantities import describe
from fedaudit.report.quantities.attack import TABULATED
from fedaudit.report.seeds import defense_of, parse_extras, seed_of
from fedaudit.report.tables import settings

logger = logging.getLogger(__name__)
MAX_ATTACKS, MAX_PAIRS = 24, 8
CONDITIONS_NOTE = (
    "An attack's success belongs to its conditions: one local step, a small batch and known labels make "
    "inversion easy; several steps, large batches and noise make it hard. Failure of this attack does not "
    "show that another one fails. Below each image: PSNR of the recovered image, and of a uniform image that "
    "has the original's mean, which needs no attack."
)


SCORES_NOTE = (
    "Means over attacked updates; in brackets the smallest and the largest. Recovered: examples shown with "
    "more than 20 dB, of all behind the updates. Registered: at the best small shift and mirror image. "
    "Identified: reconstructions whose nearest neighbour among the candidates is the true example, beside "
    "what chance finds at most."
)
_SCORES = (
    ("psnr", "PSNR [dB]"),
    ("registered-psnr", "Registered PSNR [dB]"),
    ("ssim", "SSIM"),
    ("lpips", "LPIPS"),
    ("recovered", "Recovered"),
    ("identifiability", "Identified by pixels"),
    ("feature-identifiability", "… by features"),
    ("chance", "… by chance"),
    ("label-accuracy", "Labels"),
)
_FAVOURS = "favours-attacker"
_CARD = ("Grade", "In the attacker's favour")
_SHARES = ("recovered", "identifiability", "feature-identifiability", "label-accuracy")


def attack_section(runs: Runs) -> str:
    """Conditions and grids of all attacks; empty if no attack was run."""
    conditions = attack_conditions(runs)
    grids, notes = _grids(gather(runs).runs)
    if not len(conditions) and not grids and not notes:
        return ""
    parts = [paragraph(CONDITIONS_NOTE, "quiet")]
    scores = attack_scores(runs)
    if len(scores):
        right = [name for name in map(str, scores.columns) if name not in ("Attack", "Defense")]
        parts += ["<h3>Scores</h3>", table(scores, right=right), paragraph(SCORES_NOTE, "quiet")]
    if len(conditions):
        parts += ["<h3>Conditions</h3>", table(conditions, right=["Attacked updates"], long=["Conditions"])]
    if grids:
        parts.append("<h3>Reconstructions (top: original, below: recovered)</h3>")
        parts.append('<div class="attacks">' + "\n".join(grids) + "</div>")
    elif len(conditions):
        parts.append(paragraph("No images were kept; attack.save-images keeps them.", "quiet"))
    if notes:
        parts.append(bullets(notes))
    return "\n".join(parts)


def attack_scores(runs: Runs) -> pd.DataFrame:
    """One row per attack and defense, one column per score that was recorded; no rows without a truth."""
    rows = gather(runs).rows
    owner, score = rows["quantity"].str.partition(".")[0], rows["quantity"].str.partition(".")[2]
    rows = rows.assign(attack=owner, score=score)[score.isin([name for name, _ in _SCORES])]
    table_rows = []
    for (attack, defense), part in rows.groupby(["attack", "defense"], sort=False):
        extras = parse_extras(part["extra"])
        active = any(content.get("card-active") is True for content in extras.values())
        row = {"Attack": f"{attack} (ACTIVE)" if active else attack, "Defense": defense}
        row["Updates"] = str(int(part.groupby("score")["value"].count().max()))
        for name, heading in _SCORES:
            values = part.loc[part["score"] == name, "value"]
            if len(values):
                row[heading] = _score(values, name in _SHARES, spread=name == "psnr")
        chances = [extras[text]["chance"] for text in part["extra"] if "chance" in extras[text]]
        if chances:
            row["… by chance"] = f"{100 * sum(chances) / len(chances):.2g} %"
        table_rows.append(row)
    frame = pd.DataFrame(table_rows)
    order = [name for _, name in _SCORES if name in frame]
    return frame[["Attack", "Defense", "Updates", *order]].fillna(NOTHING) if len(frame) else frame


def _score(values: pd.Series, is_share: bool, spread: bool) -> str:
    """The mean, and the smallest and largest over updates where they are wanted."""
    if is_share:
        return f"{100 * float(values.mean()):.0f} %"
    if not spread:
        return number(float(values.mean()))
    text, low, high = (number(float(value), 1) for value in (values.mean(), values.min(), values.max()))
    return text if low == high else f"{text} ({low} to {high})"


def attack_conditions(runs: Runs) -> pd.DataFrame:
    """One row per attack and defense: how many updates were attacked and under which conditions."""
    found = settings(runs)
    own = [describe(q).role == "attack" and q.partition(".")[2] not in TABULATED for q in found["quantity"]]
    found = found[own]
    rows: dict[tuple[str, str], tuple[int, dict[str, str]]] = {}
    for _, row in found.iterrows():
        key = (str(row["quantity"]).partition(".")[0], str(row["defense"]))
        seen, words = rows.get(key, (0, {}))
        rows[key] = (max(seen, int(row["rows"])), words | row["settings"])
    table_rows = []
    for (attack, defense), (n, words) in rows.items():
        name = f"{attack} (ACTIVE)" if words.get("card-active") == "true" else attack
        favours = dict.fromkeys(filter(None, words.get(_FAVOURS, "").split(", ")))
        table_rows.append(
            (name, defense, n, words.get("grade", NOTHING), ", ".join(favours), mapping(_without_card(words)))
        )
    return pd.DataFrame(table_rows, columns=["Attack", "Defense", "Attacked updates", *_CARD, "Conditions"])


def _without_card(words: Mapping[str, Any]) -> dict[str, Any]:
    """Conditions without what stands in columns of its own, the threat card's among the attack's."""
    card = {key.removeprefix("card-"): value for key, value in words.items() if key.startswith("card-")}
    own = {key: value for key, value in words.items() if not key.startswith("card-")}
    return {key: value for key, value in sorted((card | own).items()) if key not in ("grade", _FAVOURS)}


def _grids(runs: Sequence[Run]) -> tuple[list[str], list[str]]:
    """The cards, one client's under all defenses side by side, and notes on what is not shown."""
    recorded: list[tuple[tuple[str, int, str, str, int], Run, Recorded]] = []
    notes = []
    for place, run in enumerate(runs):
        for path in recorded_files(run.path):
            try:
                images = read_recorded(path)
            except RecordError as error:
                logger.warning("%s", error)
                notes.append(f"{run.name}: {error}")
                continue
            recorded.append(((images.attack, images.round, images.client, seed_of(run), place), run, images))
    recorded.sort(key=lambda item: item[0])
    if len(recorded) > MAX_ATTACKS:
        notes.append(f"{MAX_ATTACKS} of {len(recorded)} attacked updates are shown.")
    return [_card(run, images) for _, run, images in recorded[:MAX_ATTACKS]], notes


def _pair(original: Array | None, recovered: Array, score: float, uniform: float) -> str:
    above = "" if original is None else f'<img alt="original" src="{picture(original)}">'
    caption = (
        "truth unknown" if original is None else f"{number(score, 1)} dB<br>uniform: {number(uniform, 1)} dB"
    )
    return (
        f'<figure class="pair">{above}<img alt="reconstruction" src="{picture(recovered)}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _card(run: Run, images: Recorded) -> str:
    originals = [None] * len(images.reconstruction) if images.original is None else list(images.original)
    shown = list(zip(originals, images.reconstruction, images.psnr, images.uniform_psnr, strict=True))
    pairs = [_pair(*each) for each in shown[:MAX_PAIRS]]
    finite = [score for score in images.psnr if math.isfinite(score)]
    mean = f"mean PSNR {number(sum(finite) / len(finite), 1)} dB" if finite else "PSNR undefined"
    extent = "" if len(shown) <= MAX_PAIRS else f"; {MAX_PAIRS} of {count(len(shown), 'image')} shown"
    active = " (ACTIVE)" if images.conditions.get("card-active") is True else ""
    whose = f"client {images.client}" if images.client.isdecimal() else images.client
    where = f"{images.attack}{active}, round {images.round}, {whose}, seed {seed_of(run)}; {mean}{extent}"
    own = {key: value for key, value in images.conditions.items() if not key.startswith("card-")}
    return (
        f'<div class="attack"><h4>{text(defense_of(run))}</h4>{paragraph(where, "quiet")}'
        f'<div class="pairs">{"".join(pairs)}</div>'
        f"{paragraph(mapping(own), 'quiet')}</div>"
    )
