"""Angles between the subspaces that the rows of matrices span most, and what chance alone makes of them.

For matrices M_0, M_1 whose rows are gradients, U_a the k leading right singular vectors of M_a, the principal
angles are theta_i = arccos(sigma_i(U_0^T U_1)), i = 1 ... k (Bjoerck, Golub 1973).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

_BLOCK = 2**22  # numbers in a block of columns: 32 MB in float64


def principal_angles(M0: Tensor, M1: Tensor, k: int) -> Tensor:
    """Angles (k,) between the leading k-dimensional row spaces of two matrices, ascending, in radians.

    Small angles come from sines and large ones from cosines, so all are accurate to rounding. The P columns
    are first reduced to n0 + n1 by orthogonal factorisation of one block after the other: memory beside the
    inputs is one block, whatever P is. Where the k-th and the next singular value are equal, the subspace is
    not unique and neither are the angles.

    Args:
        M0: gradients as rows (n0, P).
        M1: gradients as rows (n1, P).
        k: dimension of the subspaces.

    Raises:
        ValueError: if the rows differ in length, or a matrix spans fewer than k directions.

    >>> principal_angles(torch.tensor([[2.0, 0.0]]), torch.tensor([[1.0, 1.0]]), 1)
    tensor([0.7854], dtype=torch.float64)
    """
    if M0.ndim != 2 or M1.ndim != 2 or M0.shape[1] != M1.shape[1]:
        raise ValueError(
            f"rows of one length are compared, got shapes {tuple(M0.shape)} and {tuple(M1.shape)}: "
            "pass (n, P) matrices of one layer"
        )
    eps = max(torch.finfo(M.dtype).eps for M in (M0, M1))
    first, second = (leading_directions(rows, k, eps) for rows in reduced_rows(M0, M1))
    return angles_between(first, second)


def grassmann_distance(angles: Tensor) -> Tensor:
    """Geodesic distance sqrt(sum theta_i^2) of angles (..., k), in radians, at most pi/2 sqrt(k).

    >>> grassmann_distance(torch.tensor([0.3, 0.4]))
    tensor(0.5000)
    """
    distance: Tensor = torch.linalg.vector_norm(angles, dim=-1)
    return distance


def projection_distance(angles: Tensor) -> Tensor:
    """Projection distance sqrt(sum sin^2 theta_i) of angles (..., k), at most sqrt(k), without unit.

    It is |U_0 U_0^T - U_1 U_1^T|_F / sqrt(2).

    >>> projection_distance(torch.tensor([0.0, torch.pi / 2]))
    tensor(1.)
    """
    distance: Tensor = torch.linalg.vector_norm(angles.sin(), dim=-1)
    return distance


def random_halves_null(
    M: Tensor, k: int, rows: int, repetitions: int, generator: torch.Generator
) -> tuple[float, float]:
    """Grassmann distance between random halves of the SAME rows: mean and standard deviation, in radians.

    The distance that chance alone gives: in each repetition two disjoint sets of `rows` rows are drawn.
    Compare it only with distances between matrices of that many rows, for the k leading directions of fewer
    rows are less certain and the angles wider.

    Args:
        M: gradients (n, P), n >= 2 rows.
        k: dimension of the subspaces.
        rows: rows of each half, as many as the matrices have whose distance is judged.
        repetitions: how often halves are drawn, at least 2.
        generator: source of the draws.

    Raises:
        ValueError: if M has too few rows, repetitions are fewer than 2, or a half spans fewer than
            k directions.
    """
    if repetitions < 2:
        raise ValueError(f"a standard deviation needs repetitions, at least 2, got {repetitions}: raise it")
    (coordinates,) = reduced_rows(M)
    drawn = disjoint_pools(len(M), rows, repetitions, generator)
    subspaces = leading_directions(coordinates[drawn], k, torch.finfo(M.dtype).eps)
    distances = grassmann_distance(angles_between(subspaces[:, 0], subspaces[:, 1]))
    return float(distances.mean()), float(distances.std())


def reduced_rows(*matrices: Tensor) -> Sequence[Tensor]:
    """The same rows in at most n coordinates, n all rows together: what a common rotation leaves, float64."""
    counts = [len(M) for M in matrices]
    n, P = sum(counts), matrices[0].shape[1]
    if n >= P:
        return [M.detach().double() for M in matrices]
    width = max(n, _BLOCK // n)
    factor = torch.zeros(0, n, dtype=torch.float64, device=matrices[0].device)
    for start in range(0, P, width):
        block = torch.cat([M[:, start : start + width].detach().double() for M in matrices]).T
        factor = torch.linalg.qr(torch.cat([factor, block]), mode="r").R
    return torch.split(factor.T, counts)


def leading_directions(rows: Tensor, k: int, eps: float) -> Tensor:
    """The k leading right singular vectors (..., r, k) of rows (..., n, r)."""
    _, singular, directions = torch.linalg.svd(rows, full_matrices=False)
    tolerance = max(rows.shape[-2:]) * eps * singular[..., :1]
    rank = int((singular > tolerance).sum(-1).min()) if singular.numel() else 0
    if not 1 <= k <= rank:
        raise ValueError(f"a subspace of k={k} dimensions needs rows that span as many, got {rank}: lower k")
    leading: Tensor = directions[..., :k, :].mT
    return leading


def angles_between(first: Tensor, second: Tensor) -> Tensor:
    """Principal angles (..., k), ascending, of orthonormal bases (..., r, k)."""
    overlap = first.mT @ second
    cosines = torch.linalg.svdvals(overlap).clamp(max=1)
    sines = torch.linalg.svdvals(second - first @ overlap).clamp(max=1).flip(-1)
    return torch.where(cosines.square() > 0.5, sines.asin(), cosines.acos())


def disjoint_pools(total: int, size: int, repetitions: int, generator: torch.Generator) -> Tensor:
    """Two disjoint sets of positions per repetition: (repetitions, 2, size)."""
    if size < 1 or 2 * size > total:
        raise ValueError(
            f"two disjoint halves of {size} rows need {max(2, 2 * size)}, got {total}: lower rows"
        )
    keys = torch.rand(repetitions, total, generator=generator)
    return keys.argsort(dim=1)[:, : 2 * size].reshape(repetitions, 2, size)
