"""The report's part about attacks: scores in a table, cards beside conditions, ACTIVE where it belongs."""

import json

from fedaudit.records import AuditLog, load_run, write_text
from fedaudit.report.attack_section import attack_conditions, attack_scores, attack_section
from tests.report.fabricate import record, run_info, toml

CARD = {
    "labels": "known",
    "card-labels": "known",
    "card-active": False,
    "grade": "favourable",
    "favours-attacker": "one local step, plain SGD",
}


def run(folder, scores, card=None, defense="none"):
    """A run whose updates scored what is listed: attack, score, value, settings of its own."""
    name = f"{defense}-seed0"
    rows = []
    for client, (attack, score, value, extra) in enumerate(scores):
        own = {**(card or CARD), **extra} if score in ("psnr", "objective") else extra
        unit = "dB" if "psnr" in score else "1"
        rows.append(
            record(
                name, defense, 1, f"{attack}.{score}", value, client_id=client, unit=unit,
                observer="oracle", extra=json.dumps(own),
            )
        )  # fmt: skip
    AuditLog(folder / name).write_round(1, rows)
    write_text(folder / name / "run.toml", toml(run_info(defense, 0, 3, 1)))
    return load_run(folder / name)


SCORES = [
    ("dlg", "psnr", 20.0, {}),
    ("dlg", "psnr", 31.0, {}),
    ("dlg", "registered-psnr", 33.25, {}),
    ("dlg", "recovered", 0.5, {"above-db": 20.0}),
    ("dlg", "identifiability", 1.0, {"chance": 0.02}),
    ("dlg", "feature-identifiability", 0.25, {"chance": 0.04}),
]


def test_each_attack_has_one_row_of_readable_scores(tmp_path):
    (row,) = attack_scores([run(tmp_path, SCORES)]).to_dict("records")
    assert row == {
        "Attack": "dlg",
        "Defense": "none",
        "Updates": "2",
        "PSNR [dB]": "25.5 (20.0 to 31.0)",
        "Registered PSNR [dB]": "33.2",
        "Recovered": "50 %",
        "Identified by pixels": "100 %",
        "… by features": "25 %",
        "… by chance": "3 %",
    }


def test_without_a_truth_there_are_no_scores_and_no_zeros(tmp_path):
    foreign = run(tmp_path, [("dlg", "objective", 0.1, {})])
    assert not len(attack_scores([foreign]))
    page = attack_section([foreign])
    assert "<h3>Scores</h3>" not in page and "<h3>Conditions</h3>" in page


def test_a_score_that_one_attack_lacks_is_a_dash(tmp_path):
    table = attack_scores([run(tmp_path, [*SCORES, ("spear", "psnr", 90.0, {})])]).set_index("Attack")
    assert table.loc["spear", "Recovered"] == "–" and table.loc["spear", "PSNR [dB]"] == "90.0"


def test_the_card_has_columns_of_its_own_and_conditions_say_nothing_twice(tmp_path):
    (row,) = attack_conditions([run(tmp_path, SCORES)]).to_dict("records")
    assert row["Grade"] == "favourable" and row["In the attacker's favour"] == "one local step, plain SGD"
    assert row["Conditions"] == "active: false; labels: known"


def test_an_active_attack_is_called_so_wherever_it_stands(tmp_path):
    active = run(tmp_path, SCORES, card={**CARD, "card-active": True})
    assert attack_scores([active])["Attack"].tolist() == ["dlg (ACTIVE)"]
    assert attack_conditions([active])["Attack"].tolist() == ["dlg (ACTIVE)"]
