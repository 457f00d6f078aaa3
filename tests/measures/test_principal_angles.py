"""Angles between row spaces, against scipy and against subspaces that were built to a known angle."""

import math

import pytest
import torch
from scipy.linalg import subspace_angles
from torch import Tensor

import fedaudit.measures.principal_angles as module
from fedaudit.measures.principal_angles import (
    grassmann_distance,
    principal_angles,
    projection_distance,
    random_halves_null,
)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=seeded(seed))


def at_angles(angles: list[float], P: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Orthonormal rows (k, P) of two subspaces with exactly these principal angles."""
    k = len(angles)
    basis = torch.linalg.qr(gaussian(P, 2 * k, seed=seed)).Q.T
    theta = torch.tensor(angles, dtype=torch.float64)[:, None]
    return basis[:k], theta.cos() * basis[:k] + theta.sin() * basis[k:]


def test_known_angles_are_found_in_ascending_order() -> None:
    angles = [1.5, 0.3, 1e-9, 0.8]
    first, second = at_angles(angles, 40)
    mixed = gaussian(7, 4, seed=3) @ first  # other rows that span the same
    found = principal_angles(mixed, gaussian(5, 4, seed=4) @ second, 4)
    torch.testing.assert_close(
        found, torch.tensor(sorted(angles), dtype=torch.float64), rtol=1e-7, atol=1e-13
    )


@pytest.mark.parametrize("P", [6, 11, 500], ids=["fewer columns than rows", "as many", "more"])
def test_angles_of_leading_directions_agree_with_scipy(P: int) -> None:
    M0, M1 = gaussian(5, P, seed=1), gaussian(6, P, seed=2)
    bases = [torch.linalg.svd(M, full_matrices=False).Vh[:3].T.numpy() for M in (M0, M1)]
    expected = torch.from_numpy(subspace_angles(*bases).copy()).flip(0)
    torch.testing.assert_close(principal_angles(M0, M1, 3), expected, rtol=1e-9, atol=1e-12)


def test_columns_taken_in_blocks_give_the_same_angles(monkeypatch: pytest.MonkeyPatch) -> None:
    M0, M1 = gaussian(4, 301, seed=1), gaussian(5, 301, seed=2)
    whole = principal_angles(M0, M1, 3)
    monkeypatch.setattr(module, "_BLOCK", 1)
    torch.testing.assert_close(principal_angles(M0, M1, 3), whole, rtol=1e-10, atol=1e-12)


def test_distances_are_those_of_the_projections() -> None:
    first, second = at_angles([0.2, 0.7, 1.1], 30)
    angles = principal_angles(first, second, 3)
    difference = first.T @ first - second.T @ second
    assert float(projection_distance(angles)) == pytest.approx(float(difference.norm()) / math.sqrt(2))
    assert float(grassmann_distance(angles)) == pytest.approx(math.sqrt(0.2**2 + 0.7**2 + 1.1**2))


def test_the_same_subspace_is_at_distance_zero_and_orthogonal_ones_are_furthest() -> None:
    first, second = at_angles([math.pi / 2] * 3, 30)
    assert float(grassmann_distance(principal_angles(first, -2 * first, 3))) < 1e-14
    furthest = float(grassmann_distance(principal_angles(first, second, 3)))
    assert furthest == pytest.approx(math.pi / 2 * math.sqrt(3))


def test_more_dimensions_than_the_rows_span_are_refused() -> None:
    M = gaussian(5, 2, seed=0) @ gaussian(2, 20, seed=1)
    with pytest.raises(ValueError, match="k=3 dimensions needs rows that span as many, got 2"):
        principal_angles(M, gaussian(5, 20, seed=2), 3)
    with pytest.raises(ValueError, match="needs rows that span as many, got 0"):
        principal_angles(torch.zeros(3, 4), torch.ones(3, 4), 1)
    with pytest.raises(
        ValueError, match=r"rows of one length are compared, got shapes \(5, 20\) and \(5, 21\)"
    ):
        principal_angles(torch.ones(5, 20), torch.ones(5, 21), 1)


def test_halves_are_disjoint_and_of_the_size_asked_for() -> None:
    drawn = module.disjoint_pools(11, 5, 50, seeded(0))
    assert drawn.shape == (50, 2, 5)
    assert all(len(set(each.flatten().tolist())) == 10 for each in drawn)
    assert set(drawn.flatten().tolist()) == set(range(11))


def test_halves_of_fewer_rows_are_further_apart() -> None:
    """Why a null must have as many rows as what it is compared with."""
    M = gaussian(120, 3, seed=0) @ gaussian(3, 50, seed=1) + gaussian(120, 50, seed=2)
    many, spread = random_halves_null(M, 3, 60, 20, seeded(0))
    few, _ = random_halves_null(M, 3, 10, 20, seeded(0))
    assert few > many + 4 * spread


def test_the_null_repeats_with_its_seed_and_needs_enough_rows() -> None:
    M = gaussian(12, 300, seed=0)
    assert random_halves_null(M, 2, 6, 5, seeded(1)) == random_halves_null(M, 2, 6, 5, seeded(1))
    with pytest.raises(ValueError, match="two disjoint halves of 7 rows need 14, got 12"):
        random_halves_null(M, 2, 7, 5, seeded(1))
    with pytest.raises(ValueError, match="needs repetitions, at least 2, got 1"):
        random_halves_null(M, 2, 6, 1, seeded(1))
