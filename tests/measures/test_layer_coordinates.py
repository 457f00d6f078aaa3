"""Per-example gradients in few coordinates: against gradients computed one example at a time."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedaudit.measures.layer_coordinates import layer_coordinates, layer_grams, spanning_coordinates


def loss(outputs: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(outputs, labels, reduction="sum")


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 3, 3), nn.GroupNorm(1, 3), nn.Tanh(), nn.Flatten(), nn.Linear(48, 4)
        ).double()


X = torch.rand(9, 1, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
Y = torch.arange(9) % 4


def one_by_one(model: nn.Module) -> dict[str, Tensor]:
    """Gradients (n, P) of every layer, by a loop over examples."""
    rows: dict[str, list[Tensor]] = {}
    for x, y in zip(X, Y, strict=True):
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        gradients = torch.autograd.grad(loss(model(x[None]), y[None]), list(named.values()))
        of_layer: dict[str, list[Tensor]] = {}
        for name, gradient in zip(named, gradients, strict=True):
            of_layer.setdefault(name.rpartition(".")[0], []).append(gradient.flatten())
        for layer, pieces in of_layer.items():
            rows.setdefault(layer, []).append(torch.cat(pieces))
    return {layer: torch.stack(each) for layer, each in rows.items()}


@pytest.mark.parametrize("budget", [10**9, 9 * 60, 1], ids=["one pass", "two groups", "ghost kernels"])
def test_every_layer_has_the_inner_products_of_its_own_gradients(budget: int) -> None:
    model = network()
    expected = one_by_one(model)
    found = layer_grams(model, loss, X, Y, chunk=4, budget=budget)
    assert list(found) == ["0", "1", "4"]
    for layer, rows in expected.items():
        torch.testing.assert_close(found[layer], rows @ rows.T, rtol=1e-9, atol=1e-12)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_coordinates_are_the_gradients_up_to_a_rotation() -> None:
    expected = one_by_one(network())
    found = layer_coordinates(network(), loss, X, Y)
    for layer, rows in expected.items():
        mine = found.layers[layer]
        assert mine.shape == (9, min(9, found.sizes[layer]))
        torch.testing.assert_close(mine @ mine.T, rows @ rows.T, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(
            torch.linalg.svdvals(mine), torch.linalg.svdvals(rows)[: mine.shape[1]], rtol=1e-6, atol=1e-9
        )
    whole = torch.cat(list(expected.values()), 1)
    torch.testing.assert_close(found.whole @ found.whole.T, whole @ whole.T, rtol=1e-9, atol=1e-12)
    assert found.sizes == {"0": 30, "1": 6, "4": 196}


def test_clipping_scales_all_layers_of_an_example_alike() -> None:
    expected = one_by_one(network())
    norms = torch.cat(list(expected.values()), 1).norm(dim=1)
    bound = float(norms.median())
    found = layer_coordinates(network(), loss, X, Y, clip_norm=bound)
    factors = (bound / norms).clamp(max=1)
    assert 0 < int((factors < 1).sum()) < 9
    for layer, rows in expected.items():
        torch.testing.assert_close(found.layers[layer].norm(dim=1), rows.norm(dim=1) * factors)
    torch.testing.assert_close(found.whole.norm(dim=1), norms.clamp(max=bound))


def test_frozen_layers_have_no_gradient_and_stay_frozen() -> None:
    model = network()
    for parameter in model[0].parameters():  # type: ignore[index]
        parameter.requires_grad_(False)
    found = layer_coordinates(model, loss, X, Y)
    assert list(found.layers) == ["1", "4"]
    assert [p.requires_grad for p in model.parameters()] == [False, False, True, True, True, True]


def test_zero_gradients_have_no_coordinates() -> None:
    assert spanning_coordinates(torch.zeros(3, 3), 10).shape == (3, 0)
    found = layer_coordinates(network(), lambda outputs, labels: 0 * outputs.sum(), X, Y, clip_norm=1.0)
    assert found.whole.shape == (9, 0)


def test_what_is_not_finite_or_positive_is_refused() -> None:
    with pytest.raises(ValueError, match="gradients must be finite"):
        layer_coordinates(network(), lambda outputs, labels: outputs.sum() / 0.0, X, Y)
    with pytest.raises(ValueError, match=r"a clipping norm is positive, got 0\.0"):
        layer_coordinates(network(), loss, X, Y, clip_norm=0.0)
