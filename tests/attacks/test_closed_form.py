"""What every closed-form attack promises, whatever it inverts."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn

from fedaudit.attacks.imprint import imprint
from fedaudit.attacks.replay import gradient_residual, intercept, labels_by_slopes, layer_slopes, rounding
from fedaudit.needs import Needs
from fedaudit.registry import ATTACKS
from fedaudit.spec import parse_spec
from fedaudit.types import Attack, ClientUpdate, LocalEvidence
from tests.attacks.planted import LR, context, examples, planted, seeded, sum_loss, trained

SHAPE, CLASSES = (1, 6, 6), 4


def relu() -> nn.Module:
    return seeded(nn.Sequential(nn.Flatten(), nn.Linear(36, 48), nn.ReLU(), nn.Linear(48, CLASSES)))


def smooth() -> nn.Module:
    return seeded(nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(48, CLASSES)))


def active() -> nn.Module:
    return imprint(relu(), SHAPE, 16, torch.Generator().manual_seed(0)).double()


APPLIES: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "linear-layer": (relu, 2),
    "spear": (relu, 2),
    "r-gap": (smooth, 1),
    "imprint": (active, 2),
}
CASES = [pytest.param(name, *case, id=name) for name, case in APPLIES.items()]


@pytest.mark.parametrize(("name", "build", "batch"), CASES)
def test_an_attack_keeps_the_contract(name: str, build: Callable[[], nn.Module], batch: int) -> None:
    def forbidden(update: ClientUpdate) -> LocalEvidence:
        raise AssertionError("the attack looked at the client's data")

    attack = ATTACKS.build(parse_spec(name))
    x, y = examples(batch, SHAPE, CLASSES)
    update = planted(build, x, y)
    kept = {key: value.clone() for key, value in {**update.before, **update.delta}.items()}
    model = build()
    ctx = context(lambda: model, x, CLASSES, evidence=forbidden)
    state = torch.get_rng_state()
    found = attack.reconstruct(update, ctx)
    assert isinstance(attack, Attack)
    assert (attack.name, attack.needs) == (name, Needs.MODEL | Needs.TRAINING | Needs.SHAPE)
    assert found.x.shape == (batch, *SHAPE)
    assert (found.x.dtype, found.y.dtype, found.y.shape) == (torch.float32, torch.int64, (batch,))
    assert found.objective >= 0
    assert {"labels", "batch-size", "local-steps", "batchnorm-mode"} <= set(found.conditions)
    assert found.conditions["labels"] == "estimated"
    assert ("active" in found.conditions) is (name == "imprint")
    assert torch.allclose(found.x, attack.reconstruct(update, ctx).x, rtol=0, atol=1e-6)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, kept[key]) for key, value in {**update.before, **update.delta}.items())


@pytest.mark.parametrize(("name", "build", "batch"), CASES)
def test_an_attack_says_what_it_lacks(name: str, build: Callable[[], nn.Module], batch: int) -> None:
    attack = ATTACKS.build(parse_spec(name))
    x, y = examples(batch, SHAPE, CLASSES)
    update, ctx = planted(build, x, y), context(build, x, CLASSES)
    with pytest.raises(ValueError, match=f"{name} needs the model, the loss"):
        attack.reconstruct(update, replace(ctx, loss=None))
    with pytest.raises(ValueError, match=f"{name} needs a positive batch size, got None"):
        attack.reconstruct(update, replace(ctx, batch_size=None))
    with pytest.raises(ValueError, match="needs lr > 0 and steps > 0"):
        attack.reconstruct(update, replace(ctx, lr=0.0))
    nothing = {key: torch.zeros_like(value) for key, value in update.delta.items()}
    with pytest.raises(ValueError, match=r"zero|too small|stands above"):
        attack.reconstruct(replace(update, delta=nothing), ctx)
    kept = {
        key: value for key, value in update.delta.items() if key.split(".")[-2] not in ("0", "1", "units")
    }
    with pytest.raises(ValueError, match="needs the gradient of"):
        attack.reconstruct(replace(update, delta=kept), ctx)


def test_only_the_imprint_is_active() -> None:
    active_ones = [name for name in ATTACKS if getattr(ATTACKS.build(parse_spec(name)), "active", False)]
    assert active_ones == ["imprint"]
    assert ATTACKS["imprint"].summary.startswith("ACTIVE")


def test_the_residual_is_zero_at_the_truth_and_one_where_nothing_is_explained() -> None:
    x, y = examples(3, SHAPE, CLASSES)
    seen = intercept("test", planted(relu, x, y), context(relu, x, CLASSES), "train")
    assert gradient_residual(seen, x.double(), y) < 1e-25
    opposite = replace(seen, gradient={name: -value for name, value in seen.gradient.items()})
    assert gradient_residual(opposite, x.double(), y) == pytest.approx(4.0)


def test_labels_follow_from_the_slopes_at_any_layer() -> None:
    x, y = examples(6, SHAPE, CLASSES)
    seen = intercept("test", planted(relu, x, y), context(relu, x, CLASSES), "train")
    for layer in ("1", "3"):
        slopes = layer_slopes(seen, layer, x.double(), y)
        assert labels_by_slopes(seen, layer, x.double(), slopes).tolist() == y.tolist()
    (expected,) = torch.autograd.grad(sum_loss(seen.model(x.double()), y), seen.model[1].bias)  # type: ignore[index]
    assert torch.allclose(layer_slopes(seen, "1", x.double(), y).sum(dim=0), expected)


def test_the_stated_rounding_is_what_a_client_loses_in_float32() -> None:
    x, y = examples(4, SHAPE, CLASSES)

    def single() -> nn.Module:
        return relu().float()

    update, ctx = trained(single, x, y), context(single, x, CLASSES)
    exact = planted(single, x, y).gradient(ctx)
    for name in ("1.weight", "3.weight"):
        error = (update.gradient(ctx)[name].double() - exact[name])[exact[name] != 0]
        assert float(error.square().mean().sqrt()) == pytest.approx(rounding(update, ctx, name), rel=0.5)
    assert rounding(planted(relu, x, y), ctx, "1.weight") < 1e-15 / LR
