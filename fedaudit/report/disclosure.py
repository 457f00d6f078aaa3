"""What a run's records say about membership, added up over its rounds for each client."""

import math
from typing import Any

import pandas as pd

from fedaudit.report.seeds import parse_extras

QUANTITY = "example-gradient-uniqueness"
COLUMNS = (
    *("run_id", "observer", "client_id", "rounds", "rounds_joined", "rounds_in_run"),
    *("mean_nats", "mean_bits", "worst_nats", "worst_bits", "cap_nats", "kind", "reason"),
)
CAP = math.log(2)  # entropy of membership with a fair prior, the largest there is


def disclosed_by_client(records: pd.DataFrame, local_steps: int | None = None) -> pd.DataFrame:
    """Membership information of each client's examples over the rounds of a run, in nats and bits.

    Sums the bounds of the measure "example-gradient-uniqueness" over the rounds that have one: the mean over
    examples, sum_r mean_i min(H, 1/2 ln(1 + GNQ_ir)), which bounds the examples' mean bound from above since
    min(H, .) is concave; and the worst example, sum_r max_i, which bounds every example's sum from above.
    Both are capped at ln 2 = H(1/2), what there is to know about one membership.

    Each round's number covers the FIRST local step only. So it is an upper bound for the run (kind "upper")
    only if clients take one local step, every round the client took part in was audited on all its examples,
    and the release has noise (without, the ridge stands for uncertainty that an observer may not have). Else
    kind is "estimate" and "reason" says why; unaudited steps add to what is disclosed. A client that both
    measured itself and was measured by the oracle has a row for each.

    Args:
        records: audit records, as `load_run(...).records` has them.
        local_steps: how many local steps clients take in a round; None if that is not known.

    Returns:
        One row per run, observer and client, with COLUMNS. rounds are those with a bound, rounds_joined those
        with any record of the client, rounds_in_run those of the run.

    Raises:
        ValueError: if local_steps is not positive.
    """
    if local_steps is not None and local_steps < 1:
        raise ValueError(f"clients take at least one local step, got {local_steps}: give 1 or more, or None")
    trained = records[records["round"] >= 1]
    rows = trained[(trained["quantity"] == QUANTITY) & (trained["status"] == "ok")]
    extras = parse_extras(rows["extra"])
    bounded = {text for text, extra in extras.items() if {"bound-nats", "bound-nats-max"} <= extra.keys()}
    rows = rows[rows["extra"].isin(bounded)]
    found = []
    for (run_id, observer, client), own in rows.groupby(["run_id", "observer", "client_id"]):
        of_run = trained[trained["run_id"] == run_id]
        joined = of_run.loc[
            (of_run["client_id"] == client) & (of_run["status"] != "rejected"), "round"
        ].nunique()
        stated = [extras[text] for text in own["extra"]]
        mean, worst = (sum(float(extra[key]) for extra in stated) for key in ("bound-nats", "bound-nats-max"))
        mean, worst = min(mean, CAP), min(worst, CAP)
        reason = "; ".join(_reasons(own, stated, joined, local_steps))
        rounds = (own["round"].nunique(), joined, of_run["round"].nunique())
        sums = (mean, mean / math.log(2), worst, worst / math.log(2))
        kind = "estimate" if reason else "upper"
        found.append((run_id, observer, client, *rounds, *sums, CAP, kind, reason))
    return pd.DataFrame(found, columns=list(COLUMNS))


def _reasons(own: pd.DataFrame, stated: list[Any], joined: int, local_steps: int | None) -> list[str]:
    """Why the sums are no upper bound for the run."""
    audited = own["round"].nunique()
    checks = {
        "the number of local steps is not known, the first is covered": local_steps is None,
        f"the first of {local_steps} local steps is covered": (local_steps or 1) > 1,
        f"{audited} of {joined} rounds were audited": audited < joined,
        "not all examples were measured": bool((own["kind"] != "exact").any()),
        "releases without noise: the ridge stands for uncertainty an observer may not have": not all(
            str(extra.get("ridge-rule", "")).startswith("noise") for extra in stated
        ),
    }
    return [reason for reason, holds in checks.items() if holds]
