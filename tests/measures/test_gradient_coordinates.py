"""Gradients in coordinates: exact basis, exact noise, nothing learned from held-out rows."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedaudit.measures.gradient_coordinates import clipped_gradients, principal_coordinates


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def decaying_rows(n: int, P: int, seed: int) -> Tensor:
    """Rows with variance 0.8^k along the k-th of P random directions."""
    generator = seeded(seed)
    directions = torch.linalg.qr(torch.randn(P, P, generator=generator)).Q
    return (torch.randn(n, P, generator=generator) * 0.8 ** (torch.arange(P) / 2)) @ directions


def whole(rows: Tensor) -> list[Tensor]:
    return [torch.ones(len(rows), dtype=torch.bool)]


def test_clipped_gradients_equal_one_backward_pass_per_example() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.BatchNorm1d(5), nn.Linear(5, 3)).eval()
    x, y = torch.randn(6, 4, generator=seeded(0)), torch.tensor([0, 1, 2, 0, 1, 2])

    def loss(outputs: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(outputs, labels, reduction="sum")

    expected = []
    for one_x, one_y in zip(x, y, strict=True):
        grads = torch.autograd.grad(loss(model(one_x[None]), one_y[None]), list(model.parameters()))
        expected.append(torch.cat([g.flatten() for g in grads]))
    plain = torch.stack(expected)
    weights = dict(model.state_dict())
    torch.testing.assert_close(clipped_gradients(model, weights, loss, x, y, None), plain)
    bound = float(plain.norm(dim=1).median())
    clipped = clipped_gradients(model, weights, loss, x, y, bound)
    torch.testing.assert_close(clipped, plain * (bound / plain.norm(dim=1, keepdim=True)).clamp(max=1))


def test_coordinates_are_products_with_an_orthonormal_basis() -> None:
    rows = decaying_rows(60, 200, 0)
    found = principal_coordinates([lambda: rows], whole(rows), 16, seeded(1))
    assert found.basis.shape == (200, 16)
    torch.testing.assert_close(found.basis.T @ found.basis, torch.eye(16), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.coordinates[0], rows @ found.basis, atol=1e-4, rtol=1e-4)


def test_noise_of_the_full_space_has_the_same_covariance_in_coordinates() -> None:
    rows = decaying_rows(60, 300, 2)
    basis = principal_coordinates([lambda: rows], whole(rows), 8, seeded(3)).basis
    n, std = 20000, 0.7
    noise = std * torch.randn(n, 300, generator=seeded(4))
    covariance = torch.cov((noise @ basis).T)
    # a sample variance has spread s^2 sqrt(2/n), a sample covariance s^2 / sqrt(n)
    assert float((covariance - std**2 * torch.eye(8)).abs().max()) < 5 * std**2 * math.sqrt(2 / n)


def test_the_basis_holds_nearly_as_much_energy_as_exact_principal_components() -> None:
    rows = decaying_rows(100, 400, 5)
    held = principal_coordinates([lambda: rows], whole(rows), 16, seeded(6)).energy([0])
    singular = torch.linalg.svdvals(rows)
    best = float(singular[:16].square().sum() / singular.square().sum())
    assert best * 0.97 < held <= best + 1e-5


def test_rows_that_are_not_marked_do_not_move_the_basis() -> None:
    rows = decaying_rows(40, 100, 7)
    mask = torch.arange(40) < 20
    changed = torch.where(mask[:, None], rows, 50 * torch.randn(40, 100, generator=seeded(8)))
    first = principal_coordinates([lambda: rows], [mask], 10, seeded(9))
    second = principal_coordinates([lambda: changed], [mask], 10, seeded(9))
    torch.testing.assert_close(first.basis, second.basis)


def test_a_block_of_large_rows_does_not_push_out_the_others() -> None:
    small, large = decaying_rows(40, 100, 10), 1e4 * decaying_rows(40, 100, 11)
    found = principal_coordinates([lambda: small, lambda: large], whole(small) + whole(large), 40, seeded(12))
    assert found.energy([0]) > 0.9
    assert found.energy([1]) > 0.9


def test_a_small_budget_keeps_fewer_directions() -> None:
    rows = decaying_rows(50, 400, 13)
    found = principal_coordinates([lambda: rows], whole(rows), 32, seeded(14), budget=400 * 5)
    assert found.sketch.shape == (400, 5)
    assert found.coordinates[0].shape == (50, 5)


@pytest.mark.parametrize("bad", [0.0, math.nan], ids=["zero", "nan"])
def test_unusable_gradients_are_refused(bad: float) -> None:
    rows = torch.full((5, 7), bad)
    with pytest.raises(ValueError, match="finite gradients of which some are not zero"):
        principal_coordinates([lambda: rows], whole(rows), 3, seeded(0))
    with pytest.raises(ValueError, match="at least one row to fit"):
        principal_coordinates([lambda: rows], [torch.zeros(5, dtype=torch.bool)], 3, seeded(0))
