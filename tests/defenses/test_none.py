import torch
from torch import nn

from fedaudit.accounting import Ledger
from fedaudit.defenses.base import Defense
from fedaudit.defenses.none import NoDefense
from fedaudit.registry import DEFENSES
from fedaudit.spec import Spec
from fedaudit.types import StepRelease


def test_no_defense_promises_nothing_and_charges_nothing():
    defense = DEFENSES.build(Spec("none"))
    assert isinstance(defense, Defense)
    assert not defense.poisson
    release = defense.release(num_examples=40, batch_size=10, planned_steps=3)
    assert release == StepRelease(None, 0.0, 0.25)
    assert defense.release(5, 10, 3).sample_rate == 1.0
    assert defense.charge(Ledger(), release, 3, 40) == Ledger()
    assert defense.guarantee(Ledger(), 40) is None


def test_no_defense_leaves_model_and_optimizer_as_they_are():
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert NoDefense().prepare(model, optimizer, StepRelease(None, 0.0, 1.0), 4, None) == (model, optimizer)


def test_a_batch_without_examples_has_zero_gradients():
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    NoDefense().empty_step(model)
    assert torch.equal(model.weight.grad, torch.zeros(2, 2))
    assert model.bias.grad is None
