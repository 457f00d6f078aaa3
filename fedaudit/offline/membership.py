"""Membership of candidate examples, from the updates a run kept: every score, pooled and update by update.

The server computes the scores; that members and non-members are known is the oracle's, so this exists for
simulation runs only.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import pandas as pd
import torch

from fedaudit.attacks.membership import average_over_rounds
from fedaudit.attacks.roc import Rate, auc, true_positives_at
from fedaudit.audit.secure_sum import context_of_sum
from fedaudit.errors import RecordError
from fedaudit.federation.setup import Setup
from fedaudit.inference.candidate_scores import SCORES, Score
from fedaudit.inference.membership import FALSE_POSITIVES, MembershipInference, Scored
from fedaudit.offline.attacks import recorded_updates, setup_of
from fedaudit.records import Run
from fedaudit.types import ClientUpdate, Skip

AVERAGED = 0
"""Stands for the round of scores that were averaged over rounds."""


@dataclass(frozen=True, eq=False)
class Told:
    """What one score says of one client's candidates.

    Attributes:
        score: which.
        round: of which round's update; `AVERAGED` for the mean over all that were chosen.
        client: whose.
        found: the scores, or why there are none.
    """

    score: Score
    round: int
    client: int
    found: Scored | Skip


def membership_of_run(
    run: Run,
    scores: Sequence[Score] = SCORES,
    clients: Sequence[int] = (),
    rounds: Sequence[int] = (),
    candidates: int = 256,
) -> list[Told]:
    """Every score of every chosen client's candidates, round by round and averaged over rounds.

    Members are examples the client holds, non-members reference examples with the same shares of labels, see
    `MembershipInference`; the same ones in every round, and for every score. The comparison with other
    clients ("fedmia-...") uses all updates kept of a round, chosen or not. The average is that over rounds
    which a client took part in, if there are several; it presumes that a score has one scale in all of them.

    Args:
        run: a simulation run with audit.save-updates.
        scores: which of `SCORES`.
        clients: whose updates; empty is all.
        rounds: of which rounds; empty is all that were kept.
        candidates: largest number of members, and of non-members, per client.

    Raises:
        RecordError: if the run kept no such update, or has no configuration.
        ValueError: if a score does not exist.
    """
    chosen = {(update.round, update.client_id) for update in recorded_updates(run, clients, rounds)}
    updates, made = recorded_updates(run, (), rounds), setup_of(run)
    told = [
        each
        for score in scores
        for each in _by_round(MembershipInference(score, candidates), updates, made)
        if (each.round, each.client) in chosen
    ]
    return told + list(_averaged(told))


def _by_round(measure: MembershipInference, updates: Sequence[ClientUpdate], made: Setup) -> Iterator[Told]:
    for number in sorted({update.round for update in updates}):
        group = [update for update in updates if update.round == number]
        ctx = replace(
            made.context(number),
            round=0,  # the candidates are drawn by seed and round: the same in every round
            seed=made.config.seed,
            observer="oracle",
            evidence=made.evidence,
            num_updates=len(group),
        )
        if group[0].summed:
            ctx = context_of_sum(ctx, group[0])
        try:
            found: Sequence[Scored | Skip] = measure.scored(group, ctx)
        except ValueError as error:
            found = [Skip(str(error))] * len(group)
        for update, each in zip(group, found, strict=True):
            yield Told(measure.score, number, update.client_id, each)


def _averaged(told: Sequence[Told]) -> Iterator[Told]:
    """The mean over rounds, for each client of which several rounds have scores."""
    grouped: dict[tuple[Score, int], list[Scored]] = {}
    for each in told:
        if isinstance(each.found, Scored):
            grouped.setdefault((each.score, each.client), []).append(each.found)
    for (score, client), several in grouped.items():
        if len(several) < 2:
            continue
        inside, outside = (
            average_over_rounds([getattr(found, side)[None] for found in several])[0]
            for side in ("inside", "outside")
        )
        members = torch.arange(len(inside) + len(outside)) < len(inside)
        area = auc(torch.cat([inside, outside]), members)
        first = several[0]
        estimate = replace(first.estimate, value=area.value, low=area.low, high=area.high, extra={})
        yield Told(score, AVERAGED, client, Scored(inside, outside, first.control, estimate))


def pooled(told: Sequence[Told]) -> pd.DataFrame:
    """One row per score: all its candidates against one threshold, of single rounds and averaged over rounds.

    Intervals are bootstraps over clients where there are three or more, because one client's candidates hang
    together; of one update they are those of independent candidates; else there are none. Envelopes are means
    over updates, of single rounds only.

    Returns:
        Columns "score", "scope" ("round by round" or "mean over rounds"), "clients", "updates", "members",
        "non-members", then for "auc", "tpr-at-fpr-0.01", "tpr-at-fpr-0.001" and "control-auc" the value and
        its "-low" and "-high", "envelope-auc", "envelope-tpr-at-fpr-0.01", "envelope-tpr-at-fpr-0.001",
        "skipped" (updates) and "reason".

    Raises:
        RecordError: if no score has a number.
    """
    rows = []
    for score in dict.fromkeys(each.score for each in told):
        for scope in ("round by round", "mean over rounds"):
            mine = [
                each
                for each in told
                if each.score == score and (each.round == AVERAGED) == (scope == "mean over rounds")
            ]
            if mine:
                rows.append({"score": score, "scope": scope, **_together(mine)})
    if not any(row["updates"] for row in rows):
        reason = next((str(row["reason"]) for row in rows), "nothing was scored")
        raise RecordError(f"membership needs scores of candidates, got none: {reason}")
    return pd.DataFrame(rows)


def per_update(told: Sequence[Told]) -> pd.DataFrame:
    """One row per score, round and client, with the columns of `pooled`; round 0 is the mean over rounds."""
    return pd.DataFrame(
        [
            {"score": each.score, "round": each.round, "client": each.client, **_together([each])}
            for each in told
        ]
    ).drop(columns=["clients", "updates"])


def curve_of(told: Sequence[Told], score: str, averaged: bool) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Scores and membership of all candidates of a score, for a ROC curve; None where there are none."""
    found = [e.found for e in told if e.score == score and (e.round == AVERAGED) == averaged]
    usable = [each for each in found if isinstance(each, Scored)]
    if not usable:
        return None
    values = torch.cat([torch.cat([each.inside.double(), each.outside.double()]) for each in usable])
    members = torch.cat(
        [torch.arange(len(each.inside) + len(each.outside)) < len(each.inside) for each in usable]
    )
    return values, members


def _together(mine: Sequence[Told]) -> dict[str, float | int | str]:
    usable = [(each.client, each.found) for each in mine if isinstance(each.found, Scored)]
    reasons = [each.found.reason for each in mine if isinstance(each.found, Skip)]
    clients = {client for client, _ in usable}
    row: dict[str, float | int | str] = {
        "clients": len(clients),
        "updates": len(usable),
        "members": sum(len(found.inside) for _, found in usable),
        "non-members": sum(len(found.outside) for _, found in usable),
    }
    rates: dict[str, Rate] = {}
    if usable:
        both = [torch.cat([found.inside.double(), found.outside.double()]) for _, found in usable]
        sides = [torch.arange(len(b)) < len(found.inside) for b, (_, found) in zip(both, usable, strict=True)]
        values, members = torch.cat(both), torch.cat(sides)
        whose = torch.cat(
            [torch.full((len(b),), client) for b, (client, _) in zip(both, usable, strict=True)]
        )
        clusters = whose if len(usable) > 1 else None
        rates["auc"] = auc(values, members, clusters=clusters)
        for fpr in FALSE_POSITIVES:
            rates[f"tpr-at-fpr-{fpr:g}"] = true_positives_at(fpr, values, members, clusters=clusters)
        halves = torch.cat([found.control for _, found in usable])
        outside = torch.cat([found.outside for _, found in usable])
        own = None if clusters is None else whose[~members]
        rates["control-auc"] = auc(outside, halves, clusters=own)
        reasons += [rate.reason for rate in rates.values() if rate.reason]
    nothing = Rate(math.nan, math.nan, math.nan)
    for name in ("auc", *(f"tpr-at-fpr-{fpr:g}" for fpr in FALSE_POSITIVES), "control-auc"):
        rate = rates.get(name, nothing)
        row |= {name: rate.value, f"{name}-low": rate.low, f"{name}-high": rate.high}
    for name in ("auc", *(f"tpr-at-fpr-{fpr:g}" for fpr in FALSE_POSITIVES)):
        key = f"envelope-{name}"
        known = [float(f.estimate.extra[key]) for _, f in usable if key in f.estimate.extra]
        row[key] = sum(known) / len(known) if known else math.nan
    skipped = len(mine) - len(usable)
    return row | {"skipped": skipped, "reason": "; ".join(dict.fromkeys(reasons))}
