"""What every registered attack promises, whatever it does."""

import json
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedaudit.attacks.imprint import imprint
from fedaudit.needs import Needs, missing
from fedaudit.registry import ATTACKS
from fedaudit.spec import Spec
from fedaudit.types import Attack, ClientUpdate, Reconstruction, RoundContext

SHAPE, CLASSES, LR = (1, 6, 6), 3, 0.1
SMALL = {"iterations": 20, "restarts": 2}
OPTIONS = {
    "dlg": SMALL,
    "inverting-gradients": SMALL,
    "see-through-gradients": SMALL,
    "local-steps": SMALL,
}


def plain() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(36, 40), nn.ReLU(), nn.Linear(40, CLASSES))


def chain() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(144, CLASSES)
        )


def imprinted() -> nn.Module:
    return imprint(plain(), SHAPE, 16, torch.Generator().manual_seed(0))


MODELS = {"r-gap": chain, "imprint": imprinted}


def loss(outputs: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(outputs, labels, reduction="sum")


def setting(name: str) -> tuple[Attack, ClientUpdate, RoundContext]:
    """One example, one plain step."""
    build = MODELS.get(name, plain)
    model = build()
    x, y = torch.rand(1, *SHAPE, generator=torch.Generator().manual_seed(1)), torch.tensor([1])
    gradients = torch.autograd.grad(loss(model(x), y), list(model.parameters()))
    before = {key: tensor.detach().clone() for key, tensor in model.state_dict().items()}
    delta = {key: -LR * g for (key, _), g in zip(model.named_parameters(), gradients, strict=True)}
    context = RoundContext(
        1,
        build,
        loss,
        lr=LR,
        optimizer="sgd",
        local_steps=1,
        batch_size=1,
        input_shape=SHAPE,
        num_classes=CLASSES,
    )
    attack = ATTACKS.build(Spec(name, OPTIONS.get(name, {})))
    return attack, ClientUpdate(0, 1, before, delta, 1), context


@pytest.mark.parametrize("name", list(ATTACKS))
def test_an_attack_sees_what_a_server_sees_and_says_its_conditions(name: str) -> None:
    attack, update, ctx = setting(name)
    assert isinstance(attack, Attack) and attack.name == name
    assert Needs.EVIDENCE not in attack.needs and not missing(attack.needs, ctx.known)
    found = attack.reconstruct(update, ctx)
    assert isinstance(found, Reconstruction)
    assert found.x.shape == (1, *SHAPE) and found.y.shape == (1,)
    assert bool(found.x.isfinite().all()) and math.isfinite(found.objective) and found.steps >= 0
    assert {"labels", "batch-size", "local-steps", "batchnorm-mode"} <= set(found.conditions)
    assert ("active" in found.conditions) == (name == "imprint")
    json.dumps(dict(found.conditions))


@pytest.mark.parametrize("name", list(ATTACKS))
def test_an_attack_repeats_with_its_seed_and_changes_nothing(name: str) -> None:
    attack, update, ctx = setting(name)
    kept = {key: tensor.clone() for key, tensor in update.before.items()}
    sent = {key: tensor.clone() for key, tensor in update.delta.items()}
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = attack.reconstruct(update, ctx)
    assert torch.equal(torch.get_rng_state(), state), "global random state was used"
    torch.manual_seed(2)
    second = attack.reconstruct(update, ctx)
    torch.testing.assert_close(first.x, second.x, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(update.before[key], tensor) for key, tensor in kept.items())
    assert all(torch.equal(update.delta[key], tensor) for key, tensor in sent.items())


@pytest.mark.parametrize("name", list(ATTACKS))
def test_strong_noise_makes_an_attack_fail_or_refuse(name: str) -> None:
    """The same update under noise a hundred times its size: no image comes out that is the example."""
    attack, update, ctx = setting(name)
    generator = torch.Generator().manual_seed(7)
    size = update.flat.norm() / math.sqrt(len(update.flat))
    noisy = {k: d + 100 * size * torch.randn(d.shape, generator=generator) for k, d in update.delta.items()}
    hidden = ClientUpdate(0, 1, update.before, noisy, 1)
    truth = torch.rand(1, *SHAPE, generator=torch.Generator().manual_seed(1))
    try:
        found = attack.reconstruct(hidden, ctx)
    except ValueError:
        return  # it said so
    error = (found.x.clamp(0, 1) - truth).square().mean()
    assert error > truth.var() / 2, "noise was no obstacle"
