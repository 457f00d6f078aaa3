"""Which clients hold many examples with an attribute, by the updates a run kept: inferred, and the truth."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch

from fedaudit.attacks.attribute import AttributeInference
from fedaudit.attacks.roc import auc
from fedaudit.errors import ConfigError, RecordError
from fedaudit.inference.shadow_updates import infer_attribute
from fedaudit.measures.attributes import check_attribute, has_attribute, latent_attribute
from fedaudit.measures.cohort import same_weights
from fedaudit.offline.attacks import recorded_updates, setup_of
from fedaudit.records import Run

AVERAGED = 0
"""Stands for the round of log odds that were averaged over rounds."""


@dataclass(frozen=True)
class Inferred:
    """What was inferred of each client, and how well.

    Attributes:
        attribute: as written.
        clients: one row per round and client: "round", "client", "examples", "log-odds" (that the attribute
            is frequent; above 0 for yes), "share" (the oracle's: of its examples that have it), "frequent"
            (whether that share is above the middle of the shadows' two shares).
        rounds: one row per round, and one of round 0 for the mean log odds where there are several: "round",
            "clients", "with" (clients where it is frequent), "auc" of the log odds for those, its "auc-low"
            and "auc-high", "shadow-auc" (on the observer's own validation shadows), "dims", "penalty",
            "reason" (why there is no area).
        low: share of examples with the attribute in half of the shadows.
        high: share in the others.
        shadows: how many were trained in each round.
    """

    attribute: str
    clients: pd.DataFrame
    rounds: pd.DataFrame
    low: float
    high: float
    shadows: int


def attribute_of_run(
    run: Run,
    attribute: str,
    rounds: Sequence[int] = (),
    *,
    shadows: int = 90,
    low: float = 0.25,
    high: float = 0.75,
    dims: int = 32,
) -> Inferred:
    """Infer an attribute of every client from its kept updates, by shadows of the server's own examples.

    The inference is the server's (`infer_attribute`); an oracle adds each client's true share to score it.
    An attribute by a median ("brightness") is above that of the reference examples, for every client alike.

    Args:
        run: a simulation run with audit.save-updates.
        attribute: "brightness", "contrast" or "label:K".
        rounds: of which rounds; empty is all that were kept.
        shadows: updates to train in each round.
        low: share of examples with the attribute in half of the shadows.
        high: share in the others.
        dims: most principal components of the shadows that the probe sees.

    Raises:
        ConfigError: if the attribute does not exist, or does not split the reference examples.
        RecordError: if the run kept no such update, has no reference data, or shadows cannot be made of it.
    """
    try:
        check_attribute(attribute)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    updates, made = recorded_updates(run, (), rounds), setup_of(run)
    reference = made.data.reference
    if reference is None:
        raise RecordError(
            "shadows are trained on reference examples, got a run without: set data.reference-fraction > 0"
        )
    try:
        having = latent_attribute(attribute, reference.x, reference.y)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    shares = {
        client: float(has_attribute(attribute, *made.client_data(client), reference.x).double().mean())
        for client in sorted({update.client_id for update in updates})
    }
    rows, told = [], []
    for number in sorted({update.round for update in updates}):
        of_round = [update for update in updates if update.round == number]
        for positions in same_weights(of_round):
            group = [of_round[place] for place in positions]
            try:
                found = infer_attribute(
                    group,
                    made.context(number),
                    having,
                    made.settings(number),
                    defense=made.defense,
                    shadows=shadows,
                    low=low,
                    high=high,
                    dims=dims,
                )
            except ValueError as error:
                raise RecordError(f"{attribute!r} cannot be inferred in round {number}: {error}") from error
            for update, odds in zip(group, found.log_odds.tolist(), strict=True):
                rows.append((number, update.client_id, update.num_examples, odds, shares[update.client_id]))
            told.append((number, found))
    columns = ["round", "client", "examples", "log-odds", "share"]
    frame = pd.DataFrame(rows, columns=columns)
    if frame["round"].nunique() > 1:
        means = frame.groupby("client", as_index=False).agg(
            {"examples": "max", "log-odds": "mean", "share": "first"}
        )
        frame = pd.concat([frame, means.assign(round=AVERAGED)[columns]], ignore_index=True)
    frame["frequent"] = frame["share"] > (low + high) / 2
    return Inferred(attribute, frame, _summary(frame, dict(told)), low, high, shadows)


def _summary(frame: pd.DataFrame, told: dict[int, AttributeInference]) -> pd.DataFrame:
    """One row per round: how the log odds order the clients."""
    rows = []
    for number, part in frame.groupby("round", sort=False):
        frequent = torch.tensor(part["frequent"].to_numpy())
        row: dict[str, float | int | str] = {
            "round": int(str(number)),
            "clients": len(part),
            "with": int(frequent.sum()),
            "auc": math.nan,
            "auc-low": math.nan,
            "auc-high": math.nan,
            "shadow-auc": math.nan,
            "dims": 0,
            "penalty": math.nan,
            "reason": "",
        }
        if bool(frequent.any()) and not bool(frequent.all()):
            area = auc(torch.tensor(part["log-odds"].to_numpy()), frequent)
            row |= {"auc": area.value, "auc-low": area.low, "auc-high": area.high}
        else:
            whose = "all" if bool(frequent.any()) else "none"
            row["reason"] = f"an area needs clients of both kinds, {whose} of {len(part)} have it frequent"
        found = told.get(int(str(number)))
        if found is not None:
            row |= {"shadow-auc": found.shadow_auc, "dims": found.dims, "penalty": found.penalty}
        rows.append(row)
    return pd.DataFrame(rows)
