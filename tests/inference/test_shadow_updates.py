"""Shadow updates are what a client would have sent; a server reads an attribute with them, or does not."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedaudit.attacks.roc import auc
from fedaudit.defenses.dp_sgd import DPSGD
from fedaudit.inference.shadow_updates import infer_attribute, shadow_updates
from fedaudit.training.local import TrainSettings, client_seed, plan_batches, train_locally
from fedaudit.types import ClientUpdate, RoundContext

FEATURES, CLASSES, HELD, REFERENCES, CLIENTS = 8, 3, 24, 120, 40
SETTINGS = TrainSettings(lr=0.3, batch_size=6, local_epochs=2)


def build_model() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(FEATURES, 6), nn.Tanh(), nn.Linear(6, CLASSES))


def loss(outputs: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(outputs, labels, reduction="sum")


def examples(count: int, seed: int, shift: float) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, labels of which most are 0, and an attribute that shifts two features, whatever the label."""
    generator = torch.Generator().manual_seed(seed)
    attribute = torch.arange(count) % 2 == 0
    x = torch.randn(count, FEATURES, generator=generator)
    x[:, :2] += shift * attribute[:, None]
    y = torch.randint(CLASSES, (count,), generator=generator) * (torch.rand(count, generator=generator) < 0.4)
    return x, y, attribute


def clients(shift: float) -> tuple[list[ClientUpdate], Tensor]:
    """Updates of clients, every second one with the attribute in 18 of 24 examples, others in 6."""
    before = {name: tensor.clone() for name, tensor in build_model().state_dict().items()}
    frequent = torch.arange(CLIENTS) % 2 == 1
    found = []
    for client, has in enumerate(frequent.tolist()):
        x, y, attribute = examples(60, 100 + client, shift)
        wanted = 18 if has else 6
        rows = torch.cat([attribute.nonzero()[:wanted, 0], (~attribute).nonzero()[: HELD - wanted, 0]])
        model = build_model()
        plan = plan_batches(HELD, SETTINGS, poisson=False, seed=client)
        train_locally(model, x[rows], y[rows], plan, SETTINGS)
        delta = {name: tensor.detach() - before[name] for name, tensor in model.state_dict().items()}
        found.append(ClientUpdate(client, 1, before, delta, HELD))
    return found, frequent


def context(shift: float) -> RoundContext:
    x, y, _ = examples(REFERENCES, 1, shift)
    return RoundContext(1, build_model, loss, reference=(x, y), num_updates=CLIENTS)


@pytest.mark.parametrize(("shift", "found"), [(3.0, True), (0.0, False)], ids=["planted", "absent"])
def test_an_attribute_is_read_from_updates_where_inputs_show_it(shift: float, found: bool) -> None:
    updates, truth = clients(shift)
    _, _, attribute = examples(REFERENCES, 1, shift)
    inferred = infer_attribute(updates, context(shift), attribute, SETTINGS, shadows=90)
    area = auc(inferred.log_odds, truth)
    if found:
        assert area.low > 0.7 and inferred.shadow_auc > 0.8, (area, inferred.shadow_auc)
    else:  # 20 clients against 20
        assert area.value == pytest.approx(0.5, abs=4 * math.sqrt(41 / (12 * 20 * 20)))


def test_a_shadow_is_what_a_client_with_these_examples_would_have_sent() -> None:
    ctx = context(1.0)
    assert ctx.reference is not None
    (like, *_), _ = clients(1.0)
    rows = [torch.tensor([3, 1, 4, 15]), torch.tensor([9, 2, 6, 5])]
    found = shadow_updates(like, ctx, SETTINGS, rows, seed=8)
    for number, (own, shadow) in enumerate(zip(rows, found, strict=True)):
        model = build_model()
        plan = plan_batches(4, SETTINGS, poisson=False, seed=client_seed(8, number, 1))
        train_locally(model, ctx.reference[0][own], ctx.reference[1][own], plan, SETTINGS)
        for name, tensor in model.state_dict().items():
            assert torch.allclose(shadow[name], tensor - like.before[name], atol=1e-6)


def test_a_shadow_under_a_defense_is_clipped_and_noised_as_a_client_is() -> None:
    """One step of lr * (sum of clipped gradients + noise) / batch size, almost all of it noise."""
    defense = DPSGD(noise_multiplier=50.0, epsilon=0.0, clip_norm=0.1)
    settings = TrainSettings(lr=0.5, batch_size=4, local_steps=1)
    ctx = replace(context(1.0), release=lambda _: defense.release(HELD, 4, 1))
    (like, *_), _ = clients(1.0)
    found = shadow_updates(like, ctx, settings, [torch.arange(HELD)] * 40, defense=defense)
    values = torch.stack([torch.cat([t.flatten() for t in shadow.values()]) for shadow in found])
    expected = 0.5 * 50.0 * 0.1 / 4
    assert float(values.std()) == pytest.approx(expected, rel=4 / math.sqrt(2 * values.numel()))
    plain = shadow_updates(like, ctx, settings, [torch.arange(HELD)])
    assert torch.cat([t.flatten() for t in plain[0].values()]).norm() < 0.5 * values[0].norm()


def test_what_a_shadow_needs_is_stated() -> None:
    updates, _ = clients(1.0)
    like, ctx, rows = updates[0], context(1.0), [torch.arange(4)]
    with pytest.raises(ValueError, match="needs reference examples and the loss"):
        shadow_updates(like, replace(ctx, reference=None), SETTINGS, rows)
    with pytest.raises(ValueError, match="a shadow under 'dp-sgd' needs the release"):
        shadow_updates(like, ctx, SETTINGS, rows, defense=DPSGD())
    moved = replace(like, before={name: tensor + 1 for name, tensor in like.before.items()})
    with pytest.raises(ValueError, match="started from the same weights, got 2 among 2"):
        infer_attribute([moved, updates[1]], ctx, torch.arange(REFERENCES) % 2 == 0, SETTINGS)
