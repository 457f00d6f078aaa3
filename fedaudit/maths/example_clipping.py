"""How an example's gradient is shortened where each parameter tensor is clipped by itself.

Flat clipping scales the whole gradient to norm C. Per-layer clipping (McMahan et al. 2018, arXiv 1710.06963,
section 3; Opacus' `clipping="per_layer"`) scales each of the L trainable parameter tensors to norm
C_l = C / sqrt(L). Then sqrt(sum_l C_l^2) = C, so an example still moves the sum by at most C, and the same
noise on every coordinate gives the same guarantee.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def tensor_clip_norm(clip_norm: float, tensors: int) -> float:
    """C_l = C / sqrt(L): what one of L tensors may be long, so that all together are no longer than C.

    Raises:
        ValueError: if C is not positive or there is no tensor.

    >>> tensor_clip_norm(2.0, 4)
    1.0
    """
    if not clip_norm > 0 or tensors < 1:
        raise ValueError(
            f"per-layer clipping takes a norm > 0 and at least one tensor, got {clip_norm} and {tensors}: "
            "give both"
        )
    return clip_norm / math.sqrt(tensors)


def clip_by_tensor(rows: Tensor, sizes: Sequence[int], clip_norm: float) -> Tensor:
    """Gradients (B, P) with each tensor's part scaled to norm at most C / sqrt(L).

    Args:
        rows: one example's whole gradient per row, tensor after tensor.
        sizes: numbers of parameters of the L tensors; they add up to P.
        clip_norm: C, over all tensors together.

    Raises:
        ValueError: as `tensor_clip_norm`.

    >>> clip_by_tensor(torch.tensor([[3.0, 4.0, 0.1, 0.0]]), [2, 2], clip_norm=2**0.5).round(decimals=4)
    tensor([[0.6000, 0.8000, 0.1000, 0.0000]])
    """
    largest = tensor_clip_norm(clip_norm, len(sizes))
    parts = []
    for part in torch.split(rows, list(sizes), dim=1):
        norms = torch.linalg.vector_norm(part, dim=1, keepdim=True, dtype=torch.float64)
        parts.append(part * (largest / norms).clamp(max=1).to(part.dtype))  # C / 0 = inf becomes 1
    return torch.cat(parts, dim=1)
