"""What one step releases of single examples, seen in coordinates: sums over a batch, noise, direction."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def batch_members(parts: Sequence[Tensor], batch: int, generator: torch.Generator) -> Tensor:
    """Who is in the batch of each example: (n, n) of 0 and 1, row i the example i and batch - 1 others.

    The others are drawn without replacement from the part that example i belongs to, so that no batch mixes
    training and held-out examples.

    Args:
        parts: disjoint positions that together are 0 ... n - 1.
        batch: examples in a batch, at most the size of the smallest part.
        generator: source of the draws.

    Raises:
        ValueError: if a part is smaller than a batch.

    >>> batch_members([torch.tensor([0, 1]), torch.tensor([2])], 1, torch.Generator()).tolist()
    [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    """
    smallest = min(len(part) for part in parts)
    if not 1 <= batch <= smallest:
        raise ValueError(f"a batch has 1 to {smallest} examples, as many as the smallest part, got {batch}")
    n = sum(len(part) for part in parts)
    members = torch.eye(n, dtype=torch.float64)
    for part in parts:
        keys = torch.rand(len(part), len(part), generator=generator).fill_diagonal_(2.0)
        others = part[keys.topk(batch - 1, dim=1, largest=False).indices]
        members[part[:, None], others] = 1.0
    return members


def noise_beside(
    rows: int, spanned: int, dimensions: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Standard Gaussian noise N(0, I_P) on each of m rows, as far as inner products can tell.

    In an orthonormal basis whose first r directions span what the rows are about, the noise is Gaussian in
    these r; of its part E (m, P - r) beside them only E E^T matters, which is Wishart distributed. Its
    triangular factor is drawn directly (Bartlett 1933), so nothing of size P is needed.

    Args:
        rows: m.
        spanned: r.
        dimensions: P >= r.
        generator: source of the draws, on the CPU.

    Returns:
        Coordinates (m, r) and (m, min(m, P - r)), float64.

    >>> inside, beside = noise_beside(2, 3, 1000, torch.Generator().manual_seed(0))
    >>> inside.shape, beside.shape
    (torch.Size([2, 3]), torch.Size([2, 2]))
    """
    inside = torch.randn(rows, spanned, dtype=torch.float64, generator=generator)
    left = dimensions - spanned
    if left <= rows:
        return inside, torch.randn(rows, left, dtype=torch.float64, generator=generator)
    seed = int(torch.randint(2**62, (1,), generator=generator))
    diagonal = np.sqrt(np.random.default_rng(seed).chisquare(left - np.arange(rows)))
    factor = torch.randn(rows, rows, dtype=torch.float64, generator=generator).tril(-1)
    return inside, factor + torch.diag(torch.from_numpy(diagonal))


def direction_features(
    coordinates: Tensor,
    fit: Tensor,
    dims: int,
    *,
    noise_std: float = 0.0,
    dimensions: int | None = None,
    generator: torch.Generator,
) -> Tensor:
    """What a decoder sees of each released gradient: its direction along the training rows' main directions.

    Rows g become (g + noise) / |g + noise|, with noise and norm in all P dimensions, and are projected on at
    most `dims` principal directions (about the mean) of the noiseless directions of the rows in `fit`.
    Without dividing by the norm, which spans orders of magnitude in a trained network, few rows decide all.
    The number of features is the rank of the training rows where that is lower; all-zero rows stay zero.

    Args:
        coordinates: gradients (n, r) in an orthonormal basis that spans them.
        fit: positions of the training rows, which alone choose the directions.
        dims: largest number of features.
        noise_std: standard deviation of the release's noise in every one of P dimensions.
        dimensions: P; None is r.
        generator: source of the noise.

    Returns:
        Features (n, d), float64.
    """
    rows = coordinates.double().cpu()
    n, r = rows.shape
    trained = _unit(rows[fit])
    _, singular, directions = torch.linalg.svd(trained - trained.mean(0), full_matrices=False)
    basis = directions[:dims][singular[:dims] > 1e-6 * singular[:1]].T
    squared_norm_beside = torch.zeros(n, 1, dtype=torch.float64)
    if noise_std > 0:
        rows = rows + noise_std * torch.randn(n, r, dtype=torch.float64, generator=generator)
        left = (r if dimensions is None else dimensions) - r
        if left > 0:
            seed = int(torch.randint(2**62, (1,), generator=generator))
            drawn = np.random.default_rng(seed).chisquare(left, size=(n, 1))
            squared_norm_beside = noise_std**2 * torch.from_numpy(drawn)
    norms = (rows.square().sum(1, keepdim=True) + squared_norm_beside).sqrt()
    features: Tensor = rows @ basis / torch.where(norms > 0, norms, 1.0)
    return features


def second_degree_features(features: Tensor, fit: Tensor, dims: int) -> Tensor:
    """Products of pairs of features along their main directions: (n, d) to (n, d'), d' at most `dims`.

    The gradient of an example is a residual times an activation, and the residual changes sign with the
    class: what the activation tells is in products of two coordinates rather than in any one of them. The
    directions are principal components (about the mean) of the products f f^T over the rows in `fit`, through
    their inner products <f f^T, h h^T> = <f, h>^2.

    Args:
        features: (n, d).
        fit: positions of the training rows, which alone choose the directions.
        dims: largest number of features.

    >>> second_degree_features(torch.tensor([[1.0], [-1.0], [0.0]]), torch.arange(3), 4).abs()
    tensor([[0.3333],
            [0.3333],
            [0.6667]], dtype=torch.float64)
    """
    products = (features.double() @ features[fit].double().T).square()
    trained = products[fit]
    centred = trained - trained.mean(0) - trained.mean(1, keepdim=True) + trained.mean()
    variances, directions = torch.linalg.eigh((centred + centred.T) / 2)
    keep = variances > 1e-10 * variances[-1:].clamp_min(0)
    keep[: max(0, len(keep) - dims)] = False
    centred = products - trained.mean(0) - products.mean(1, keepdim=True) + trained.mean()
    components: Tensor = centred @ (directions[:, keep] / variances[keep].sqrt())
    return components.flip(1)


def _unit(rows: Tensor) -> Tensor:
    norms = rows.norm(dim=1, keepdim=True)
    return rows / torch.where(norms > 0, norms, 1.0)
