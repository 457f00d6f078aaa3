"""With the check on, honest federations raise an alarm in at most one of a hundred rounds."""

import pytest

from .runs import run

ROUNDS = 200
FIXED = "DifferentialPrivacyServerSideFixedClipping"
DEFENSES = {
    "steps": {"defense__name": "dp-sgd(noise-multiplier=1, epsilon=0)"},
    "updates": {"defense__name": "gaussian(clip-norm=0.1, noise-multiplier=0.5, epsilon=0)"},
    "schedule": {"defense__name": "leakage-adaptive(driver=decay, epsilon=50)"},
    "central": {"strategy__name": f"{FIXED}(noise-multiplier=0.5, clipping-norm=0.1)"},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", DEFENSES)
def test_at_most_one_of_a_hundred_honest_rounds_raises_an_alarm(tmp_path, name):
    rounds = {"federation__rounds": ROUNDS, "federation__evaluate_every": ROUNDS}
    records = run(tmp_path, **DEFENSES[name], **rounds).records
    rows = records[records["quantity"].str.startswith("verify.")]
    assert rows["round"].nunique() == ROUNDS and (rows["status"] == "ok").sum() > ROUNDS
    alarms = rows[rows["status"] == "violated"]
    if name == "central":  # Flower's wrapper does not keep what the client reports: that is no false alarm
        alarms = alarms[alarms["quantity"] != "verify.nothing-beside"]
    assert alarms["round"].nunique() <= ROUNDS // 100, alarms[["round", "quantity", "reason"]].to_string()
