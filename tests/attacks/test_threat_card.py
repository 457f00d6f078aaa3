"""The card's grade follows from its conditions alone, by the documented count."""

import pytest
import torch
from torch import nn

from fedaudit.attacks.threat_card import ThreatCard, threat_card
from fedaudit.types import ClientUpdate, RoundContext

USUAL = {
    "local_steps": 20,
    "local_epochs": 2,
    "batch_size": 64,
    "optimizer": "adam",
    "mode": "train",
    "batch_norm": True,
    "dropout": True,
    "labels": "estimated",
    "defense": "dp-sgd",
    "trained_rounds": 50,
}
EASIER = {
    "local_steps": 1,
    "batch_size": 8,
    "optimizer": "sgd",
    "mode": "eval",
    "labels": "known",
    "trained_rounds": 0,
    "defense": "none",
}


def test_a_usual_federation_is_realistic() -> None:
    card = ThreatCard(**USUAL)
    assert (card.favours, card.grade) == ((), "realistic")


@pytest.mark.parametrize("change", EASIER)
def test_each_favour_counts_once(change: str) -> None:
    assert len(ThreatCard(**{**USUAL, change: EASIER[change]}).favours) == 1


def test_the_grade_is_the_number_of_favours() -> None:
    names = list(EASIER)
    grades = [
        ThreatCard(**{**USUAL, **{n: EASIER[n] for n in names[:k]}}).grade for k in range(len(names) + 1)
    ]
    assert grades == ["realistic"] * 3 + ["favourable"] * 2 + ["laboratory"] * 3


def test_an_active_server_is_always_a_laboratory() -> None:
    assert ThreatCard(**USUAL, active=True).grade == "laboratory"


def test_inference_mode_without_batch_norm_or_dropout_is_no_favour() -> None:
    card = ThreatCard(**{**USUAL, "mode": "eval", "batch_norm": False, "dropout": False})
    assert card.favours == ()


def test_the_card_is_read_from_model_context_and_conditions() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout(0.5))
    update = ClientUpdate(0, 4, {}, {"w": torch.zeros(1)}, 30)
    ctx = RoundContext(4, local_epochs=2, batch_size=10, optimizer="sgd")
    card = threat_card(model, update, ctx, {"labels": "idlg", "batchnorm-mode": "eval"}, "dp-sgd(epsilon=8)")
    assert card == ThreatCard(6, 2, 10, "sgd", "eval", True, True, "estimated", "dp-sgd", 3)
    assert card.as_extra()["card-batch-norm"] is True
