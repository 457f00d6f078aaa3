"""Batches, noise and directions of gradients in coordinates, against the same in all P dimensions."""

import pytest
import torch
from torch import Tensor

from fedaudit.measures.released_directions import (
    batch_members,
    direction_features,
    noise_beside,
    second_degree_features,
)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=seeded(seed))


def test_a_batch_holds_its_example_and_others_of_the_same_part() -> None:
    parts = [torch.tensor([0, 2, 4, 6, 8]), torch.tensor([1, 3, 5]), torch.tensor([7, 9, 10, 11])]
    members = batch_members(parts, 3, seeded(0))
    assert members.sum(1).tolist() == [3.0] * 12
    assert members.diagonal().tolist() == [1.0] * 12
    for part in parts:
        outside = [i for i in range(12) if i not in part]
        assert not members[part][:, outside].any()


def test_a_batch_larger_than_a_part_is_refused() -> None:
    with pytest.raises(ValueError, match="1 to 2 examples, as many as the smallest part, got 3"):
        batch_members([torch.arange(5), torch.arange(5, 7)], 3, seeded(0))


@pytest.mark.parametrize("dimensions", [3, 5, 40], ids=["spanned", "few beside", "many beside"])
def test_noise_has_the_inner_products_of_gaussian_noise_in_all_dimensions(dimensions: int) -> None:
    """E E^T of E (m, P): mean P I, variance 2P on the diagonal and P beside it."""
    draws = 4000
    generator = seeded(0)
    grams = torch.stack(
        [e @ e.T for e in (torch.cat(noise_beside(4, 3, dimensions, generator), 1) for _ in range(draws))]
    )
    variance = dimensions * (torch.ones(4, 4) + torch.eye(4)).double()
    error = (grams.mean(0) - dimensions * torch.eye(4)) / (variance / draws).sqrt()
    assert float(error.abs().max()) < 4.5
    assert (grams.var(0) / variance - 1).abs().max() < 0.25  # six standard errors, at P = 3


def test_features_without_noise_are_projected_unit_gradients() -> None:
    rows = gaussian(12, 7, seed=0) * torch.logspace(-4, 4, 12).double()[:, None]
    fit = torch.arange(6)
    features = direction_features(rows, fit, 64, generator=seeded(0))
    unit = rows / rows.norm(dim=1, keepdim=True)
    _, _, directions = torch.linalg.svd(unit[fit] - unit[fit].mean(0), full_matrices=False)
    assert features.shape == (12, 5)  # six centred rows span five dimensions
    torch.testing.assert_close(features @ features.T, unit @ directions[:5].T @ directions[:5] @ unit.T)
    few = direction_features(rows, fit, 2, generator=seeded(0))
    torch.testing.assert_close(few.abs(), features[:, :2].abs())


def test_noisy_features_are_distributed_as_in_all_dimensions() -> None:
    """One gradient of norm 1 in P = 200 dimensions under noise of norm about 2: its mean cosine to itself."""
    P, std, repeats = 200, 0.15, 2000
    rows = torch.cat([torch.eye(3).double(), torch.eye(3).double()[:1].expand(repeats, 3)])
    features = direction_features(
        rows, torch.arange(3), 64, noise_std=std, dimensions=P, generator=seeded(0)
    )[3:]
    explicit = std * gaussian(repeats, P, seed=1)
    explicit[:, 0] += 1.0
    cosines = explicit[:, :3] / explicit.norm(dim=1, keepdim=True)
    centred = torch.eye(3).double() - 1 / 3
    basis = torch.linalg.svd(centred).Vh[:2].T
    expected = (cosines @ basis).norm(dim=1)
    found = features.norm(dim=1)
    spread = float(((expected.var() + found.var()) / repeats).sqrt())
    assert abs(float(found.mean() - expected.mean())) < 4 * spread
    assert float(found.var() / expected.var()) == pytest.approx(1.0, abs=4 * (4 / repeats) ** 0.5)


def test_held_out_rows_do_not_choose_the_directions() -> None:
    rows, fit = gaussian(20, 6, seed=0), torch.arange(10)
    changed = rows.clone()
    changed[10:] = gaussian(10, 6, seed=1)
    for dims in (2, 6):
        before = direction_features(rows, fit, dims, generator=seeded(0))
        after = direction_features(changed, fit, dims, generator=seeded(0))
        torch.testing.assert_close(before[:10], after[:10])
        first, second = (second_degree_features(f, fit, dims)[:10] for f in (before, after))
        torch.testing.assert_close(first, second)


def test_second_degree_features_are_principal_components_of_products() -> None:
    features, fit = gaussian(15, 4, seed=0), torch.arange(9)
    products = torch.einsum("ni,nj->nij", features, features).flatten(1)
    centred = products - products[fit].mean(0)
    _, _, directions = torch.linalg.svd(centred[fit], full_matrices=False)
    found = second_degree_features(features, fit, 3)
    torch.testing.assert_close(found.abs(), (centred @ directions[:3].T).abs())


def test_second_degree_features_do_not_depend_on_the_sign_of_a_gradient() -> None:
    features, fit = gaussian(15, 4, seed=0), torch.arange(9)
    signs = torch.where(torch.arange(15) % 2 == 0, 1.0, -1.0)[:, None].double()
    torch.testing.assert_close(
        second_degree_features(features, fit, 5).abs(), second_degree_features(signs * features, fit, 5).abs()
    )


def test_zero_gradients_have_zero_features() -> None:
    features = direction_features(torch.zeros(6, 3), torch.arange(3), 4, generator=seeded(0))
    assert not features.any()
    assert not second_degree_features(features, torch.arange(3), 4).any()
