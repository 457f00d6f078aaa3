"""Per-example gradients in few coordinates, such that noise can be added in those coordinates exactly.

A protected step releases S + N(0, s^2 I_P), S a sum of per-example gradients. For a basis V (P, d) with
orthonormal columns, V^T N(0, s^2 I_P) = N(0, s^2 I_d) and V^T S is the sum of the examples' coordinates.
So batches can be formed and noised in d coordinates, and nothing of size P is needed once V is known.
Projecting only loses information, so what is measured in coordinates is at most what the release holds.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from fedaudit.maths.example_clipping import clip_by_tensor
from fedaudit.types import Loss

_OVERSAMPLING = 16  # extra random directions: makes the leading `dims` of the sketch near-exact


@dataclass(frozen=True, eq=False)
class GradientCoordinates:
    """Rows of several blocks in a common orthonormal basis.

    Attributes:
        coordinates: per block (n, d), about the origin: a sum of rows is the coordinates of their sum.
        sketch: orthonormal columns (P, l), l >= d.
        rotation: orthonormal columns (l, d).
        norms: per block the rows' norms in all P dimensions (n,).
    """

    coordinates: list[Tensor]
    sketch: Tensor
    rotation: Tensor
    norms: list[Tensor]

    @property
    def basis(self) -> Tensor:
        """The basis V (P, d), orthonormal columns."""
        return self.sketch @ self.rotation

    def energy(self, blocks: Sequence[int]) -> float:
        """Fraction of the squared norm of these blocks' rows that the coordinates hold, in [0, 1]."""
        held = sum(float(self.coordinates[b].square().sum()) for b in blocks)
        return held / max(sum(float(self.norms[b].square().sum()) for b in blocks), 1e-30)


def principal_coordinates(
    blocks: Sequence[Callable[[], Tensor]],
    fit: Sequence[Tensor],
    dims: int,
    generator: torch.Generator,
    budget: int = 2**27,
) -> GradientCoordinates:
    """Coordinates of the blocks' rows along the principal directions of the rows marked in `fit`.

    Randomised range finder, one pass: W = sum over blocks of R_b^T Omega_b with Gaussian Omega, Q = qr(W),
    then PCA (about the mean) inside Q. Each block is weighted by its rows' root mean square norm, so one
    block of large rows does not choose the basis alone. Rows not in `fit` have no influence on the basis.
    Every block is asked for twice, so memory is one block and P * (dims + 16) numbers, at most `budget`.

    Source: Halko, Martinsson, Tropp 2011 (arXiv 0909.4061), algorithm 4.1 without power iterations.

    Args:
        blocks: functions that return a block's rows (n, P).
        fit: per block a mask (n,) of the rows the basis may depend on.
        dims: largest number of coordinates.
        generator: source of Omega, on the CPU.
        budget: largest number of entries of the sketch (P, l); fewer directions are kept if P is huge.

    Raises:
        ValueError: if no row is marked, or all marked rows are zero or not finite.
    """
    if not any(bool(mask.any()) for mask in fit):
        raise ValueError("a basis needs at least one row to fit, got none: mark some rows in fit")
    total = sum(int(mask.sum()) for mask in fit)
    width = 0
    sketch: Tensor | None = None
    scales: list[float] = []
    norms: list[Tensor] = []
    for block, mask in zip(blocks, fit, strict=True):
        rows = block()
        if sketch is None:
            P = rows.shape[1]
            width = max(1, min(dims + _OVERSAMPLING, P, total, budget // P))
            sketch = torch.zeros(P, width, device=rows.device, dtype=rows.dtype)
        norms.append(rows.norm(dim=1))
        marked = norms[-1][mask]
        scales.append(float(marked.square().mean().sqrt()) if len(marked) else 0.0)
        if scales[-1] > 0:
            omega = torch.randn(len(marked), width, generator=generator).to(rows)
            sketch.addmm_(rows[mask].T, omega / scales[-1])
    if sketch is None or not bool(torch.isfinite(sketch).all()) or not bool(sketch.any()):
        raise ValueError(
            "a basis needs finite gradients of which some are not zero, got none: "
            "check the model's weights and the loss"
        )
    orthonormal = torch.linalg.qr(sketch).Q
    inside = [block() @ orthonormal for block in blocks]
    fitted = [rows[mask] / scale for rows, mask, scale in zip(inside, fit, scales, strict=True) if scale > 0]
    centred = torch.cat(fitted).double()
    centred = centred - centred.mean(0)
    variance, directions = torch.linalg.eigh(centred.T @ centred / len(centred))
    keep = variance > 1e-8 * variance[-1].clamp_min(1e-30)
    keep[: max(0, len(keep) - dims)] = False
    if not bool(keep.any()):  # identical rows have no spread: keep the leading direction
        keep[-1] = True
    rotation = directions[:, keep].flip(1).to(orthonormal)
    return GradientCoordinates([rows @ rotation for rows in inside], orthonormal, rotation, norms)


def clipped_gradients(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    loss: Loss,
    x: Tensor,
    y: Tensor,
    clip_norm: float | None,
    per_layer: bool = False,
) -> Tensor:
    """Per-example gradients of a SUM-reduced loss, each scaled to at most `clip_norm`: (n, P).

    Args:
        model: the architecture, in the mode to differentiate in.
        weights: parameters and buffers by name; P counts the trainable parameters in the model's order.
        loss: SUM-reduced loss (outputs, labels).
        x: examples (n, *input_shape).
        y: labels (n,).
        clip_norm: largest norm; None leaves gradients as they are.
        per_layer: whether it is shared among the parameter tensors (`clip_by_tensor`).
    """
    gradients = _example_gradients(model, weights, loss, x, y)
    if clip_norm is not None and per_layer:
        sizes = [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]
        return clip_by_tensor(gradients, sizes, clip_norm)
    if clip_norm is not None:
        norms = gradients.norm(dim=1, keepdim=True)
        gradients.mul_((clip_norm / norms.clamp_min(1e-30)).clamp_max(1.0))
    return gradients


def _example_gradients(
    model: nn.Module, weights: Mapping[str, Tensor], loss: Loss, x: Tensor, y: Tensor
) -> Tensor:
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    free = {name: weights[name].detach() for name in names}
    fixed = {name: value.detach() for name, value in weights.items() if name not in free}

    def example_loss(parameters: dict[str, Tensor], one_x: Tensor, one_y: Tensor) -> Tensor:
        outputs = functional_call(model, {**fixed, **parameters}, (one_x.unsqueeze(0),))
        return loss(outputs, one_y.unsqueeze(0))

    by_name = vmap(grad(example_loss), in_dims=(None, 0, 0))(free, x, y)
    return torch.cat([by_name[name].flatten(1) for name in names], dim=1)
