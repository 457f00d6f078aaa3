"""Attribute inference from updates whose attribute is planted, or absent."""

import math

import pytest
import torch
from torch import Tensor

from fedaudit.attacks.attribute import AttributeInference, attribute_inference, prevalence_batches
from fedaudit.attacks.roc import auc

SHAPES = {"0.weight": (6, 5), "0.bias": (6,), "2.weight": (3, 6), "2.bias": (3,)}
Updates = list[dict[str, Tensor]]


def planted(count: int, strength: float, seed: int) -> tuple[Updates, Tensor]:
    """Random updates; where the attribute is frequent, a fixed direction of the last layer is added."""
    generator = torch.Generator().manual_seed(seed)
    direction = torch.randn(SHAPES["2.weight"], generator=torch.Generator().manual_seed(99))
    frequent = torch.arange(count) % 2 == 1
    updates = []
    for has in frequent.tolist():
        update = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
        update["0.weight"] *= 1000  # a loud layer that says nothing
        update["2.weight"] += strength * has * direction
        updates.append(update)
    return updates, frequent


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def inferred(strength: float, seed: int, targets: Updates, dims: int = 32) -> AttributeInference:
    return attribute_inference(
        planted(60, strength, seed), planted(30, strength, seed + 1000), targets, dims=dims
    )


def test_a_planted_direction_is_read_from_updates_of_others() -> None:
    targets, truth = planted(60, 1.5, 1)
    found = inferred(1.5, 0, targets)
    assert found.log_odds.shape == (60,)
    assert auc(found.log_odds, truth).value > 0.9
    assert ((found.log_odds > 0) == truth).double().mean() > 0.8
    assert found.shadow_auc > 0.9


def test_where_nothing_is_planted_nothing_is_read() -> None:
    values = []
    for seed in range(10):
        targets, truth = planted(40, 0.0, 100 + seed)
        values.append(auc(inferred(0.0, seed, targets, dims=8).log_odds, truth).value)
    sd = math.sqrt(41 / (12 * 20 * 20) / 10)  # of the mean of ten areas of 20 against 20
    assert sum(values) / 10 == pytest.approx(0.5, abs=4 * sd)


def test_neither_the_scale_of_an_update_nor_of_a_layer_matters() -> None:
    targets, _ = planted(10, 1.0, 1)
    scaled = [{name: (7 if name[0] == "0" else 0.01) * t for name, t in u.items()} for u in targets]
    assert torch.allclose(inferred(1.0, 0, scaled).log_odds, inferred(1.0, 0, targets).log_odds, atol=1e-4)


def test_coordinates_do_not_depend_on_the_size_of_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    targets, _ = planted(10, 1.0, 1)
    plain = inferred(1.0, 0, targets, dims=10)
    monkeypatch.setattr("fedaudit.attacks.attribute.BLOCK", 250)
    small = inferred(1.0, 0, targets, dims=10)
    assert plain.dims == small.dims == 10
    assert torch.allclose(small.log_odds, plain.log_odds, atol=1e-6)


def test_updates_are_left_as_they_were() -> None:
    shadows, frequent = planted(20, 1.0, 0)
    copies = [{name: t.clone() for name, t in update.items()} for update in shadows]
    attribute_inference((shadows, frequent), (shadows, frequent), shadows[:2])
    assert all(torch.equal(u[name], c[name]) for u, c in zip(shadows, copies, strict=True) for name in c)


def test_batches_hold_the_attribute_as_often_as_asked() -> None:
    attribute = torch.arange(50) % 5 < 2  # 20 of 50
    rows, frequent = prevalence_batches(attribute, 9, 16, low=0.1, high=0.9, generator=generator())
    assert frequent.tolist() == [False, True] * 4 + [False]
    assert attribute[rows].sum(1).tolist() == [14 if has else 2 for has in frequent.tolist()]
    assert all(len(set(row.tolist())) == 16 for row in rows)
    again, _ = prevalence_batches(attribute, 9, 16, low=0.1, high=0.9, generator=generator())
    assert torch.equal(rows, again)
    assert len({tuple(row.sort().values.tolist()) for row in rows}) == 9
    place = attribute[rows[1::2]].double().mean(0)  # the attribute is not gathered at the front
    assert place[:8].mean() < 1


def test_what_cannot_be_drawn_is_refused() -> None:
    attribute = torch.arange(50) < 10
    with pytest.raises(ValueError, match="need 15 examples with the attribute and 15 without, got 10 and 40"):
        prevalence_batches(attribute, 4, 20, generator=generator())
    with pytest.raises(ValueError, match=r"rarer in one kind of batch, got 0.5 and 0.5 of 4"):
        prevalence_batches(attribute, 4, 4, low=0.5, high=0.5, generator=generator())
    with pytest.raises(ValueError, match="rarer in one kind of batch"):
        prevalence_batches(attribute, 4, 1, low=0.1, high=0.2, generator=generator())


def test_what_gives_no_probe_is_refused() -> None:
    shadows, frequent = planted(20, 1.0, 0)
    enough = shadows, frequent
    with pytest.raises(ValueError, match="5 shadows of each kind, got 20 shadows of which 4 are with"):
        attribute_inference((shadows, torch.arange(20) < 4), enough, shadows)
    with pytest.raises(ValueError, match="3 shadows of each kind, got 4 shadows of which 2 are with"):
        attribute_inference(enough, (shadows[:4], frequent[:4]), shadows)
    with pytest.raises(ValueError, match="at least 3 shadows of each kind, got 19 shadows"):
        attribute_inference(enough, (shadows[:19], frequent), shadows)
    with pytest.raises(ValueError, match="dims >= 1, got 0"):
        attribute_inference(enough, enough, shadows, dims=0)
    with pytest.raises(ValueError, match="the same parameters, got others"):
        attribute_inference(enough, enough, [{"0.weight": torch.zeros(2)}])
    broken = {name: tensor * math.nan for name, tensor in shadows[0].items()}
    with pytest.raises(ValueError, match="must be finite, got NaN"):
        attribute_inference(enough, enough, [broken])
    with pytest.raises(ValueError, match="shadows that differ, got equal ones"):
        attribute_inference(([shadows[0]] * 20, frequent), enough, shadows)
