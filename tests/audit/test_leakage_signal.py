"""What a server tells its clients comes from releases alone."""

import pandas as pd
import pytest

from fedaudit.audit.leakage_signal import LeakageSignal
from fedaudit.records import AuditRecord


def row(value, number=1, client=0, quantity="update-norm", observer="server", status="ok"):
    return AuditRecord("run", number, client, quantity, value, "1", "exact", observer, "none", status=status)


def test_the_mean_over_clients_is_told_over_its_target():
    signal = LeakageSignal("update-norm", target=2.0)
    assert signal.value is None
    signal.hear([row(3.0, client=0), row(5.0, client=1), row(100.0, quantity="update-norm.layer")])
    assert signal.value == 2.0


def test_without_a_target_a_value_is_told_over_the_mean_so_far():
    signal = LeakageSignal("update-norm")
    told = []
    for value in (4.0, 2.0, 6.0):
        signal.hear([row(value)])
        told.append(signal.value)
    assert told == [1.0, 2 / 3, 1.5]


@pytest.mark.parametrize("observer", ["client", "oracle"])
def test_what_private_examples_say_is_never_told(observer):
    signal = LeakageSignal("update-norm", target=1.0)
    signal.hear([row(3.0, observer=observer)])
    assert signal.value is None
    signal.hear([row(3.0, observer=observer), row(7.0)])
    assert signal.value == 7.0


def test_a_round_without_the_quantity_leaves_the_last_value_standing():
    signal = LeakageSignal("update-norm", target=1.0)
    signal.hear([row(3.0)])
    for missing in ([], [row(None, status="skipped")], [row(float("nan"))], [row(9.0, status="failed")]):
        signal.hear(missing)
        assert signal.value == 3.0


def test_a_mean_that_is_not_positive_tells_nothing():
    signal = LeakageSignal("mutual-information")
    signal.hear([row(-0.1, quantity="mutual-information")])
    assert signal.value is None


def test_recalled_records_say_what_was_heard():
    rounds = [
        [row(1 / 3 * k * (1 + c), k, c) for c in range(3)] + [row(9.0, k, 0, observer="oracle")]
        for k in (1, 2, 3)
    ]
    heard, recalled = LeakageSignal("update-norm"), LeakageSignal("update-norm")
    for rows in rounds:
        heard.hear(rows)
    recalled.recall(pd.DataFrame([vars(record) for rows in rounds for record in rows]))
    assert recalled.value == heard.value == pytest.approx(1.5)
